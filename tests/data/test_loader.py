import hashlib
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.build import build_part
from data.config import DataConfig, ImageRules, MixtureConfig, PartConfig
from data.loader import Batch, Loader, OtherData
from data.mixture import resolve_mixture
from runtime.published import ShardMismatch
from tests.data.encoded import encode, texture

BATCH = 12  # divides by 1, 2, 3 and 4 ranks
STEPS = 7  # more than two cycles of the mixed stream, and past the end of its small parts


@pytest.fixture(scope="module")
def mixed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """(mixture, shards): drawn parts, and 31 pictures of three sizes, 13 and 11 and 7, of which two are taken out."""
    folder = tmp_path_factory.mktemp("mixed")
    for name in ("captions", "edits"):
        shutil.copytree(shards / name, folder / "shards" / name)
    (folder / "pictures").mkdir()
    for i, shape in enumerate([(64, 64)] * 13 + [(128, 32)] * 11 + [(32, 128)] * 7):
        (folder / "pictures" / f"{i:02d}.png").write_bytes(encode(texture(i, *shape)))
        (folder / "pictures" / f"{i:02d}.txt").write_text(f"texture number {i}")
    part = PartConfig(source="folder", task="text_to_image", split="train", licence="CC0-1.0", path="pictures", deduplicate="none")
    data = DataConfig(image_size=64, shard_samples=5, images=ImageRules(min_side=32), parts={"pictures": part})
    assert len(build_part("pictures", data, folder / "shards" / "pictures", folder)["buckets"]) == 3
    config = MixtureConfig(seed=5, ratio={"image_edit": 1, "text_to_image": 2}, parts={"captions": 1, "edits": 1, "pictures": 2})
    return resolve_mixture("sft", config, folder / "shards", {"pictures": [3, 20]}), folder / "shards"


def take(loader: Loader, number: int) -> list[Batch]:
    return list(islice(loader, number))


def test_every_cycle_of_micro_batches_holds_the_exact_ratio(mixture, shards):
    batches = take(Loader(mixture, shards, BATCH), 20)
    assert [batch.index for batch in batches] == list(range(20))
    for start in range(0, 20, 4):
        assert [batch.task for batch in batches[start : start + 4]] == ["image_edit", *["text_to_image"] * 3]


def test_a_batch_is_pixels_of_one_task(mixture, shards):
    edit, text = take(Loader(mixture, shards, BATCH), 2)
    assert edit.target_images.shape == edit.reference_images[0].shape == (BATCH, 64, 64, 3)
    assert edit.target_images.dtype == np.uint8
    assert (len(edit.reference_images), len(text.reference_images)) == (1, 0)
    assert len(edit.prompts) == len(edit.keys) == len(edit.scenes) == BATCH


def told(batch: Batch) -> list[tuple[Any, ...]]:
    """All that a batch says, a row a sample, with the sha256 of its pixels."""
    pixels = [
        hashlib.sha256(b"".join(images[i].tobytes() for images in (batch.target_images, *batch.reference_images))).hexdigest()
        for i in range(len(batch.keys))
    ]
    rows = zip(batch.positions, batch.keys, batch.prompts, pixels, strict=True)
    return [(batch.index, batch.task, batch.target_images.shape[1:], *row) for row in rows]


