"""Samples that lie in a part's tars and are not read: taken down, or in an evaluation set. Taken out at the index: no tar is rewritten."""

from pathlib import Path
from typing import Any

from data.config import DataConfig, MixtureConfig
from data.config import EvaluationLeak as LeakPolicy
from data.decontamination import EvaluationIndex, ImageHashes
from data.prompts import read_prompts
from data.records import Reason, Refused
from data.rows import read_table
from runtime.exits import Plain

TAKEDOWN = "takedown.txt"
COLUMNS = ["key", "source_id", "prompt", "images"]
EXAMPLES = 5


class EvaluationLeak(Plain):
    """Training samples are in an evaluation set, and the part does not say that they may be."""


def read_takedown(path: Path) -> set[str]:
    """Keys, source ids and sha256 of images as they were found, one a line; # begins a comment. A missing file takes nothing down."""
    if not path.is_file():
        return set()
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    return {line for line in lines if line}


def find_removed(stage: str, config: MixtureConfig, data: DataConfig, shards: Path, root: Path) -> dict[str, dict[int, Refused]]:
    """Part -> row -> why it is not read.

    Raises:
        EvaluationLeak: a part whose policy is fail holds samples of an evaluation set; the first few are named.
    """
    takedown = read_takedown(root / TAKEDOWN)
    names = [name for name, weight in config.parts.items() if weight > 0 and (shards / name).is_dir()]
    policies = {name: leak_policy(config, data, name) for name in names}
    index = evaluation_index(data, shards, root) if any(policy != "allow" for policy in policies.values()) else None
    removed: dict[str, dict[int, Refused]] = {}
    for name in names:
        policy = policies[name]
        if not takedown and policy == "allow":
            continue
        gone = removed[name] = {}
        leaks = []
        for row, sample in enumerate(read_table(shards / name / "rows.parquet", COLUMNS).to_pylist()):
            known = {sample["key"], sample["source_id"], *(image["found_sha256"] for image in sample["images"])}
            if hit := known & takedown:
                gone[row] = _refused(sample, Reason.TAKEDOWN, f"{hit.pop()} is in {TAKEDOWN}")
            elif index is not None and policy != "allow" and (found := index.leak(sample["prompt"], _hashes(sample))):
                gone[row] = _refused(sample, Reason.EVALUATION_LEAK, found)
                leaks.append(gone[row])
        if leaks and policy == "fail":
            shown = "\n".join(f"  {leak.source_id}: {leak.message}" for leak in leaks[:EXAMPLES])
            raise EvaluationLeak(
                f"mixture.{stage}.parts: {len(leaks)} samples of {name!r} are in an evaluation set:\n{shown}\n"
                f"Say in params.yaml what is to become of them: mixture.{stage}.evaluation_leak: {{{name}: remove}} (not read), or allow."
            )
    return removed


def find_contamination(
    mixture: dict[str, Any], config: MixtureConfig, data: DataConfig, shards: Path, root: Path
) -> dict[str, dict[str, int]]:
    """Evaluation set -> of how many prompts it is, and how many of its items are read from parts whose leaks the recipe allows by name:
    every score of such a set is to be marked with it. What a drawn part may repeat, unless it is named, marks nothing.

    Args:
        mixture: `config`, as `data.mixture.resolve_mixture` resolves it.
    """
    read = {part["part"]: set(part["removed"]) for parts in mixture["tasks"].values() for part in parts}
    parts = {name: gone for name, gone in read.items() if config.evaluation_leak.get(name) == "allow"}
    if not parts:
        return {}
    index = evaluation_index(data, shards, root)
    items: dict[str, set[str]] = {}
    for name, gone in parts.items():
        for row, sample in enumerate(read_table(shards / name / "rows.parquet", COLUMNS).to_pylist()):
            if row not in gone and (found := index.leak(sample["prompt"], _hashes(sample))):
                item = found.partition("]: ")[0]
                items.setdefault(item.rpartition("[")[0], set()).add(item)
    return {name: {"items": len(found), "of": index.prompts[name]} for name, found in sorted(items.items())}


def leak_policy(config: MixtureConfig, data: DataConfig, name: str) -> LeakPolicy:
    """What happens to samples of a part that are in an evaluation set; with allow they are not looked for."""
    return config.evaluation_leak.get(name, "allow" if data.parts[name].source == "drawn" else "fail")


def evaluation_index(data: DataConfig, shards: Path, root: Path) -> EvaluationIndex:
    """Prompts of `data.evaluation_prompts`, prompts and pictures of the parts whose split is evaluation.

    Raises:
        FileNotFoundError: an evaluation part is not built: nothing can be said to be clean of it.
    """
    prompts: dict[str, list[str]] = {path: read_prompts(root / path) for path in data.evaluation_prompts}
    images: dict[str, list[ImageHashes]] = {}
    for name, part in data.parts.items():
        if part.split != "evaluation":
            continue
        if not (shards / name / "rows.parquet").is_file():
            raise FileNotFoundError(
                f"{shards / name}: the evaluation part is not built, so no part can be checked against it; run `dvc repro shards@{name}`."
            )
        rows = read_table(shards / name / "rows.parquet", COLUMNS).to_pylist()
        prompts[name] = [row["prompt"] for row in rows]
        images[name] = [hashes for row in rows for hashes in _hashes(row)]
    return EvaluationIndex(prompts, images)


def _hashes(sample: dict[str, Any]) -> list[ImageHashes]:
    return [ImageHashes(image["pixel_hash"], image["perceptual_hash"]) for image in sample["images"]]


def _refused(sample: dict[str, Any], reason: Reason, message: str) -> Refused:
    return Refused(sample["source_id"], reason, "policy", message, sample["key"])
