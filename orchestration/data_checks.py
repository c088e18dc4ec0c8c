"""What is measured of shards and mixtures: from their manifests, and from the files that these name."""

from pathlib import Path
from typing import Any

from orchestration.datasets import shards_folder
from runtime.files import read_json
from runtime.params import Params, load_params
from runtime.published import read_manifest, verify_part
from runtime.recipe import Stage

Outcome = tuple[list[str], dict[str, Any]]  # problems, and what was measured
TOLERANCE = 0.02  # of a share: how far from what was asked for
FEWEST_DECODED = 24


def check_shards(root: Path, stage: Stage) -> Outcome:
    """Every part that has been built, file by file; tars in a store by their sizes, for this runs after each build and fetches nothing."""
    samples = {part: verify_part(shards_folder(root, part), whole=False)["samples"] for part in _built(root)}
    return _none_built(samples), {f"samples {part}": n for part, n in samples.items()}


def check_decoded(root: Path, stage: Stage) -> Outcome:
    """Their bytes are those of the manifest, so what could be decoded then can be now."""
    manifests = _manifests(root)
    few = {part: m["decoded"] for part, m in manifests.items() if not m["decoded"] >= min(FEWEST_DECODED, m["samples"])}
    problems = [f"{part}: {n} of {manifests[part]['samples']} samples were decoded" for part, n in few.items()]
    return problems + _none_built(manifests), {f"decoded {part}": manifest["decoded"] for part, manifest in manifests.items()}


def check_counts(root: Path, stage: Stage) -> Outcome:
    """No record is lost or counted twice, and no two parts are one data set under two names."""
    manifests, problems = _manifests(root), []
    measured: dict[str, int] = {}
    owner: dict[str, str] = {}
    for part, manifest in manifests.items():
        counts = manifest["counts"]
        ended = sum(number for ending, number in counts.items() if ending != "input")
        if ended != counts["input"] or counts["written"] != manifest["samples"]:
            problems.append(f"{part}: {counts['input']} records, {ended} of them ended somewhere, {manifest['samples']} in its shards")
        measured |= {f"{ending} {part}": counts[ending] for ending in ("deduplicated", "dropped", "quarantined")}
        first = owner.setdefault(manifest["dataset_id"], part)
        if first != part:
            problems.append(f"{first} and {part} hold the same samples")
    return problems + _none_built(manifests), measured


def check_mixture(root: Path, stage: Stage) -> Outcome:
    config, mixture = _config(root, stage), read_json(root / stage.outs[0])
    rows = [row for task in mixture["tasks"].values() for row in task]
    problems = [] if rows else ["it holds no parts"]
    for row in rows:
        built = read_manifest(shards_folder(root, row["part"]))["dataset_id"]
        if row["dataset_id"] != built:
            problems.append(f"{row['part']}: the mixture names dataset {row['dataset_id'][:12]}, on disk is {built[:12]}")
    if {task: times for task, times in config.ratio.items() if times > 0} != mixture["ratio"]:
        problems.append(f"the mixture has ratio {mixture['ratio']}, params.yaml asks for {config.ratio}")
    return problems, {f"samples {row['part']}": row["samples"] for row in rows}


def check_shares(root: Path, stage: Stage) -> Outcome:
    config, mixture = _config(root, stage), read_json(root / stage.outs[0])
    realised, problems, measured = mixture["realised"], [], {}
    for task, rows in mixture["tasks"].items():
        total = sum(config.parts[row["part"]] for row in rows)
        for part in (row["part"] for row in rows):
            asked, got = config.parts[part] / total, realised["parts"][task][part] / realised["samples"]
            measured[f"share of {task}: {part}"] = got
            if not abs(got - asked) <= TOLERANCE:
                problems.append(f"{part}: {got:.3f} of the {task} samples, its weight asks for {asked:.3f}")
    return problems, measured


def check_leaks(root: Path, stage: Stage) -> Outcome:
    """The stage itself refuses, or takes out, what it finds; here it must have looked, and no part may be an evaluation set by its id."""
    params, mixture = load_params(root / "params.yaml"), read_json(root / stage.outs[0])
    evaluation = {read_manifest(shards_folder(root, part))["dataset_id"]: part for part in params.evaluation.parts}
    problems: list[str] = []
    measured: dict[str, Any] = {}
    for row in (row for task in mixture["tasks"].values() for row in task):
        part = row["part"]
        if row["dataset_id"] in evaluation:
            problems.append(f"{part} holds the samples of the evaluation part {evaluation[row['dataset_id']]}")
        if mixture["evaluation_leak"][part] == "allow":
            measured[f"leaks of {part}"] = "not looked for: allowed by evaluation_leak, or drawn"
        else:
            measured[f"leaks of {part}"] = mixture["taken_out"][part].get("evaluation_leak", 0)
    return problems, measured


def _config(root: Path, stage: Stage) -> Any:
    return load_params(root / "params.yaml").mixture[stage.key]  # type: ignore[index]


def _built(root: Path) -> list[str]:
    params: Params = load_params(root / "params.yaml")
    return [part for part in params.data.parts if shards_folder(root, part).is_dir()]


def _manifests(root: Path) -> dict[str, dict[str, Any]]:
    return {part: read_manifest(shards_folder(root, part)) for part in _built(root)}


def _none_built(parts: dict[str, Any]) -> list[str]:
    return [] if parts else ["no part has been built"]
