"""Parts as promotion and retraining see them: by dataset id."""

from pathlib import Path

from runtime.files import sha256_json
from runtime.params import Params
from runtime.published import read_manifest, verify_part


def shards_folder(root: Path, part: str) -> Path:
    return root / "outputs" / "shards" / part


def dataset_ids(root: Path, params: Params) -> dict[str, str]:
    """Part -> dataset id, for every part that has a manifest."""
    parts = [part for part in params.data.parts if (shards_folder(root, part) / "manifest.json").is_file()]
    return {part: read_manifest(shards_folder(root, part))["dataset_id"] for part in parts}


def evaluation_set_digest(root: Path, params: Params) -> str:
    """Digest of the evaluation set as it lies, in a store too: each shard is checked by sha256."""
    return sha256_json({part: verify_part(shards_folder(root, part))["dataset_id"] for part in params.evaluation.parts})
