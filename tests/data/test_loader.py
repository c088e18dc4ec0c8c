import shutil
from itertools import islice

import numpy as np
import pytest

from data.config import MixtureConfig
from data.loader import Batch, Loader, OtherData
from data.mixture import resolve_mixture
from data.shards import ShardMismatch

BATCH = 6  # divides by 1, 2 and 3 ranks


def take(loader: Loader, number: int) -> list[Batch]:
    return list(islice(loader, number))


def same(left: Batch, right: Batch) -> bool:
    pictures = [(left.target_images, right.target_images), *zip(left.reference_images, right.reference_images, strict=True)]
    plain = all(getattr(left, name) == getattr(right, name) for name in ("index", "task", "prompts", "keys", "scenes", "positions"))
    return plain and all(np.array_equal(a, b) for a, b in pictures)


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


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("stopped_after", range(13))
def test_a_stream_stopped_anywhere_goes_on_as_if_it_had_not(mixture, shards, stopped_after, workers):
    """Batches that workers made ahead are no part of the state."""
    whole = take(Loader(mixture, shards, BATCH), 13)
    first = Loader(mixture, shards, BATCH, workers=workers)
    take(first, stopped_after)
    second = Loader(mixture, shards, BATCH)
    second.restore(first.state())
    assert all(same(a, b) for a, b in zip(whole[stopped_after:], second, strict=False))
    assert same(Loader(mixture, shards, BATCH, start=stopped_after).batch(stopped_after), first.batch(stopped_after))


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_see_what_one_alone_would(mixture, shards, world_size):
    alone = take(Loader(mixture, shards, BATCH), 8)
    ranks = [take(Loader(mixture, shards, BATCH, rank, world_size), 8) for rank in range(world_size)]
    for index, batch in enumerate(alone):
        slices = [rank[index] for rank in ranks]
        assert sum((part.keys for part in slices), ()) == batch.keys
        assert sum((part.positions for part in slices), ()) == batch.positions
        assert {part.task for part in slices} == {batch.task}
        np.testing.assert_array_equal(np.concatenate([part.target_images for part in slices]), batch.target_images)


def test_a_run_stopped_on_two_ranks_goes_on_with_three(mixture, shards):
    two = Loader(mixture, shards, BATCH, 1, 2)
    take(two, 5)
    three = Loader(mixture, shards, BATCH, 2, 3)
    three.restore(two.state())
    assert next(iter(three)).keys == Loader(mixture, shards, BATCH, 2, 3, start=5).batch(5).keys


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
