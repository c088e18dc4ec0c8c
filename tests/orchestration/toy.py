"""The stages of a toy project: the real names, files and reports, and next to no work. Copied into a temporary clone by the fixtures.

TOY_SECONDS: length of a training step. TOY_FAIL=STAGE: end with code 7. TOY_NAN=STAGE: a NaN among the metrics.
TOY_KILL=STAGE: killed by SIGKILL at step 2, once. TOY_BOARD=STAGE: a board is drawn there at step 2.
TOY_EDIT=STAGE: params.yaml changes between the command's last look at it and its end.
"""

import io
import json
import os
import shutil
import signal
import struct
import sys
import time
from pathlib import Path

from runtime.exits import Interrupted
from runtime.files import read_json, sha256_file, sha256_json, tensors_digest, write_atomic, write_json
from runtime.progress import Progress
from runtime.stage import StageRun, open_stage

STAGES = ("alignment", "sft", "mr_grpo")


def write_weights(path: Path, values: list[float]) -> None:
    """A safetensors file with one tensor."""
    header = json.dumps({"weight": {"dtype": "F32", "shape": [len(values)], "data_offsets": [0, 4 * len(values)]}}).encode()
    write_atomic(path, struct.pack("<Q", len(header)) + header + struct.pack(f"<{len(values)}f", *values))


def fresh(run: StageRun) -> Path:
    folder = run.folder / "out"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def shards(run: StageRun, part: str) -> None:
    config, folder = run.params.data.parts[part], fresh(run)
    write_atomic(folder / "shard-000000.tar", f"{part} {config.seed} {config.samples}\n")
    write_atomic(folder / "index.npy", "index\n")
    sha256, index_sha256 = (sha256_file(folder / name) for name in ("shard-000000.tar", "index.npy"))
    rows = [{"name": "shard-000000.tar", "sha256": sha256, "samples": config.samples}]
    manifest = {"dataset_id": sha256_json(rows), "samples": config.samples, "shards": rows, "files": {"index.npy": index_sha256}}
    endings = dict.fromkeys(("deduplicated", "dropped", "quarantined"), 0)
    manifest |= {"counts": endings | {"input": config.samples, "written": config.samples}, "decoded": config.samples}
    write_json(folder / "manifest.json", manifest)
    run.publish(folder)
    run.report({"samples": config.samples})


def mixture(run: StageRun, stage: str) -> None:
    config = run.params.mixture[stage]
    tasks: dict[str, list[dict[str, object]]] = {}
    for part in config.parts:
        manifest, task = read_json(run.root / "outputs" / "shards" / part / "manifest.json"), run.params.data.parts[part].task
        tasks.setdefault(task, []).append({"part": part, "samples": manifest["samples"], "dataset_id": manifest["dataset_id"]})
    temporary = run.folder / "mixture.json"
    ratio = {task: times for task, times in config.ratio.items() if times > 0}
    counts = {task: {str(row["part"]): 100 for row in tasks[task]} for task in ratio}  # each task has one part
    leaks = {"evaluation_leak": dict.fromkeys(config.parts, "allow"), "taken_out": {}, "realised": {"samples": 100, "parts": counts}}
    write_json(temporary, {"tasks": {task: tasks[task] for task in ratio}, "ratio": ratio} | leaks)
    run.publish(temporary)


def gradient() -> bytes:
    """A PNG of 256 x 256 pixels."""
    from PIL import Image

    file = io.BytesIO()
    Image.linear_gradient("L").save(file, "PNG")
    return file.getvalue()


def at_step_two(run: StageRun, stage: str, state: Path) -> None:
    """What a test asked for."""
    if os.environ.get("TOY_BOARD") == stage:
        write_atomic(run.folder / "boards" / "step-000002.png", gradient())
    if os.environ.get("TOY_KILL") == stage and not state.exists():
        write_json(state, {"step": 2})
        write_json(run.folder / "step-000002" / "complete.json", [])
        os.kill(os.getpid(), signal.SIGKILL)


def batch_size(run: StageRun, stage: str) -> int:
    return run.params.mr_grpo.prompts_per_step if stage == "mr_grpo" else int(getattr(run.params, stage).batch_size)


