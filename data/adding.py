"""A part of one's own: from a folder or a table to lines of params.yaml, after a look at what a build makes of it."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from data.build import build_part
from data.config import DataConfig, PartConfig, SourceKind, Task
from data.loader import read_part
from data.pictures import save_facts, save_samples
from data.pinning import content_digest
from runtime.exits import Plain
from runtime.files import write_atomic

TABLES = {".jsonl", ".json", ".csv", ".tsv", ".parquet"}


class CannotAdd(Plain):
    """The part can't be added as asked; params.yaml is as it was."""


def source_of(path: Path) -> SourceKind:
    """What reads `path`: a folder of images with captions or edit triplets, a table, or tars.

    Raises:
        CannotAdd: nothing does.
    """
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    if any(file.suffix == ".tar" for file in files):
        return "webdataset"
    if path.is_dir():
        return "folder"
    if path.suffix in TABLES:
        return "table"
    raise CannotAdd(f"{path}: expected a folder of images with captions, tars, or a table ({', '.join(sorted(TABLES))}); came neither.")


def try_part(
    root: Path, data: DataConfig, name: str, part: PartConfig, folder: Path, on_records: Callable[[int], None]
) -> tuple[dict[str, Any], list[Path]]:
    """Build the part aside, under the rules of params.yaml; (manifest, pictures). `folder` is emptied first and keeps only the pictures.

    Raises:
        CannotAdd: not a single record would be written.
    """
    shutil.rmtree(folder, ignore_errors=True)
    trial = data.model_copy(update={"parts": data.parts | {name: part}})
    manifest = build_part(name, trial, folder / "part", root, on_records=on_records)
    pictures = [folder / "facts.png"]
    save_facts(folder / "part", pictures[0])
    if manifest["samples"] == 0:
        raise CannotAdd(f"{part.path}: of {manifest['counts']['input']} records none would be written: {manifest['reasons']}.")
    pictures.append(folder / "samples.png")
    save_samples(list(read_part(folder / "part", 24)), pictures[1])
    shutil.move(folder / "part" / "set_aside.parquet", folder / "set_aside.parquet")
    shutil.rmtree(folder / "part")
    return manifest, pictures


def described(root: Path, path: Path, task: Task, licence: str, columns: dict[str, str] | None) -> PartConfig:
    """The part as params.yaml will hold it, its content pinned."""
    place = path.resolve()
    shown = place.relative_to(root) if place.is_relative_to(root) else place
    values: dict[str, Any] = {"source": source_of(path), "task": task, "split": "train", "licence": licence, "path": str(shown)}
    part = PartConfig.model_validate(values | ({"columns": columns} if columns else {}))
    return part.model_copy(update={"content": content_digest(part, root)})


def add_to_params(params: Path, name: str, part: PartConfig, stage: str, weight: float) -> None:
    """Write the part under data.parts, and into the mixture of `stage`; every other byte of the file stays.

    Raises:
        CannotAdd: the name is taken, or the file is laid out so that the place can't be found; the lines to write by hand are named.
    """
    text = params.read_text()
    before = yaml.safe_load(text)
    if name in before["data"]["parts"]:
        raise CannotAdd(f"data.parts: {name!r} is there already; choose another --name, or change the part in {params.name}.")
    values = part.model_dump(mode="json", exclude_defaults=True)
    line = f"    {name}: {yaml.safe_dump(values, default_flow_style=True, width=10_000, sort_keys=False).strip()}"
    lines = text.splitlines()
    try:
        parts = _find(lines, ("data:", "  parts:"))
        end = next(i for i in range(parts + 1, len(lines) + 1) if i == len(lines) or not lines[i].startswith("    "))
        lines.insert(end, line)
        mixture = _find(lines, ("mixture:", f"  {stage}:", "    parts: {"))
        lines[mixture] = f"{lines[mixture].rstrip().removesuffix('}')}, {name}: {weight}}}"
    except LookupError:
        lines = []
    made = "\n".join(lines) + "\n"
    before["data"]["parts"][name] = values
    before["mixture"][stage]["parts"][name] = weight
    if not lines or yaml.safe_load(made) != before:
        raise CannotAdd(
            f"{params.name} is laid out in a way of its own. Write under data.parts:\n{line}\n"
            f"and under mixture.{stage}.parts: {name}: {weight}"
        )
    write_atomic(params, made)


def _find(lines: list[str], beginnings: tuple[str, ...]) -> int:
    """The line that begins with the last of `beginnings`, under those before it. Raises LookupError."""
    at = -1
    for beginning in beginnings:
        at = next((i for i in range(at + 1, len(lines)) if lines[i].startswith(beginning)), -1)
        if at < 0:
            raise LookupError(beginning)
    return at
