"""Whose weights SFT begins with: alignment's, or a copy of the champion's."""

import os
import shutil
from pathlib import Path

import yaml

from runtime.exits import Plain
from runtime.files import publish_folder, write_atomic, write_json
from runtime.stage import CHAMPION


class CannotStart(Plain):
    """params.yaml is laid out so that the key can't be found; nothing was changed."""


def copy_champion(root: Path, pipeline: Path, version: str, digest: str) -> None:
    """Put a registered pipeline folder where SFT looks for it. It stays as it is whoever becomes champion later."""
    temporary = root / "outputs" / f".champion.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(pipeline, temporary / "model")
    write_json(temporary / "version.json", {"version": version, "model_digest": digest})
    publish_folder(temporary, root / CHAMPION)


def set_start(params: Path, start: str) -> None:
    """Write `sft.start`; every other byte of the file stays.

    Raises:
        CannotStart: naming the line to write by hand.
    """
    text = params.read_text()
    wanted = yaml.safe_load(text)
    before = wanted["sft"]["start"]
    wanted["sft"]["start"] = start
    made = text.replace(f"\nsft:\n  start: {before}\n", f"\nsft:\n  start: {start}\n")
    if yaml.safe_load(made) != wanted:
        raise CannotStart(f"{params.name} is laid out in a way of its own. Write under sft:\n  start: {start}")
    write_atomic(params, made)