def train(run: StageRun, stage: str) -> None:
    steps, state = getattr(run.params, stage).steps, run.folder / "step.json"
    done = read_json(state)["step"] if state.exists() else 0
    print(f"{stage}: from step {done}", flush=True)
    with Progress(steps, "step", stage, run.folder / "progress.jsonl", start=done, every_s=0) as progress:
        while done < steps:
            time.sleep(float(os.environ.get("TOY_SECONDS", "0")))
            done += 1
            print(f"{stage}: step {done} pid {os.getpid()}", flush=True)
            progress.update(loss=1 / done)
            if run.stop or done % 20 == 0:
                write_json(state, {"step": done})
            if run.stop and done < steps:
                raise Interrupted(f"stopped at step {done} of {steps}")
            if done == 2:
                at_step_two(run, stage, state)
    if os.environ.get("TOY_FAIL") == stage:
        print("the last words of a failing stage", flush=True)
        sys.exit(7)
    folder = fresh(run)
    write_weights(folder / "model" / "dit" / "model.safetensors", [float(steps), float(run.params.sft.seed)])
    last = float("nan") if os.environ.get("TOY_NAN") == stage else 0.5
    moved = {"reward_first": 0.1, "reward_last": 0.2} if stage == "mr_grpo" else {"loss_first": 1.0, "loss_last": last}
    ratio, batch = read_json(run.root / "outputs" / "mixture" / f"{stage}.json")["ratio"], batch_size(run, stage)
    by_task = {task: steps * batch * times // sum(ratio.values()) for task, times in ratio.items()}
    metrics = {"steps": steps, "steps_skipped": 0, "samples_seen": steps * batch, "samples_by_task": by_task} | moved
    write_atomic(folder / "metrics.json", json.dumps(metrics))
    run.publish(folder)
    run.report({"loss_last": 0.5})


def evaluate(run: StageRun, stage: str) -> None:
    config, folder = run.params.evaluation, fresh(run)
    metrics, samples = {}, {}
    for part in config.parts:
        n = read_json(run.root / "outputs" / "shards" / part / "manifest.json")["samples"]
        task = run.params.data.parts[part].task
        metrics[task] = {"n": n, "strict": 0.5, "interval_95": [0.2, 0.8], "kinds": {}}
        samples[task] = [{"key": f"{task}-{i}", "prompt": f"scene {i}", "strict": i % 2 == 0} for i in range(n)]
        write_atomic(folder / "images" / f"{task}-0.png", gradient())
    ids = {part: read_json(run.root / "outputs" / "shards" / part / "manifest.json")["dataset_id"] for part in config.parts}
    gates = [
        {"name": name, "value": metrics[name]["strict"], "floor": floor, "passed": metrics[name]["strict"] >= floor}
        for name, floor in sorted(run.params.gates.floors.items())
    ]
    digest = tensors_digest(run.root / "outputs" / stage / "model")
    write_json(folder / "metrics.json", metrics)
    write_json(folder / "samples.json", samples)
    write_json(folder / "gates.json", {"model_digest": digest, "evaluation_set_digest": sha256_json(ids), "gates": gates})
    run.publish(folder)


def export(run: StageRun) -> None:
    folder = fresh(run)
    shutil.copytree(run.root / "outputs" / "mr_grpo" / "model", folder, dirs_exist_ok=True)
    write_json(folder / "model_index.json", {"_class_name": "Toy"})
    proof = {"model_digest": tensors_digest(folder), "network": "off", "process": "fresh", "seed": 7, "largest_pixel_difference": 0}
    write_json(folder / "proof.json", proof)
    licences = sorted({part.licence for part in run.params.data.parts.values()})
    write_json(folder / "provenance.json", {"licences": licences, "upstream": []})
    files = [file for file in folder.rglob("*") if file.is_file()]
    write_json(folder / "files.json", {str(file.relative_to(folder)): sha256_file(file) for file in files})
    run.publish(folder)


def main() -> None:
    group, _, key = sys.argv[1].partition("@")
    with open_stage(sys.argv[1]) as run:
        if group in STAGES:
            train(run, group)
        elif group == "export_diffusers":
            export(run)
        else:
            {"shards": shards, "mixture": mixture, "evaluation": evaluate}[group](run, key)
    if os.environ.get("TOY_EDIT") == sys.argv[1]:
        params = Path("params.yaml")
        params.write_text(params.read_text().replace("seed: 12", "seed: 99"))


if __name__ == "__main__":
    main()
