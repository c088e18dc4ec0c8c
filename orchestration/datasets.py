"""Parts and recipe as promotion and retraining see them: by dataset id, by samples, by digest."""

from pathlib import Path

from runtime.files import sha256_json
from runtime.params import Params, parse_params
from runtime.published import read_manifest, verify_part
from runtime.recipe import load_stages, look_up


def shards_folder(root: Path, part: str) -> Path:
    return root / "outputs" / "shards" / part


def dataset_ids(root: Path, params: Params) -> dict[str, str]:
    """Part -> dataset id, for every part that has a manifest."""
    parts = [part for part in params.data.parts if (shards_folder(root, part) / "manifest.json").is_file()]
    return {part: read_manifest(shards_folder(root, part))["dataset_id"] for part in parts}


def training_samples(root: Path, params: Params) -> int:
    """Samples in the parts that were built for training."""
    parts = [part for part in dataset_ids(root, params) if params.data.parts[part].split == "train"]
    return sum(read_manifest(shards_folder(root, part))["samples"] for part in parts)


def recipe_digest(root: Path) -> str:
    """Digest of the params that the stages beyond the shards read. The rest of params.yaml, notices say, makes no other model; and what
    the parts hold is told by their dataset ids."""
    values = parse_params((root / "params.yaml").read_text())
    keys = {key for stage in load_stages(root, values).values() if stage.group != "shards" for key in stage.params}
    return sha256_json({key: look_up(values, key) for key in keys})


def evaluation_set_digest(root: Path, params: Params) -> str:
    """Digest of the evaluation set as it lies, in a store too: each shard is checked by sha256."""
    return sha256_json({part: verify_part(shards_folder(root, part))["dataset_id"] for part in params.evaluation.parts})
