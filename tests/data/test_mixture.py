from collections import Counter

import pytest

from data.config import MixtureConfig
from data.mixture import TaskStream, cycle, part_counts, permuted, resolve_mixture, task_counts


@pytest.mark.parametrize("size", [1, 2, 3, 7, 97, 1009])
def test_the_order_of_a_part_is_a_permutation_for_any_size(size):
    for key in (0, 1, 2**63 - 1):
        assert sorted(permuted(position, size, key) for position in range(size)) == list(range(size))


def test_the_order_is_another_one_for_another_key_and_is_not_the_plain_one():
    orders = {tuple(permuted(position, 97, key) for position in range(97)) for key in range(20)}
    assert len(orders) == 20
    assert tuple(range(97)) not in orders


def test_a_permutation_sends_every_place_about_everywhere():
    """Over 4000 keys each of 8 rows comes to the first place 500 times, give or take five standard errors."""
    first = Counter(permuted(0, 8, key * 0x9E3779B97F4A7C15 % 2**63) for key in range(4000))
    assert len(first) == 8
    assert all(abs(times - 500) < 105 for times in first.values())


def stream_of(*parts: tuple[str, float, dict[str, int], list[int]], seed: int = 7) -> TaskStream:
    """A task fed by (name, weight, samples of each size, rows taken out)."""
    entries = [
        {
            "part": name,
            "weight": weight,
            "samples": sum(sizes.values()) - len(gone),
            "buckets": [{"bucket": bucket, "samples": samples} for bucket, samples in sorted(sizes.items())],
            "removed": gone,
        }
        for name, weight, sizes, gone in parts
    ]
    return TaskStream({"seed": seed, "tasks": {"text_to_image": entries}}, "text_to_image")


PARTS = (
    ("captions", 2.0, {"64x64": 17, "96x32": 6}, [0, 3, 18]),
    ("relations", 1.0, {"64x64": 7}, []),
    ("words", 0.5, {"32x96": 2, "64x64": 3}, []),
)


def test_every_epoch_of_every_part_and_size_holds_each_row_once():
    """Three parts of 2 : 1 : 0.5, prime sizes, three shapes, rows taken out: none of the rest is missed or doubled, epoch after epoch."""
    visits: dict[tuple[str, str], list[int]] = {}
    stream = stream_of(*PARTS)
    for n in range(700):
        bucket, addresses = stream.batch(n, 6)
        assert len(addresses) == 6
        for part, row in addresses:
            visits.setdefault((part, bucket), []).append(row)
    expected = {
        ("captions", "64x64"): [row for row in range(17) if row not in (0, 3)],
        ("captions", "96x32"): [row for row in range(17, 23) if row != 18],
        ("relations", "64x64"): list(range(7)),
        ("words", "32x96"): [0, 1],
        ("words", "64x64"): [2, 3, 4],
    }
    assert visits.keys() == expected.keys()
    for group, rows in expected.items():
        epochs = [visits[group][start : start + len(rows)] for start in range(0, len(visits[group]) - len(rows) + 1, len(rows))]
        assert len(epochs) > 10
        assert all(sorted(epoch) == rows for epoch in epochs)
        assert len(rows) < 5 or len({tuple(epoch) for epoch in epochs}) > 1, "every epoch in one order"


def test_another_seed_is_another_order_of_the_same_rows():
    orders = [[stream_of(("own", 1.0, {"64x64": 31}, []), seed=seed).batch(n, 31)[1] for n in range(2)] for seed in (7, 7, 8)]
    assert orders[0] == orders[1] != orders[2]
    assert all(sorted(epoch) == [("own", row) for row in range(31)] for order in orders for epoch in order)


def test_every_prefix_of_a_task_holds_the_weights_and_the_sizes():
    """Shares are weights between parts and samples between the sizes of a part; no prefix strays by more than a batch a level."""
    stream, parts, shapes = stream_of(*PARTS), Counter(), Counter()
    of_shape = {"64x64": 2 * 15 / 20 + 1 + 0.5 * 3 / 5, "96x32": 2 * 5 / 20, "32x96": 0.5 * 2 / 5}
    for n in range(400):
        bucket, addresses = stream.batch(n, 6)
        shapes[bucket] += 1
        parts.update(part for part, _ in addresses)
        for shape, weight in of_shape.items():
            assert abs(shapes[shape] - weight / 3.5 * (n + 1)) <= 1.5
        for part, share in {"captions": 2 / 3.5, "relations": 1 / 3.5, "words": 0.5 / 3.5}.items():
            assert abs(parts[part] - share * 6 * (n + 1)) <= 6 * 2.5


def test_a_cycle_holds_the_exact_ratio(mixture):
    assert cycle(mixture) == ["image_edit", "text_to_image", "text_to_image", "text_to_image"]


def test_a_mixture_names_its_datasets_and_changes_its_hash_with_them(shards, mixture):
    again = resolve_mixture(
        "sft", MixtureConfig(seed=11, ratio=mixture["ratio"], parts={"words": 0.5, "edits": 1, "relations": 1, "captions": 2}), shards
    )
    assert again == mixture, "the order of keys in params.yaml changed the mixture"
    other = resolve_mixture("sft", MixtureConfig(seed=12, ratio=mixture["ratio"], parts={"captions": 1, "edits": 1}), shards)
    assert other["mixture_hash"] != mixture["mixture_hash"]


def test_a_part_that_is_not_there_is_refused_by_key(shards):
    config = MixtureConfig(seed=1, ratio={"text_to_image": 1}, parts={"captions": 1, "caption": 1})
    with pytest.raises(FileNotFoundError, match=r"mixture\.sft\.parts: 'caption' .*dvc repro shards@caption"):
        resolve_mixture("sft", config, shards)


def test_a_task_that_no_part_feeds_is_refused_by_key(shards):
    config = MixtureConfig(seed=1, ratio={"image_edit": 1, "text_to_image": 1}, parts={"captions": 1, "edits": 0})
    with pytest.raises(ValueError, match=r"mixture\.sft: ratio\.image_edit is 1, but the weights of its image_edit parts sum to 0"):
        resolve_mixture("sft", config, shards)


def test_counts_of_tasks_and_parts_are_those_of_the_stream_itself():
    parts = [
        {"part": name, "weight": weight, "samples": 50, "buckets": [{"bucket": "64x64", "samples": 50}], "removed": []}
        for name, weight in (("captions", 3.0), ("words", 1.0))
    ]
    mixture = {"seed": 7, "ratio": {"image_edit": 1, "text_to_image": 2}, "tasks": {"image_edit": parts[:1], "text_to_image": parts}}
    tasks = cycle(mixture)
    for n in range(10):
        seen = Counter(tasks[i % len(tasks)] for i in range(n))
        assert task_counts(mixture, n) == {task: seen[task] for task in mixture["tasks"]}
    assert part_counts(mixture, 400) == {"image_edit": {"captions": 400}, "text_to_image": {"captions": 300, "words": 100}}
