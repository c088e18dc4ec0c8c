"""The champion's evaluation and the challenger's, side by side. The training room draws; what it draws from is kept beside each version."""

import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from orchestration.registry import CHAMPION, GATES, KEPT, Registry, measured_tags

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

COMPARISON = "comparison"  # of the artifacts of the challenger's run


def side_by_side(registry: Registry, challenger: "ModelVersion") -> tuple[dict[str, Path], str]:
    """Pictures by title, also put on the challenger's MLflow run, and a line that says whom they compare, or why there are none."""
    champion = registry.by_alias(CHAMPION)
    if champion is None or champion.version == challenger.version:
        return {}, "there is no champion yet" if champion is None else f"version {champion.version} is the champion"
    if not measured_tags(registry.root, challenger.tags["model_digest"]):
        return {}, "the evaluation on disk is not of these weights"
    with tempfile.TemporaryDirectory() as fetched:
        folder = _kept(registry, champion, Path(fetched))
        if folder is None:
            return {}, f"the pictures of champion version {champion.version} were not kept when it was registered"
        out = registry.root / "outputs" / "registry" / COMPARISON
        pictures, why_not = draw_comparison(registry.root, {"champion": folder, "challenger": registry.root / GATES.parent}, out)
    for picture in pictures:
        registry.client.log_artifact(challenger.run_id, str(picture), COMPARISON)
    return {f"beside the champion: {file.stem}": file for file in pictures}, why_not or f"beside champion version {champion.version}"


def draw_comparison(root: Path, evaluations: Mapping[str, Path], out: Path) -> tuple[list[Path], str]:
    """Pictures in `out` of evaluations side by side, by name, drawn in a process of the training room; else none, and why."""
    named = [f"{name}={folder}" for name, folder in evaluations.items()]
    command = [sys.executable, "-m", "training", "compare", *named, "--out", str(out)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return [], done.stderr.strip()
    return [Path(line) for line in done.stdout.splitlines()], ""


def _kept(registry: Registry, version: "ModelVersion", target: Path) -> Path | None:
    import mlflow

    if not registry.client.list_artifacts(version.run_id, KEPT):
        return None
    place = mlflow.artifacts.download_artifacts(
        run_id=version.run_id, artifact_path=KEPT, dst_path=str(target), tracking_uri=registry.client.tracking_uri
    )
    return Path(place)
