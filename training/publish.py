"""The end of a training stage: a folder with the model, its numbers and its pictures, swapped in as one."""

import shutil
from collections.abc import Sequence
from typing import Any

from model.deepgen import DeepGen
from model.lora import lora_targets
from model.parts import parameter_report
from model.weights import save_model
from runtime.files import read_json, tensors_digest, write_json
from runtime.stage import StageRun, rank
from training.pictures import save_curves
from training.tracking import Tracker
from training.validation import LOSS, STOPPED, draw_board, held_out_loss


def publish_stage(run: StageRun, stage: str, model: DeepGen, history: Sequence[dict[str, float]], tracker: Tracker) -> None:
    """Write `outputs/<stage>/`: model/, metrics.json, history.json, curves.png, grid.png; report it to MLflow and Dagster."""
    folder = run.folder / "out"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    model.eval()
    save_model(model, folder / "model")
    metrics: dict[str, Any] = {
        "steps": len(history),
        "parameters": read_json(run.folder / "parameters.json"),
        "held_out_loss": {"before": read_json(run.folder / "before.json"), "after": held_out_loss(run, model)},
    }
    if history and STOPPED in history[-1]:
        metrics["stopped_early_at"] = len(history)
    for name in ("loss", "reward"):
        series = [row[name] for row in history if name in row]
        if series:
            share = max(1, len(series) // 10)
            metrics |= {f"{name}_first": sum(series[:share]) / share, f"{name}_last": sum(series[-share:]) / share}
    write_json(folder / "metrics.json", metrics)
    write_json(folder / "history.json", list(history))
    drawn = ("loss", "loss_text_to_image", "loss_image_edit", LOSS, "reward", "reward_strict")
    save_curves(history, [name for name in drawn if any(name in row for row in history)], folder / "curves.png", stage)
    draw_board(run, model, folder / "grid.png")
    for picture in ("curves.png", "grid.png"):
        tracker.picture(folder / picture)
    numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
    losses = {f"held_out_loss_{when}_{task}": value for when, row in metrics["held_out_loss"].items() for task, value in row.items()}
    tracker.result(**losses)
    tracker.tag(model_digest=tensors_digest(folder / "model"))
    shown = {"curves": run.out / "curves.png", "samples": run.out / "grid.png"}
    run.publish(folder)
    run.report(numbers | losses, shown)


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
