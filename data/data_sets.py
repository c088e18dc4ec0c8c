"""Parts that hold a data set of the catalogue: whether they agree with its entry, what is fetched for them, and where that lies.

A catalogue and its parts are joined here and nowhere else: before a fetch, when a run starts, and again when a stage does.
"""

import difflib
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from data.catalog import Catalog, DataSet, Stage
from data.config import DRAWN_SIZE, SETTINGS, DataConfig, PartConfig
from data.pinning import OtherContent
from runtime.fetched import FetchedFile, Wanted, fetched_files
from runtime.files import sha256_file
from runtime.params import Params, ParamsError

PLACE = "data/catalog.yaml data_sets"
PROMPTS = "has prompts and no images: no part can hold it"


def wants(catalog: Catalog, name: str) -> list[Wanted]:
    """The repositories of data set `name`: the first under its own name, further ones as NAME-2, NAME-3."""
    data_set = catalog.data_sets[name]
    licence = None if data_set.licence == "unknown" else data_set.licence
    place = f"{PLACE}.{name}"
    names = [name, *(f"{name}-{number}" for number in range(2, len(data_set.hub) + 1))]
    return [
        Wanted(called, hub.repo, "dataset", hub.revision, licence, revision_in=f"{place}.hub", licence_in=f"{place}.licence")
        for called, hub in zip(names, data_set.hub, strict=True)
    ]


def disagreements(part: PartConfig, catalog: Catalog) -> list[str]:
    """Where a part says something else than the entry it names. A licence that nobody has looked up is a reason of `Catalog.refusals`."""
    name = str(part.data_set)
    if name not in catalog.data_sets:
        near = difflib.get_close_matches(name, catalog.data_sets, 1)
        return [f"data_set: {name!r} given, which {PLACE} lacks{f'; did you mean {near[0]!r}?' if near else ''}"]
    entry = catalog.data_sets[name]
    expected = {"source": entry.format, "task": entry.task, "category": entry.category, "licence": entry.licence}
    if entry.format == "prompts":
        return [f"data_set: {name!r} {PROMPTS}"]
    if entry.licence == "unknown":
        del expected["licence"]
    return [
        f"{key}: {getattr(part, key)!r} given; {PLACE}.{name} says {value!r}"
        for key, value in expected.items()
        if getattr(part, key) != value
    ]


def check_parts(data: DataConfig, catalog: Catalog) -> None:
    """Every part that names a data set agrees with its entry, and the entry may be built.

    Raises:
        ParamsError: a line a problem, the reasons of a refused entry among them.
    """
    _refuse(data, catalog, lambda entry: True)


def wanted_by_parts(data: DataConfig, catalog: Catalog) -> list[Wanted]:
    """What is to be fetched for the parts, each data set once. A revision or licence that nobody wrote down is None.

    Raises:
        ParamsError: a part differs from its entry, or the entry names nothing that could be fetched.
    """
    _refuse(data, catalog, lambda entry: not entry.hub)
    names = dict.fromkeys(part.data_set for part in data.parts.values() if part.data_set is not None)
    return [wanted for name in names for wanted in wants(catalog, name)]


def _refuse(data: DataConfig, catalog: Catalog, judged: Callable[[DataSet], bool]) -> None:
    lines = []
    for name, part in data.parts.items():
        if part.data_set is None:
            continue
        problems = disagreements(part, catalog)
        entry = catalog.data_sets.get(part.data_set)
        if entry is not None and judged(entry):
            problems += [f"data_set: {PLACE}.{part.data_set} is refused: {reason}" for reason in catalog.refusals(part.data_set)]
        lines += [f"  data.parts.{name}.{problem}" for problem in problems]
    if lines:
        raise ParamsError("\n".join(["params.yaml and the catalogue don't fit:", *lines, "Nothing was started."]))


def located(name: str, params: Params, catalog: Catalog, root: Path) -> DataConfig:
    """`params.data`, where part `name` reads the fetched files of its data set. A part without one, or with absolute paths, stays.

    Of several repositories the first one's folder is where `path` and `images` start; all have to be there.

    Raises:
        FileNotFoundError: naming what was not fetched, and the command that brings it.
        OtherContent: a file is not the one that was published.
    """
    part = params.data.parts[name]
    given = {"path": part.path or ".", "images": part.images}
    repositories = wants(catalog, part.data_set) if part.data_set is not None else []
    if not repositories or all(path is None or Path(path).is_absolute() for path in given.values()):
        return params.data
    found = {wanted.name: fetched_files(root, wanted) for wanted in repositories}
    if lacking := [wanted for wanted in repositories if found[wanted.name] is None]:
        lines = [f"  {wanted.name}: {wanted.repo} at {wanted.revision}, expected in {wanted.folder}" for wanted in lacking]
        command = _fetch_command(root, params.preset, lacking)
        raise FileNotFoundError("\n".join([f"data.parts.{name} reads {part.data_set}, but this machine lacks", *lines, command]))
    for wanted in repositories:
        _check_published(root, wanted, found[wanted.name] or {})
    paths = {key: str(repositories[0].folder / path) for key, path in given.items() if path is not None}
    return params.data.model_copy(update={"parts": params.data.parts | {name: part.model_copy(update=paths)}})


