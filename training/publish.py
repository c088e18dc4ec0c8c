"""The end of a training stage: a folder with the model, its numbers and its pictures, swapped in as one."""

import shutil
from typing import Any

from data.loader import spread_rows
from data.mixture import task_counts
from model.deepgen import DeepGen
from model.lora import lora_targets
from model.parts import parameter_report
from model.weights import save_model
from runtime.files import read_json, tensors_digest, write_json
from runtime.stage import StageRun, rank
from training.checkpoint import TrainState
from training.pictures import save_curves
from training.stages import parent_of
from training.tracking import Tracker
from training.validation import LOSS, STOPPED, draw_board, held_out_loss

STRIPS = 4  # updates of mr_grpo whose best and worst pictures are published, the last among them


def publish_stage(run: StageRun, stage: str, model: DeepGen, state: TrainState, tracker: Tracker) -> None:
    """Write `outputs/<stage>/`: model/, metrics.json, history.json, curves.png, grid.png; report it to MLflow and Dagster."""
    history = state.history
    folder = run.folder / "out"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    model.eval()
    save_model(model, folder / "model")
    metrics: dict[str, Any] = {
        "steps": len(history),
        "steps_skipped": state.guard.get("skipped", 0),
        "samples_seen": state.data["global_sample"],
        "samples_by_task": samples_by_task(run, stage, state),
        "parameters": read_json(run.folder / "parameters.json"),
        "held_out_loss": {"before": read_json(run.folder / "before.json"), "after": held_out_loss(run, model)},
    }
    if marks := contamination_of(run, stage):
        metrics["contamination"] = marks
    if history and STOPPED in history[-1]:
        metrics["stopped_early_at"] = len(history)
    for name in ("loss", "reward"):
        series = [row[name] for row in history if name in row]
        if series:
            share = max(1, len(series) // 10)
            metrics |= {f"{name}_first": sum(series[:share]) / share, f"{name}_last": sum(series[-share:]) / share}
    write_json(folder / "metrics.json", metrics)
    columns = {name for row in history for name in row}  # in each row, for DVC plots tables without holes alone
    write_json(folder / "history.json", [{name: row.get(name) for name in columns} for row in history])
    heads = sorted(name for name in columns if name.startswith("reward_"))
    drawn = ["reward", "held_out_reward", *heads] if heads else ["loss", "loss_text_to_image", "loss_image_edit", LOSS]
    save_curves(history, [name for name in drawn if name in columns], folder / "curves.png", stage)
    draw_board(run, model, folder / "grid.png")
    strips = sorted((run.folder / "strips").glob("*.png"))
    for strip in [strips[-1 - i] for i in spread_rows(len(strips), STRIPS)]:
        (folder / "strips").mkdir(exist_ok=True)
        shutil.copyfile(strip, folder / "strips" / strip.name)
    for picture in ("curves.png", "grid.png"):
        tracker.picture(folder / picture)
    numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
    losses = {f"held_out_loss_{when}_{task}": value for when, row in metrics["held_out_loss"].items() for task, value in row.items()}
    tracker.result(**losses)
    tracker.tag(model_digest=tensors_digest(folder / "model"))
    shown = {"curves": run.out / "curves.png", "samples": run.out / "grid.png"}
    run.publish(folder)
    run.report(numbers | losses, shown)


def contamination_of(run: StageRun, stage: str) -> dict[str, dict[str, int]]:
    """Evaluation set -> items of it that this stage or one before was trained on, and of how many: what their mixtures allowed."""
    parent = run.root / "outputs" / str(parent_of(stage, run.params)) / "metrics.json"
    marks: dict[str, dict[str, int]] = read_json(parent).get("contamination", {}) if parent.is_file() else {}
    mixture = read_json(run.root / "outputs" / "mixture" / f"{stage}.json")
    for found in (mixture.get("contamination", {}), (mixture.get("auxiliary") or {}).get("contamination", {})):
        for name, row in found.items():
            marks[name] = max(marks.get(name, row), row, key=lambda each: each["items"])
    return marks


def samples_by_task(run: StageRun, stage: str, state: TrainState) -> dict[str, int]:
    """How many samples of each task were read, those of skipped steps as well."""
    mixture, size = read_json(run.root / "outputs" / "mixture" / f"{stage}.json"), state.data["batch_size"]
    return {task: count * size for task, count in task_counts(mixture, state.data["global_sample"] // size).items()}


def report_parameters(run: StageRun, model: DeepGen, tracker: Tracker) -> None:
    """What trains and what is frozen, by part, with dtypes and LoRA's targets: to the log, MLflow and Dagster."""
    rows = parameter_report(model.named_parameters())
    if rank() == 0:
        counts = {row["part"]: {"trained": row["trained"], "frozen": row["frozen"]} for row in rows}
        write_json(run.folder / "parameters.json", counts)  # LoRA is merged by the time the numbers are published
    texts = {f"parameters.{row['part']}": "trained {trained:,}, frozen {frozen:,}, {dtype}".format(**row) for row in rows}
    texts["parameters.lora"] = lora_targets(model)
    for name, text in texts.items():
        print(f"  {name.removeprefix('parameters.'):<13} {text}", flush=True)
    tracker.tag(**texts)
    run.report(texts)


def remember_start(run: StageRun, model: DeepGen) -> None:
    """Measure the held-out loss before the first step, once a run folder."""
    if not (run.folder / "before.json").exists():
        write_json(run.folder / "before.json", held_out_loss(run, model))
