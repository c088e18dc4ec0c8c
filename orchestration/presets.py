"""Presets: complete alternatives of params.yaml, and putting one in its place without losing anyone's edits."""

import subprocess
from pathlib import Path

from runtime.files import write_atomic
from runtime.params import check_params, parse_params


class PresetRefused(Exception):
    """The preset can't be used, or params.yaml holds edits that would be lost."""


def list_presets(root: Path) -> dict[str, str]:
    """Name -> its first line, which says what it is for."""
    presets = {}
    for file in sorted((root / "presets").glob("*.yaml")):
        with open(file) as handle:
            presets[file.stem] = handle.readline().lstrip("# ").strip()
    return presets


def preset_text(root: Path, name: str) -> str:
    """The preset's file, checked.

    Raises:
        PresetRefused: there is none of that name.
        ParamsError: it can't be used as params.yaml.
    """
    known = list_presets(root)
    if name not in known:
        raise PresetRefused(f"{name}: no such preset; allowed: {', '.join(known)}")
    text = (root / "presets" / f"{name}.yaml").read_text()
    check_params(parse_params(text, f"presets/{name}.yaml"), f"presets/{name}.yaml")
    return text


def current_preset(root: Path) -> str | None:
    """The preset that params.yaml equals, byte for byte; None if it was edited."""
    text = (root / "params.yaml").read_text()
    return next((name for name in list_presets(root) if (root / "presets" / f"{name}.yaml").read_text() == text), None)


def use_preset(root: Path, name: str) -> None:
    """Copy a preset over params.yaml, unless that would lose edits that are written nowhere else."""
    text = preset_text(root, name)
    path = root / "params.yaml"
    if path.is_file() and current_preset(root) is None and path.read_text() != _committed(root):
        raise PresetRefused(
            "params.yaml holds edits that are in no preset and in no commit; they would be lost. "
            "Keep them as a preset of your own: cp params.yaml presets/mine.yaml, or commit them: git commit params.yaml. "
            "Drop them: git checkout params.yaml"
        )
    write_atomic(path, text)


def _committed(root: Path) -> str | None:
    """params.yaml as of the last commit, if there is one."""
    done = subprocess.run(["git", "show", "HEAD:./params.yaml"], cwd=root, capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else None
