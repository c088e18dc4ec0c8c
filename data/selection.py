"""Which prepared records are written: each picture once. The first of a cluster stays; the others keep its name as their reason."""

from typing import Any

import numpy as np
import pyarrow as pa

from data.config import Deduplicate
from data.duplicates import keep_first, near_pairs
from data.records import Reason, Refused
from runtime.files import sha256_json


def find_duplicates(rows: pa.Table, policy: Deduplicate, distance: int) -> dict[int, Refused]:
    """Row number -> why it is not written, for every row that repeats an earlier one.

    Exact: the same pixels, and for an edit the same instruction too; of mere prompts the same words. Near: perceptual hashes at most
    `distance` bits apart; for an edit those of target and of the first source both.
    """
    if policy == "none" or len(rows) == 0:
        return {}
    images, names = rows["images"].to_pylist(), rows["source_id"].to_pylist()
    prompts, tasks = rows["prompt"].to_pylist(), rows["task"].to_pylist()
    first: dict[str, int] = {}
    refused: dict[int, Refused] = {}
    for row, (made, prompt, task) in enumerate(zip(images, prompts, tasks, strict=True)):
        identity = sha256_json([[image["pixel_hash"] for image in made], prompt if task == "image_edit" or not made else None])
        if (earlier := first.setdefault(identity, row)) != row:
            refused[row] = _refused(Reason.DUPLICATE, names[row], f"the {'pixels' if made else 'words'} of {names[earlier]}", made)
    if policy == "exact":
        return refused
    kept = np.array([row for row in range(len(rows)) if row not in refused])
    hashes = {end: np.array([images[row][place]["perceptual_hash"] for row in kept], np.uint64) for end, place in (("tgt", -1), ("src", 0))}
    pairs = near_pairs(hashes["tgt"], distance).pairs
    apart = np.bitwise_count(hashes["src"][pairs[:, 0]] ^ hashes["src"][pairs[:, 1]]) > distance
    edits = np.array([tasks[row] == "image_edit" for row in kept], bool)
    same_words = np.array([prompts[kept[a]] == prompts[kept[b]] for a, b in pairs], bool)
    pairs = pairs[~(edits[pairs[:, 0]] & (apart | ~same_words))]  # one photo edited in two ways is two samples
    for place, representative in enumerate(keep_first(pairs, len(kept))):
        if representative != place:
            row, earlier = int(kept[place]), int(kept[representative])
            refused[row] = _refused(Reason.NEAR_DUPLICATE, names[row], f"within {distance} bits of {names[earlier]}'s picture", images[row])
    return refused


def _refused(reason: Reason, source_id: str, message: str, images: list[dict[str, Any]]) -> Refused:
    return Refused(source_id, reason, "dedup", message, source_id, images[-1]["found_sha256"] if images else None)
