"""A part of one's own: from a folder or a table to lines of params.yaml, after a look at what a build makes of it."""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from data.build import build_part
from data.config import LANDED, DataConfig, PartConfig, SourceKind, Task
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


def landed_part(root: Path, landing: str | None, name: str, parts: Mapping[str, PartConfig], snapshot: str) -> PartConfig:
    """The part, reading the newly landed `snapshot` in place of the one that it read, its content pinned.

    Raises:
        CannotAdd: no folder is set for landing, nothing landed under that name, or the part is not one that reads from there.
    """
    if landing is None:
        raise CannotAdd("retrain.landing: null in params.yaml; write the folder there in which new data lands as PART/SNAPSHOT/.")
    base = (root / landing / name).resolve()
    if not (base / snapshot / LANDED).is_file():
        raise CannotAdd(f"{base / snapshot}: has no {LANDED}; it is written last, once all files of the snapshot are there.")
    if name not in parts:
        raise CannotAdd(
            f"data.parts: has no {name!r}. Make it one with its first snapshot, then later ones follow by themselves: "
            f"deepgen data add {base / snapshot} --name {name} --task ... --licence ..."
        )
    part, moved = parts[name], {}
    for key in ("path", "images"):
        value = getattr(part, key)
        place = (root / value).resolve() if value else root
        if place.is_relative_to(base) and place != base:
            place = base.joinpath(snapshot, *place.relative_to(base).parts[1:])
            moved[key] = str(place) if Path(value).is_absolute() else os.path.relpath(place, root.resolve())
    if "path" not in moved:
        raise CannotAdd(f"data.parts.{name}.path: {part.path!r} is no snapshot in {base}; write one there first, and pin its content.")
    part = part.model_copy(update=moved)
    return part.model_copy(update={"content": content_digest(part, root)})


def change_in_params(params: Path, name: str, part: PartConfig) -> None:
    """Write where the part reads and what is there; every other byte of the file stays.

    Raises:
        CannotAdd: the file is laid out so that the place can't be found; what to write by hand is named.
    """
    text = params.read_text()
    wanted = yaml.safe_load(text)
    values, lines = wanted["data"]["parts"][name], text.split("\n")
    new = {key: getattr(part, key) for key in ("path", "images", "content") if getattr(part, key) != values.get(key)}
    try:
        at = _find(lines, ("data:", "  parts:", f"    {name}: {{"))
        for key, value in new.items():
            lines[at] = lines[at].replace(f"{key}: {values.get(key)}", f"{key}: {value}", 1)
    except LookupError:
        lines = []
    values |= new
    made = "\n".join(lines)
    if yaml.safe_load(made) != wanted:
        told = "\n".join(f"  {key}: {value}" for key, value in new.items())
        raise CannotAdd(f"{params.name} is laid out in a way of its own. Write under data.parts.{name}:\n{told}")
    write_atomic(params, made)


def _find(lines: list[str], beginnings: tuple[str, ...]) -> int:
    """The line that begins with the last of `beginnings`, under those before it. Raises LookupError."""
    at = -1
    for beginning in beginnings:
        at = next((i for i in range(at + 1, len(lines)) if lines[i].startswith(beginning)), -1)
        if at < 0:
            raise LookupError(beginning)
    return at
