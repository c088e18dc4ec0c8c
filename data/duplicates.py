"""Images that look alike: a 64-bit hash of how one looks, and the pairs of hashes that almost agree."""

from itertools import combinations
from typing import NamedTuple

import numpy as np

SIDE, LOW = 32, 8  # pixels a side looked at; lowest frequencies kept
COSINES = np.cos(np.pi * np.outer(np.arange(LOW), np.arange(SIDE) + 0.5) / SIDE)  # rows: the first DCT-II frequencies, not normalised
BANDS = 4
BAND_BITS = np.uint64(16)
MAX_DISTANCE = 2  # of four bands, two bits can spoil two: two others stay equal


class NearPairs(NamedTuple):
    """pairs int64 (n, 2), each lower row first, sorted; skipped: pairs of distinct hashes in crowded buckets left uncompared, 0 when
    none was missed. One that shares several buckets is counted in each, and may have been compared in another."""

    pairs: np.ndarray
    skipped: int


def perceptual_hash(gray: np.ndarray) -> int:
    """Gray (32, 32), 0..255 -> 64 bits: which of the lowest 8 x 8 DCT frequencies lie above their median, the lowest frequency first.

    Rounded before they are compared, so that a flat image has one hash on every machine.
    """
    if gray.shape != (SIDE, SIDE):
        raise ValueError(f"gray: {gray.shape} given; expected ({SIDE}, {SIDE})")
    low = np.round(COSINES @ gray.astype(np.float64) @ COSINES.T, 3)
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")


def near_pairs(hashes: np.ndarray, distance: int = 2, bucket_cap: int = 256) -> NearPairs:
    """Rows whose hashes differ in at most `distance` bits.

    Rows of one hash are paired with its first row only, and only first rows are paired across hashes: the clusters are those of all
    pairs, and half a million flat white images make half a million pairs. Hashes that agree in two of four bands are neighbours in
    one of six sorted orders, so none is missed, unless more than `bucket_cap` hashes share two bands: there each is compared with the
    `bucket_cap` next to it.

    Args:
        hashes: uint64 (N,).
        distance: 0, 1 or 2; beyond that two equal bands are not certain.
    """
    if not 0 <= distance <= MAX_DISTANCE:
        raise ValueError(f"distance: {distance} given; allowed: 0 to {MAX_DISTANCE}, for which the search is complete")
    if hashes.dtype != np.uint64 or hashes.ndim != 1:
        raise ValueError(f"hashes: {hashes.dtype} {hashes.shape} given; expected uint64 (N,)")
    distinct, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    rows = np.arange(len(hashes))
    again = first[group] != rows
    found = [np.stack([first[group[again]], rows[again]], axis=1)]
    skipped = 0
    if distance:
        for bands in combinations(range(BANDS), 2):
            pairs, missed = _pairs_sharing(distinct, bands, distance, bucket_cap)
            found.append(np.sort(first[pairs], axis=1))
            skipped += missed
    low, high = np.concatenate(found).T
    once = np.unique(low * len(hashes) + high)  # one number a pair: sorted many times faster than rows
    return NearPairs(np.stack(np.divmod(once, max(len(hashes), 1)), axis=1), skipped)


def _pairs_sharing(distinct: np.ndarray, bands: tuple[int, int], distance: int, bucket_cap: int) -> tuple[np.ndarray, int]:
    """Positions (n, 2) of hashes that are equal in two bands and near, and the number of pairs beyond the cap."""
    moved = _bands_first(distinct, bands)
    order = np.argsort(moved)
    moved = moved[order]
    bucket = (moved >> np.uint64(32)).astype(np.uint32)
    found = [np.empty((0, 2), np.int64)]
    at = np.arange(len(moved))
    for step in range(1, bucket_cap + 1):  # each hash against the one `step` behind it, while both lie in one bucket
        at = at[: np.searchsorted(at, len(moved) - step)]
        at = at[bucket[at] == bucket[at + step]]
        if not len(at):
            return np.concatenate(found), 0
        near = at[np.bitwise_count(moved[at] ^ moved[at + step]) <= distance]
        found.append(np.stack([order[near], order[near + step]], axis=1))
    sizes = np.diff(np.flatnonzero(np.diff(bucket, prepend=~bucket[:1], append=~bucket[-1:])))
    beyond = np.maximum(sizes - bucket_cap, 0)
    return np.concatenate(found), int((beyond * (beyond - 1) // 2).sum())


def _bands_first(hashes: np.ndarray, bands: tuple[int, int]) -> np.ndarray:
    """The same bits with two bands moved to the top: distances stay, and sorting brings equal bands together."""
    moved = np.zeros_like(hashes)
    for band in (*bands, *(band for band in range(BANDS) if band not in bands)):
        moved = moved << BAND_BITS | hashes >> BAND_BITS * np.uint64(band) & np.uint64(0xFFFF)
    return moved


def keep_first(pairs: np.ndarray, rows: int) -> np.ndarray:
    """int64 (rows,): the row that stands for each row, the lowest of those that pairs connect to it; itself where none does."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    stands = np.arange(rows)
    paired, ends = np.unique(pairs, return_inverse=True)
    if len(paired):
        left, right = ends.reshape(-1, 2).T
        graph = coo_array((np.ones(len(left), np.bool_), (left, right)), shape=(len(paired), len(paired)))
        _, cluster = connected_components(graph, directed=False)
        lowest = np.unique(cluster, return_index=True)[1]  # `paired` ascends, so the first of a cluster is its lowest row
        stands[paired] = paired[lowest[cluster]]
    return stands
