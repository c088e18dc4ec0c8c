"""Scores, pictures and gates of the model after a stage, on the evaluation split."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from data.loader import read_part, spread_rows
from model.weights import load_model
from runtime.files import read_json, sha256_json, tensors_digest, write_json
from runtime.progress import Progress
from runtime.stage import StageRun
from training.batching import batched
from training.pictures import edit_captions, edit_row, save_grid, save_scores
from training.scoring import Scored, facts, score, summarize
from training.tracking import track

SHOWN = 24  # samples a task whose pictures are kept
WORST = 12


def run_evaluation(run: StageRun, stage: str) -> None:
    """Write `outputs/evaluation/<stage>/`: metrics.json, gates.json, samples.json, images/, scores.png, and two grids a task."""
    torch.set_num_threads(run.params.launch.threads)
    config = run.params.evaluation
    model_folder = run.root / "outputs" / stage / "model"
    shards = run.root / "outputs" / "shards"
    with track(run) as tracker:
        model = load_model(model_folder)
        folder = run.folder / "out"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        metrics, pictures, samples_by_task = {}, {}, {}
        total = sum(read_json(shards / part / "manifest.json")["samples"] for part in config.parts)
        with Progress(total, "image", f"evaluation {stage}", run.folder / "progress.jsonl") as progress:
            for part in config.parts:
                samples = list(read_part(shards / part))
                scored = score(model, samples, config.sampling_steps, config.guidance, config.batch_size, config.seed, progress.update)
                metrics[samples[0].task] = summarize(scored)
                samples_by_task[samples[0].task] = [facts(row) for row in scored]
                shown = [scored[i] for i in spread_rows(len(scored), SHOWN)]
                save_images(shown, folder / "images")
                save_scored_grid(shown, folder / f"{samples[0].task}.png")
                pictures[samples[0].task] = run.out / f"{samples[0].task}.png"
                if wrong := worst(scored):
                    save_scored_grid(wrong, folder / f"worst_{samples[0].task}.png")
                    pictures[f"worst of {samples[0].task}"] = run.out / f"worst_{samples[0].task}.png"
        save_scores(metrics, run.params.gates.floors, folder / "scores.png")
        pictures = {"scores": run.out / "scores.png"} | pictures
        evaluation_set = {part: read_json(shards / part / "manifest.json")["dataset_id"] for part in config.parts}
        gates: dict[str, Any] = {
            "model_digest": tensors_digest(model_folder),
            "evaluation_set": evaluation_set,
            "evaluation_set_digest": sha256_json(evaluation_set),
            "gates": [
                {"name": name, "value": metrics[name]["strict"], "floor": floor, "passed": bool(metrics[name]["strict"] >= floor)}
                for name, floor in sorted(run.params.gates.floors.items())
                if name in metrics
            ],
        }
        trained = run.root / "outputs" / stage / "metrics.json"
        marks = read_json(trained).get("contamination", {}) if trained.is_file() else {}
        if marks:
            gates["contamination"] = marks
            tracker.tag(contamination=spell_marks(marks))
        write_json(folder / "metrics.json", metrics)
        write_json(folder / "gates.json", gates)
        write_json(folder / "samples.json", samples_by_task)
        tracker.result(**{f"{task}_strict": row["strict"] for task, row in metrics.items()})
        tracker.tag(model_digest=gates["model_digest"], evaluation_set_digest=gates["evaluation_set_digest"])
        for picture in sorted(folder.glob("*.png")):
            tracker.picture(picture)
        run.publish(folder)
        run.report({f"{task}_strict": row["strict"] for task, row in metrics.items()}, pictures)
    if marks:
        print(f"{stage}: {spell_marks(marks)}: scores of these sets are not held out", flush=True)
    for task, row in metrics.items():
        kinds = "  ".join(f"{kind} {value['strict']:.2f}" for kind, value in row["kinds"].items())
        low, high = row["interval_95"]
        print(f"{stage} {task}: {row['strict']:.3f} strict, 95% [{low:.3f}, {high:.3f}], n {row['n']}  {kinds}", flush=True)


def spell_marks(marks: Mapping[str, Mapping[str, int]]) -> str:
    """What every score of a model that was trained on evaluation items must say."""
    return "trained on " + ", ".join(f"{row['items']} of {row['of']} items of {name}" for name, row in sorted(marks.items()))


def worst(scored: list[Scored]) -> list[Scored]:
    """Wrong ones, those first of which least is right."""
    wrong = [row for row in scored if not row.strict]
    return sorted(wrong, key=lambda row: sum(row.parts.values()) / max(1, len(row.parts)))[:WORST]


def save_images(scored: list[Scored], folder: Path) -> None:
    """Each image as it is, `KEY.png`; of an edit also what it was made from and for, `KEY.source-0.png` and `KEY.target.png`."""
    folder.mkdir(exist_ok=True)
    for row in scored:
        sources = {f".source-{i}": image for i, image in enumerate(row.sample.references)}
        beside = sources | {".target": row.sample.target} if sources else {}
        for name, image in ({"": row.image} | beside).items():
            Image.fromarray(image).save(folder / f"{row.sample.key}{name}.png")


def save_scored_grid(scored: list[Scored], path: Path) -> None:
    """Images with their prompts, right ones marked; edits as source, result, target."""
    rows, captions = [], []
    for group in batched(scored, 8 if not scored[0].sample.references else 3):
        rows.append([image for row in group for image in edit_row(row.sample.references, row.image, row.sample.target)])
        captions.append([text for row in group for text in _texts(row)])
    save_grid(rows, path, captions, scale=2)


def _texts(row: Scored) -> list[str]:
    mark = "+ " if row.strict else "- "
    count = len(row.sample.references)
    return edit_captions(row.sample.prompt, count, mark + "result") if count else [mark + row.sample.prompt]
