"""The closing words of a run: what was reached, where to look, what to type next."""

from pathlib import Path
from typing import Any

from runtime.files import read_json
from runtime.params import STAGES


def closing_summary(root: Path) -> str:
    """Metrics after each stage, losses first to last, picture folders and the next commands. Shows what exists."""
    parts = [training_lines(root), evaluation_table(root), picture_lines(root), next_commands()]
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def training_lines(root: Path) -> list[str]:
    """One line a training stage: how its loss, or its reward, moved."""
    lines = []
    for stage in STAGES:
        path = root / "outputs" / stage / "metrics.json"
        if not path.is_file():
            continue
        metrics = read_json(path)
        name = "reward" if "reward_first" in metrics else "loss"
        held_out = metrics.get("held_out_loss", {})
        moves = [f"{name} {metrics[f'{name}_first']:.4g} -> {metrics[f'{name}_last']:.4g}"] + [
            f"held-out {task} {before:.4g} -> {held_out['after'][task]:.4g}" for task, before in held_out.get("before", {}).items()
        ]
        lines.append(f"  {stage:<10} {metrics['steps']:>6} steps   {'   '.join(moves)}")
    return ["training, first -> last"] + lines if lines else []


def evaluation_table(root: Path) -> list[str]:
    """Share of the evaluation set that the verifier calls right, after each stage, with its 95% interval."""
    rows: dict[str, dict[str, Any]] = {}
    for stage in STAGES:
        path = root / "outputs" / "evaluation" / stage / "metrics.json"
        if path.is_file():
            rows[stage] = read_json(path)
    if not rows:
        return []
    tasks = sorted({task for row in rows.values() for task in row})
    lines = ["right on the evaluation set (95% interval)", f"  {'after':<10} " + " ".join(f"{task:>28}" for task in tasks)]
    for stage, row in rows.items():
        lines.append(f"  {stage:<10} " + " ".join(f"{_share(row.get(task)):>28}" for task in tasks))
    return lines


def _share(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    low, high = row["interval_95"]
    return f"{row['strict']:.3f} [{low:.3f}, {high:.3f}] n {row['n']}"


def picture_lines(root: Path) -> list[str]:
    """The pictures that the stages left, by path."""
    places = [Path("outputs") / stage for stage in STAGES] + [Path("outputs/evaluation") / stage for stage in STAGES]
    found = [str(place / "*.png") for place in places if any((root / place).glob("*.png"))]
    lines = ["pictures"] + [f"  {place}" for place in found] if found else []
    page = Path("outputs/report/index.html")
    return lines + ["", "all of it on one page", f"  {page}"] if (root / page).is_file() else lines


def next_commands() -> list[str]:
    return [
        "next",
        "  make ui                                                  # Dagster and MLflow in the browser",
        '  .venv/bin/deepgen generate "a red circle" --out a.png    # the champion draws',
    ]