def _fetch_command(root: Path, preset: str, lacking: list[Wanted]) -> str:
    """With the preset's name where params.yaml is that preset; an edited params.yaml is what `deepgen fetch` reads by itself."""
    file = root / "presets" / f"{preset}.yaml"
    whose = f" --preset {preset}" if file.is_file() and file.read_bytes() == (root / "params.yaml").read_bytes() else ""
    return f"Bring it with `deepgen fetch{whose}{''.join(f' --only {wanted.name}' for wanted in lacking)}`."


def _check_published(root: Path, wanted: Wanted, files: dict[str, FetchedFile]) -> None:
    folder = root / wanted.folder
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name not in files:
            if path.name.startswith(".") and path.suffix == ".part":  # a download that was broken off
                continue
            raise OtherContent(
                f"{path}: {wanted.repo} at {wanted.revision} has no such file; move it: what is made of a set lies elsewhere."
            )
        if sha256_file(path) != files[name].sha256:
            raise OtherContent(
                f"{path}: expected sha256 {files[name].sha256[:12]}...; delete it, then `deepgen fetch --only {wanted.name}`."
            )


def params_text(catalog: Catalog, stage: Stage, seed: int) -> str:
    """`data.parts` and `mixture.STAGE` of params.yaml as YAML: one part for each set that can be read, comments for the others.

    Weights are the shares of the catalogue, an unreleased set's share falling to its stand-in. A task none of whose sets can be read has
    ratio 0.
    """
    weights: dict[str, float] = defaultdict(float)
    notes: dict[str, list[str]] = defaultdict(list)
    left_out = []
    for name, share in catalog.shares(stage).items():
        read = catalog.data_sets[name].stand_in or name
        reasons = [PROMPTS] if catalog.data_sets[read].format == "prompts" else catalog.refusals(read)
        if reasons:
            told = name if read == name else f"{name}: unreleased; its stand-in {read}"
            left_out.append(f"# {told}: {'; '.join(reasons)}")
            continue
        weights[read] += share
        notes[read] += [f"stands in for {name}"] if read != name else []
    lines = [f"# What {stage} reads of data/catalog.yaml: parts to stand beside those of params.yaml, and a mixture in place of its own."]
    lines += ["# Left out:", *left_out] if left_out else []
    if not weights:
        return "\n".join([*lines, f"# No set of {stage} can be read yet."])
    lines += ["data:", "  parts:"]
    for name in weights:
        part = _part_of(name, catalog.data_sets[name])
        if part.source == "drawn":
            notes[name].append(f"drawn at {DRAWN_SIZE} pixels a side, which data.image_size must then be")
        lines += [f"    # {note}" for note in notes[name]]
        lines.append(f"    {name}: {_flow(part.model_dump(mode='json', exclude_defaults=True))}")
    fed = {catalog.data_sets[name].task for name in weights}
    ratio = catalog.mixtures[stage].ratio
    lines += ["mixture:", f"  {stage}:", f"    seed: {seed}"]
    lines += [
        f"    # {task}: {times} in the catalogue, but none of its sets can be read"
        for task, times in ratio.items()
        if times and task not in fed
    ]
    lines.append(f"    ratio: {_flow({task: times if task in fed else 0 for task, times in ratio.items()})}")
    lines.append(f"    parts: {_flow({name: float(f'{weight:.6g}') for name, weight in weights.items()})}")
    return "\n".join(lines)


def _part_of(name: str, entry: DataSet) -> PartConfig:
    values: dict[str, Any] = {"data_set": name, "source": entry.format, "task": entry.task, "category": entry.category}
    values |= {"split": "train", "licence": entry.licence}
    if entry.caption_key and "caption_field" in SETTINGS[entry.format]:
        values["caption_field"] = entry.caption_key
    if entry.format == "drawn":
        values |= {"samples": entry.count} | ({"kinds": {"word": 1.0}} if entry.category == "text_rendering" else {})
    return PartConfig.model_validate(values)


def _flow(value: dict[str, Any]) -> str:
    return str(yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False)).strip()