class Ranks:
    """The loaders of every rank of a run, and what they tell together."""

    def __init__(self, mixture: dict[str, Any], shards: Path, world_size: int, workers: int = 0, state: dict[str, Any] | None = None):
        self.loaders = [Loader(mixture, shards, BATCH, rank, world_size, workers=workers) for rank in range(world_size)]
        for loader in self.loaders if state else ():
            loader.restore(state)

    def __iter__(self) -> Iterator[list[tuple[Any, ...]]]:
        """Of each step the samples of all ranks, in their order. Every rank has its share of every step."""
        for batches in zip(*self.loaders, strict=True):
            assert {len(batch.keys) for batch in batches} == {BATCH // len(self.loaders)}
            yield [row for batch in batches for row in told(batch)]

    def take(self, number: int) -> list[list[tuple[Any, ...]]]:
        return list(islice(self, number))

    def state(self) -> dict[str, Any]:
        """As any of the ranks would save it."""
        first, *others = [loader.state() for loader in self.loaders]
        assert all(other == first for other in others)
        return first


def walk(mixed: tuple[dict[str, Any], Path], world_size: int, workers: int) -> tuple[list[list[tuple[Any, ...]]], list[dict[str, Any]]]:
    """The first steps, and the state before each."""
    ranks, steps = Ranks(*mixed, world_size, workers), []
    states = [ranks.state()]
    for step in islice(ranks, STEPS):
        steps.append(step)
        states.append(ranks.state())
    return steps, states


@pytest.fixture(scope="module")
def whole(mixed) -> list[list[tuple[Any, ...]]]:
    """The stream that was never stopped, on one rank and without workers."""
    steps = Ranks(*mixed, world_size=1).take(STEPS)
    assert [row[3] for step in steps for row in step] == list(range(STEPS * BATCH))
    return steps


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_a_stream_stopped_anywhere_goes_on_as_if_it_had_not(mixed, whole, world_size, workers):
    """Keys, prompts and pixels of all ranks together; batches that workers made ahead are no part of the state."""
    steps, states = walk(mixed, world_size, workers)
    assert steps == whole
    for stop, state in enumerate(states):
        assert Ranks(*mixed, world_size, workers, state).take(STEPS - stop) == whole[stop:], f"stopped after {stop}"


@pytest.mark.parametrize("before", [1, 2, 3, 4])
def test_a_run_stopped_on_some_ranks_goes_on_with_more_or_fewer(mixed, whole, before):
    for stop, state in enumerate(walk(mixed, before, 1)[1]):
        for after in {1, 2, 3, 4} - {before}:
            left = min(3, STEPS - stop)
            assert Ranks(*mixed, after, stop % 3, state).take(left) == whole[stop : stop + left], f"stopped after {stop}, on with {after}"


@pytest.mark.parametrize("samples, removed", [(13, []), (31, []), (31, [0, 7, 30]), (97, [])])
def test_each_sample_of_a_set_of_one_size_comes_once_an_epoch(tmp_path, samples, removed):
    """As many batches as there are samples are as many epochs as a batch has samples, whatever divides what."""
    part = PartConfig(source="drawn", task="text_to_image", split="train", samples=samples, seed=1, licence="CC0-1.0")
    data = DataConfig(image_size=64, shard_samples=40, images=ImageRules(min_side=32), parts={"own": part})
    build_part("own", data, tmp_path / "own", tmp_path)
    mixture = resolve_mixture("sft", MixtureConfig(seed=5, ratio={"text_to_image": 1}, parts={"own": 1}), tmp_path, {"own": removed})
    kept = samples - len(removed)
    for world_size in (1, 2, 3, 4):
        keys = [row[4] for step in Ranks(mixture, tmp_path, world_size).take(kept) for row in step]
        epochs = [keys[start : start + kept] for start in range(0, len(keys), kept)]
        assert len(epochs) == BATCH and len(set(keys)) == kept
        assert all(len(set(epoch)) == kept for epoch in epochs)


def test_each_sample_comes_once_an_epoch_of_its_size(mixed):
    mixture, folder = mixed
    config = MixtureConfig(seed=6, ratio={"text_to_image": 1}, parts={"pictures": 1})
    steps = Ranks(resolve_mixture("sft", config, folder, {"pictures": [3, 20]}), folder, 3).take(60)
    for size, kept in (((64, 64), 12), ((32, 128), 10), ((128, 32), 7)):
        keys = [row[4] for step in steps for row in step if row[2][:2] == size]
        epochs = [keys[start : start + kept] for start in range(0, len(keys) - kept + 1, kept)]
        assert len(epochs) > 10 and len(set(keys)) == kept
        assert all(len(set(epoch)) == kept for epoch in epochs)


def test_a_position_of_another_mixture_is_refused_and_both_are_named(mixture, shards):
    config = MixtureConfig(seed=99, ratio={"text_to_image": 1}, parts={"captions": 1})
    other = Loader(resolve_mixture("sft", config, shards), shards, BATCH)
    with pytest.raises(OtherData) as refused:
        Loader(mixture, shards, BATCH).restore(other.state())
    assert mixture["mixture_hash"] in str(refused.value)
    assert other.mixture["mixture_hash"] in str(refused.value)


def test_shards_rebuilt_since_the_mixture_was_made_are_refused(mixture, shards, tmp_path):
    for name in ("captions", "relations", "words"):
        shutil.copytree(shards / name, tmp_path / name)
    shutil.copytree(shards / "words", tmp_path / "edits")
    with pytest.raises(ShardMismatch, match=r"edits: dataset .* the sft mixture was made for .*dvc repro mixture@sft"):
        Loader(mixture, tmp_path, BATCH)


def test_a_shard_spoiled_after_the_start_is_refused_at_its_first_read(mixture, shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "shards")
    loader = Loader(mixture, folder, BATCH)
    for tar in (folder / "edits").glob("*.tar"):
        content = bytearray(tar.read_bytes())
        content[700] ^= 1
        tar.write_bytes(content)
    with pytest.raises(ShardMismatch, match=r"edits/shard-00000\d.tar"):
        next(iter(loader))


def test_a_batch_that_ranks_cannot_share_is_refused(mixture, shards):
    with pytest.raises(ValueError, match="batch_size: 5 samples can't be shared by 2 ranks"):
        Loader(mixture, shards, 5, 0, 2)
