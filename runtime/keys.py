"""Seeds named by what they are for, so that rank, worker and batch layout never change a draw."""

import hashlib


def seed_from(*parts: str | int | float) -> int:
    """63-bit seed of a purpose, e.g. `seed_from("noise", stage_seed, "sft", step, sample)`.

    The type is part of the name: `seed_from(1)` and `seed_from("1")` differ.
    """
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
