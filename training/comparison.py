"""Two evaluations of the same set side by side: each sample that both kept, and accuracy by kind with intervals."""

from collections.abc import Mapping
from pathlib import Path

from runtime.exits import Plain
from runtime.files import read_json
from training.page import ALL, accuracy_plot, save_grids, shown_samples


def save_comparison(evaluations: Mapping[str, Path], out: Path) -> list[Path]:
    """`accuracy.png` and `samples_TASK.png` in `out`, which is made; their paths.

    Args:
        evaluations: name -> folder that `training evaluate` wrote, in the order in which they are shown.

    Raises:
        Plain: they were measured on different sets, or one of them is not there.
    """
    names = list(evaluations)
    for name, folder in evaluations.items():
        if not (folder / "gates.json").is_file():
            raise Plain(f"{name}: there is no evaluation in {folder}, expected gates.json, metrics.json, samples.json and images/.")
    sets = {name: read_json(folder / "gates.json")["evaluation_set_digest"] for name, folder in evaluations.items()}
    if len(set(sets.values())) > 1:
        told = ", ".join(f"{name} on {digest[:12]}" for name, digest in sets.items())
        raise Plain(f"measured on different evaluation sets: {told}. Evaluate them on the same one to compare them.")
    out.mkdir(parents=True, exist_ok=True)
    metrics = {name: read_json(folder / "metrics.json") for name, folder in evaluations.items()}
    accuracy = {name: {task: {ALL: row} | row["kinds"] for task, row in found.items()} for name, found in metrics.items()}
    (out / "accuracy.png").write_bytes(accuracy_plot(accuracy, names))
    scores = {name: read_json(folder / "samples.json") for name, folder in evaluations.items()}
    grids = save_grids(shown_samples(evaluations, scores), "samples", out)
    return [out / name for name in ("accuracy.png", *grids)]
