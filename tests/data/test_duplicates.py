import numpy as np
import pytest
from scipy.fft import dctn

from data.duplicates import keep_first, near_pairs, perceptual_hash


def with_copies(rows: int, seed: int = 0) -> np.ndarray:
    """Random hashes, and copies of some of them with 0 to 4 bits flipped."""
    dice = np.random.default_rng(seed)
    hashes = dice.integers(0, 2**64, rows, dtype=np.uint64)
    for flips in range(5):
        targets, sources = dice.choice(rows, (2, rows // 20), replace=False)
        copies = hashes[sources].copy()
        for bits in dice.permuted(np.tile(np.arange(64, dtype=np.uint64), (rows // 20, 1)), axis=1).T[:flips]:
            copies ^= np.uint64(1) << bits
        hashes[targets] = copies
    return hashes


def brute(hashes: np.ndarray, distance: int) -> np.ndarray:
    """Every pair (n, 2) of rows within `distance`, lower row first."""
    found = []
    for row in range(len(hashes) - 1):
        near = np.flatnonzero(np.bitwise_count(hashes[row + 1 :] ^ hashes[row]) <= distance)
        found.append(np.stack([np.full(len(near), row), near + row + 1], axis=1))
    return np.concatenate(found)


@pytest.mark.parametrize("distance", [0, 1, 2])
def test_no_pair_that_brute_force_finds_is_missed_and_none_is_invented(distance: int):
    hashes = np.unique(with_copies(12_000))
    np.random.default_rng(5).shuffle(hashes)
    pairs, skipped = near_pairs(hashes, distance)
    assert skipped == 0
    np.testing.assert_array_equal(pairs, brute(hashes, distance))


def test_clusters_are_those_of_all_pairs_when_hashes_repeat():
    hashes = with_copies(8_000, seed=1)
    everything = brute(hashes, 2)
    assert len(everything) > 900
    np.testing.assert_array_equal(keep_first(near_pairs(hashes).pairs, len(hashes)), keep_first(everything, len(hashes)))


def test_a_flood_of_equal_hashes_costs_one_pair_each():
    hashes = np.random.default_rng(2).integers(0, 2**64, 300_000, dtype=np.uint64)
    hashes[1000:] = hashes[7]
    pairs, skipped = near_pairs(hashes)
    assert len(pairs) == 299_000 and skipped == 0
    kept = np.flatnonzero(keep_first(pairs, len(hashes)) == np.arange(len(hashes)))
    np.testing.assert_array_equal(kept, np.arange(1000))


def test_a_crowded_bucket_is_capped_and_the_cap_is_told():
    dice = np.random.default_rng(3)
    crowd = dice.choice(2**32, 500, replace=False).astype(np.uint64)  # equal upper halves, so one order holds them all
    pairs, skipped = near_pairs(crowd, bucket_cap=100)
    assert skipped >= 399 * 400 // 2
    assert near_pairs(crowd, bucket_cap=499).skipped == 0
    three = np.arange(3, dtype=np.uint64)
    assert len(near_pairs(three, bucket_cap=2).pairs) == 3 and len(near_pairs(three, bucket_cap=1).pairs) == 2
    doubled = near_pairs(np.concatenate([crowd, crowd]), bucket_cap=1)
    standing = keep_first(doubled.pairs, 1000)
    assert (standing[500:] <= np.arange(500)).all(), "an equal hash was lost to the cap"


def test_pairs_are_sorted_rows_each_once():
    hashes = with_copies(5_000, seed=4)
    pairs = near_pairs(hashes).pairs
    assert (pairs[:, 0] < pairs[:, 1]).all()
    np.testing.assert_array_equal(pairs, np.unique(pairs, axis=0))
    assert near_pairs(np.empty(0, np.uint64)).pairs.shape == near_pairs(hashes[:1]).pairs.shape == (0, 2)


def test_a_search_that_would_be_incomplete_is_refused():
    with pytest.raises(ValueError, match="allowed: 0 to 2"):
        near_pairs(np.zeros(2, np.uint64), distance=3)
    with pytest.raises(ValueError, match="expected uint64"):
        near_pairs(np.zeros(2, np.int64))


def test_the_lowest_row_stands_for_its_cluster_whatever_the_order_of_pairs():
    pairs = np.array([[5, 9], [2, 5], [7, 8], [3, 9]])
    expected = [0, 1, 2, 2, 4, 2, 6, 7, 7, 2]
    assert keep_first(pairs, 10).tolist() == keep_first(pairs[::-1, ::-1], 10).tolist() == expected
    assert keep_first(np.empty((0, 2), np.int64), 3).tolist() == [0, 1, 2]


def test_the_hash_is_the_low_corner_of_a_dct_against_its_median():
    gray = np.random.default_rng(6).integers(0, 256, (32, 32), dtype=np.uint8)
    low = dctn(gray.astype(float), type=2)[:8, :8]
    expected = "".join("01"[int(bit)] for bit in (low > np.median(low)).ravel())
    assert f"{perceptual_hash(gray):064b}" == expected


def test_brightness_changes_no_hash():
    gray = np.random.default_rng(7).integers(0, 200, (32, 32), dtype=np.uint8)
    assert perceptual_hash(gray) == perceptual_hash(gray + 40)
    with pytest.raises(ValueError, match="expected \\(32, 32\\)"):
        perceptual_hash(gray[:8])


def test_pictures_of_next_to_nothing_have_no_hash_that_would_make_them_all_alike():
    ramp = np.tile(np.linspace(0, 255, 32), (32, 1))
    for gray in (np.full((32, 32), 77), ramp, ramp.T, np.tile(np.arange(32) // 4 % 2 * 255, (32, 1))):
        assert perceptual_hash(gray) is None
    square = np.zeros((32, 32))
    square[10:20, 10:20] = 255
    assert perceptual_hash(square) is not None
