"""Latents made of numbers that tell where they belong, beside real parts."""

import json
from dataclasses import asdict, replace
from itertools import islice

import numpy as np
import pytest

from data.latents import Latents, check_latents, latent_members, parse_latents, stack_latents
from data.loader import Loader, Part, open_latents
from data.shards import index_of, save_index, write_shard
from runtime.files import sha256_file, write_json
from runtime.published import ShardMismatch

BATCH = 6


def made_up(row: int, references: int) -> Latents:
    return Latents(
        *(np.full((4, 8, 8), row + i, np.float16) for i in (0, 0.5)), tuple(np.full((4, 8, 8), -row, np.float16) for _ in range(references))
    )


def cache(part: Part, folder) -> None:
    """Latents of every row of a part, as the stage writes them."""
    folder.mkdir(parents=True)
    receipts = []
    for number, shard in enumerate(part.manifest["shards"]):
        rows = np.flatnonzero(part.index["shard"] == number)
        samples = [latent_members(part.read(row).key, made_up(row, len(part[row].references))) for row in rows]
        receipts.append(write_shard(folder, shard["name"], "plan", samples, check_latents))
    save_index(folder / "index.npy", index_of(receipts))
    facts = {"dataset_id": part.manifest["dataset_id"], "samples": len(part), "shards": [asdict(receipt) for receipt in receipts]}
    write_json(folder / "manifest.json", facts | {"files": {"index.npy": sha256_file(folder / "index.npy")}})


@pytest.fixture
def latents(shards, tmp_path):
    for name in ("edits", "captions"):
        cache(Part(shards / name), tmp_path / name)
    return tmp_path


def test_a_sample_comes_back_from_its_members_as_it_went_in(tmp_path):
    latents = made_up(3, 2)
    members = latent_members("0a", latents)
    assert [name for name, _ in members] == ["0a.tgt.npy", "0a.src.0.npy", "0a.src.1.npy"]
    receipt = write_shard(tmp_path, "shard-000000.tar", "plan", [members], check_latents)
    back = parse_latents((tmp_path / receipt.name).read_bytes()[: receipt.spans[0][1]], "row 0", "0a")
    for a, b in zip(back.arrays, latents.arrays, strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_the_vision_tower_saw_comes_back_beside_its_reference(tmp_path):
    latents = replace(made_up(3, 2), vision=tuple(np.full((5, 16), i, np.float16) for i in range(2)))
    members = latent_members("0a", latents)
    assert [name for name, _ in members][3:] == ["0a.src.0.vit.npy", "0a.src.1.vit.npy"]
    receipt = write_shard(tmp_path, "shard-000000.tar", "plan", [members], check_latents)
    content = (tmp_path / receipt.name).read_bytes()[: receipt.spans[0][1]]
    back = stack_latents([parse_latents(content, "row 0", "0a")] * 3)
    assert len(back.references) == 2 and [tokens.shape for tokens in back.vision] == [(3, 5, 16)] * 2
    assert back.vision[1][2, 4, 15] == 1 and back.references[1].shape == (3, 4, 8, 8)


def test_one_reference_of_two_without_what_the_vision_tower_saw_is_refused(tmp_path):
    latents = replace(made_up(3, 2), vision=(np.zeros((5, 16), np.float16),))
    receipt = write_shard(tmp_path, "shard-000000.tar", "plan", [latent_members("0a", latents)], check_latents)
    with pytest.raises(ShardMismatch, match="row 0: holds "):
        parse_latents((tmp_path / receipt.name).read_bytes()[: receipt.spans[0][1]], "row 0", "0a")


def test_batches_read_from_latents_are_those_of_the_same_samples(mixture, shards, latents):
    plain, cached = Loader(mixture, shards, BATCH), Loader(mixture, shards, BATCH, latents=latents)
    edits = 0
    for without, batch in islice(zip(plain, cached, strict=True), 12):
        assert (batch.keys, batch.prompts, batch.positions) == (without.keys, without.prompts, without.positions)
        for a, b in zip(batch.reference_images, without.reference_images, strict=True):
            np.testing.assert_array_equal(a, b)  # the VLM looks at references in any case
        if batch.task != "image_edit":
            continue
        edits += 1
        rows = [addresses for _, addresses in cached.streams["image_edit"].batch(batch.index // 4, BATCH)[1]]
        assert batch.target_images.shape == (0, 64, 64, 3)
        assert batch.latents.mean[:, 0, 0, 0].tolist() == rows
        assert (batch.latents.std - batch.latents.mean == 0.5).all() and batch.latents.references[0][:, 0, 0, 0].tolist() == [
            -row for row in rows
        ]
    assert edits == 3


def test_a_batch_with_a_part_that_has_no_latents_is_read_as_images(mixture, shards, latents):
    """Of the three parts of text_to_image only one has them."""
    batches = list(islice(Loader(mixture, shards, BATCH, latents=latents), 8))
    assert all((batch.latents is None) == (batch.task == "text_to_image") for batch in batches)
    assert all(len(batch.target_images) == BATCH for batch in batches if batch.task == "text_to_image")


def test_ranks_together_read_the_latents_that_one_alone_would(mixture, shards, latents):
    alone = Loader(mixture, shards, BATCH, latents=latents).batch(0)
    ranks = [Loader(mixture, shards, BATCH, rank, 2, latents=latents).batch(0).latents for rank in range(2)]
    for i, array in enumerate(alone.latents.arrays):
        np.testing.assert_array_equal(np.concatenate([rank.arrays[i] for rank in ranks]), array)


def test_latents_of_another_version_of_a_part_are_refused(shards, latents):
    manifest = json.loads((latents / "edits" / "manifest.json").read_text())
    write_json(latents / "edits" / "manifest.json", manifest | {"dataset_id": "0" * 32})
    with pytest.raises(ShardMismatch, match=r"edits: made from dataset 000000000000, edits is .* `dvc repro -f latents`"):
        open_latents(latents, {"edits": Part(shards / "edits")})


def test_latents_of_another_sample_are_refused(shards, latents):
    part, cached = Part(shards / "edits"), Part(latents / "edits", "latents")
    assert parse_latents(cached.content(2), "row 2", part.read(2).key).mean[0, 0, 0] == 2
    with pytest.raises(ShardMismatch, match="row 1: holds "):
        parse_latents(cached.content(1), "row 1", part.read(2).key)


def test_a_tar_of_latents_that_was_changed_is_found_before_it_is_read(shards, latents):
    tar = latents / "edits" / "shard-000000.tar"
    content = bytearray(tar.read_bytes())
    content[700] ^= 1
    tar.write_bytes(content)
    with pytest.raises(ShardMismatch, match="`dvc repro -f latents`"):
        Part(latents / "edits", "latents").content(0)


def test_numbers_beyond_their_precision_are_refused_as_they_are_written(tmp_path):
    with np.errstate(over="ignore"):
        beyond = replace(made_up(1, 0), mean=np.full((4, 8, 8), 1e6).astype(np.float16))
    with pytest.raises(ValueError, match=r"tgt\.npy beyond its precision"):
        write_shard(tmp_path, "shard-000000.tar", "plan", [latent_members("0a", beyond)], check_latents)
    assert not (tmp_path / "shard-000000.tar").exists()


def test_webdataset_decodes_a_tar_of_latents(latents, shards):
    import webdataset

    part = Part(shards / "edits")
    urls = [str(tar) for tar in sorted((latents / "edits").glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode())
    assert [sample["__key__"] for sample in samples] == [part.read(row).key for row in range(len(part))]
    assert [sample["src.0.npy"][0, 0, 0] for sample in samples] == [-row for row in range(len(part))]
