"""Images that look alike: a 64-bit hash of how one looks, and the pairs of hashes that almost agree."""

from typing import NamedTuple

import numpy as np

SIDE, LOW = 32, 8  # pixels a side looked at; lowest frequencies kept
COSINES = np.cos(np.pi * np.outer(np.arange(LOW), np.arange(SIDE) + 0.5) / SIDE)  # rows: the first DCT-II frequencies, not normalised
GRAY_LEVEL = (SIDE / 2) ** 2  # what a cosine of one gray level makes of a frequency
DETAIL = 8  # frequencies that must stand out, the mean among them; photographs have 14 and more
BANDS = 4
BAND_BITS = np.uint64(16)
HALF = np.uint64(1 << 32)
OUTER, MIDDLE_LOW = np.uint64(0xFFFF_0000_0000_FFFF), np.uint64(0xFFFF_0000)
MAX_DISTANCE = 2  # of four bands, two bits can spoil two: two others stay equal


class NearPairs(NamedTuple):
    """pairs int64 (n, 2), each lower row first, sorted; skipped: pairs of distinct hashes in crowded buckets left uncompared, 0 when
    none was missed. One that shares several buckets is counted in each, and may have been compared in another."""

    pairs: np.ndarray
    skipped: int


def perceptual_hash(gray: np.ndarray) -> int | None:
    """Gray (32, 32), 0..255 -> 64 bits: which of the lowest 8 x 8 DCT frequencies lie above their median, the lowest frequency first.

    None where hardly any of them stands out by a gray level: flat images, ramps and stripes would all be near each other. Rounded before
    they are compared, so that a hash is the same on every machine.
    """
    if gray.shape != (SIDE, SIDE):
        raise ValueError(f"gray: {gray.shape} given; expected ({SIDE}, {SIDE})")
    low = np.round(COSINES @ gray.astype(np.float64) @ COSINES.T, 3)
    if np.count_nonzero(np.abs(low) > GRAY_LEVEL) < DETAIL:
        return None
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
    ordered = np.sort(hashes)
    again = ordered[1:] == ordered[:-1]
    distinct = np.delete(ordered, np.flatnonzero(again) + 1) if again.any() else ordered
    found, skipped = [np.empty((0, 2), np.uint64)], 0
    for swapped, turned in ORDERS if distance else ():
        moved = np.sort(_move(distinct, swapped, turned)) if (swapped, turned) != (False, 0) else distinct
        near, missed = _neighbours(moved, distance, bucket_cap)
        found.append(_move_back(near, swapped, turned))
        skipped += missed
    return NearPairs(_rows_of(hashes, np.unique(ordered[1:][again]), np.concatenate(found)), skipped)


def _rows_of(hashes: np.ndarray, repeated: np.ndarray, near: np.ndarray) -> np.ndarray:
    """Pairs of rows, sorted, each once: of a repeated hash its first row with each other one, of two near hashes their first rows."""
    values = np.unique(np.concatenate([repeated, near.ravel()]))
    if not len(values):
        return np.empty((0, 2), np.int64)
    place = np.searchsorted(values, hashes).clip(max=len(values) - 1)
    rows = np.flatnonzero(values[place] == hashes)
    first = rows[np.unique(place[rows], return_index=True)[1]]  # of each value
    its_first = first[place[rows]]
    others = rows != its_first
    ends = np.sort(first[np.searchsorted(values, near)], axis=1)
    low, high = np.concatenate([np.stack([its_first[others], rows[others]], axis=1), ends]).T
    once = np.unique(low * len(hashes) + high)  # one number a pair: sorted many times faster than rows
    return np.stack(np.divmod(once, len(hashes)), axis=1)


# Which two of the four bands come first, all six choices: the middle two swapped or not, then all turned by so many bands.
ORDERS = ((False, 0), (False, 1), (False, 2), (False, 3), (True, 0), (True, 2))


def _neighbours(moved: np.ndarray, distance: int, bucket_cap: int) -> tuple[np.ndarray, int]:
    """Pairs (n, 2) of sorted hashes that are equal in their upper half and near, and the number of pairs beyond the cap."""
    found = [np.empty((0, 2), np.uint64)]
    at = np.flatnonzero((moved[1:] ^ moved[:-1]) < HALF)
    for step in range(1, bucket_cap + 1):  # each hash against the one `step` behind it, while both lie in one bucket
        if not len(at):
            return np.concatenate(found), 0
        apart = np.bitwise_count(moved[at] ^ moved[at + step])
        near = at[apart <= distance]
        found.append(np.stack([moved[near], moved[near + step]], axis=1))
        at = at[: np.searchsorted(at, len(moved) - step - 1)]
        at = at[(moved[at] ^ moved[at + step + 1]) < HALF]
    sizes = np.unique(moved >> np.uint64(32), return_counts=True)[1]
    beyond = np.maximum(sizes - bucket_cap, 0)
    return np.concatenate(found), int((beyond * (beyond - 1) // 2).sum())


def _move(hashes: np.ndarray, swapped: bool, turned: int) -> np.ndarray:
    """The same bits in another order of bands: distances stay, and sorting brings hashes together that agree in the first two."""
    return _turn(_swap(hashes) if swapped else hashes, turned)


def _move_back(hashes: np.ndarray, swapped: bool, turned: int) -> np.ndarray:
    turned_back = _turn(hashes, BANDS - turned)
    return _swap(turned_back) if swapped else turned_back


def _swap(hashes: np.ndarray) -> np.ndarray:
    """The two middle bands exchanged."""
    return hashes & OUTER | (hashes & MIDDLE_LOW) << BAND_BITS | hashes >> BAND_BITS & MIDDLE_LOW


def _turn(hashes: np.ndarray, bands: int) -> np.ndarray:
    """Turned by whole bands; what leaves at the top enters at the bottom."""
    by = BAND_BITS * np.uint64(bands % BANDS)
    return hashes << by | hashes >> (np.uint64(64) - by) if by else hashes


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
