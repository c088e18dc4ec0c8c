"""Tars behind URLs, as they stream past: every sample once a pass, and nothing left out in silence."""

import io
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from data.loader import Batch, read_part
from data.streaming import stream_batches
from runtime.published import ShardMismatch
from runtime.store import StoreError

PARTS = ("captions", "edits")


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        return None


@pytest.fixture(scope="module")
def served(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """(folder, its URL) of a web server with the tars of two parts."""
    folder = tmp_path_factory.mktemp("served")
    for part in PARTS:
        for tar in (shards / part).glob("*.tar"):
            (folder / f"{part}-{tar.name}").write_bytes(tar.read_bytes())
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def urls(served: tuple[Path, str]) -> list[str]:
    folder, url = served
    return [f"{url}/{part}-shard-{i:06d}.tar" for part in PARTS for i in range(len(list(folder.glob(f"{part}-*"))))]


def keys(batches: list[Batch]) -> list[str]:
    return [key for batch in batches for key in batch.keys]


@pytest.mark.parametrize("shuffle_buffer", [0, 4, 1000])
def test_two_ranks_together_see_every_sample_exactly_once_a_pass(urls, shards, shuffle_buffer):
    ranks = [list(stream_batches(urls, 4, 1, rank, 2, shuffle_buffer, passes=2)) for rank in range(2)]
    wanted = Counter(sample.key for part in PARTS for sample in read_part(shards / part))
    assert Counter(keys(ranks[0]) + keys(ranks[1])) == wanted + wanted
    once = [list(stream_batches(urls, 4, 1, rank, 2, shuffle_buffer, passes=1)) for rank in range(2)]
    assert Counter(keys(once[0]) + keys(once[1])) == wanted
    positions = [position for rank in ranks for batch in rank for position in batch.positions]
    assert len(set(positions)) == len(positions) == 2 * wanted.total(), "two samples would share their noise"


def test_a_batch_is_what_the_loader_would_make_of_its_samples(urls, shards):
    samples = {sample.key: sample for part in PARTS for sample in read_part(shards / part)}
    batches = list(stream_batches(urls, 4, 1, passes=1))
    assert [batch.index for batch in batches] == list(range(len(batches)))
    assert {batch.task for batch in batches} == {"text_to_image", "image_edit"}
    for batch in batches:
        mine = [samples[key] for key in batch.keys]
        assert {sample.task for sample in mine} == {batch.task}
        assert batch.prompts == tuple(sample.prompt for sample in mine) and batch.scenes == tuple(sample.scene for sample in mine)
        np.testing.assert_array_equal(batch.target_images, np.stack([sample.target for sample in mine]))
        assert len(batch.reference_images) == len(mine[0].references)
        for i, pixels in enumerate(batch.reference_images):
            np.testing.assert_array_equal(pixels, np.stack([sample.references[i] for sample in mine]))


def test_batches_are_full_but_for_one_of_each_task_at_the_end_of_a_pass(urls):
    batches = list(stream_batches(urls, 4, 1, passes=1))
    short = [i for i, batch in enumerate(batches) if len(batch.keys) < 4]
    assert short == [len(batches) - 2, len(batches) - 1], "23 captions and 13 edits leave 3 and 1"


@pytest.mark.parametrize("shuffle_buffer", [0, 1000])
def test_the_order_of_tars_and_samples_follows_the_seed_and_changes_with_the_pass(urls, shuffle_buffer):
    def order(seed: int) -> list[str]:
        return keys(list(stream_batches(urls, 1, seed, shuffle_buffer=shuffle_buffer, passes=2)))

    first = order(1)
    assert first == order(1) != order(2)
    assert first[:36] != first[36:] and sorted(first[:36]) == sorted(first[36:])


def test_without_a_number_of_passes_there_is_no_end(urls):
    batches = stream_batches(urls[:1], 5, 1)
    assert len({key for _, batch in zip(range(7), batches, strict=False) for key in batch.keys}) == 5


def rewrite(tar: bytes, leave_out: str) -> bytes:
    """The tar without the first member whose name ends so."""
    buffer = io.BytesIO()
    left = 0
    with tarfile.open(fileobj=io.BytesIO(tar)) as old, tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as new:
        for member in old.getmembers():
            if member.name.endswith(leave_out) and not left:
                left += 1
                continue
            new.addfile(member, old.extractfile(member))
    assert left
    return buffer.getvalue()


@pytest.mark.parametrize("member", [".src.0.png", ".tgt.png", ".json"])
def test_a_sample_that_lacks_a_member_is_refused_by_url(served, urls, member):
    folder, url = served
    (folder / "lacking.tar").write_bytes(rewrite((folder / "edits-shard-000000.tar").read_bytes(), member))
    with pytest.raises(ShardMismatch, match=rf"{url}/lacking\.tar.*{member.removeprefix('.')}"):
        list(stream_batches([f"{url}/lacking.tar"], 4, 1, passes=1))


def test_a_tar_cut_between_two_samples_is_refused_by_url(served, shards):
    folder, url = served
    cut = int(np.load(shards / "edits" / "index.npy")[2]["offset"])
    (folder / "cut.tar").write_bytes((folder / "edits-shard-000000.tar").read_bytes()[:cut])
    with pytest.raises(ShardMismatch, match=rf"{url}/cut\.tar: does not end"):
        list(stream_batches([f"{url}/cut.tar"], 4, 1, passes=1))


@pytest.mark.parametrize("place", [b"IDAT", b"ustar"])
def test_a_flipped_byte_is_refused_by_url(served, place):
    folder, url = served
    content = bytearray((folder / "edits-shard-000000.tar").read_bytes())
    content[content.rindex(place) + 20] ^= 1
    (folder / "flipped.tar").write_bytes(content)
    with pytest.raises(ShardMismatch, match=rf"{url}/flipped\.tar"):
        list(stream_batches([f"{url}/flipped.tar"], 4, 1, passes=1))


def test_a_url_with_nothing_behind_it_is_named_and_no_command_is_run(served, tmp_path):
    _, url = served
    for bad in (f"{url}/none.tar", f"file://{tmp_path}/none.tar", "oss://bucket/none.tar", f"pipe:touch {tmp_path}/ran"):
        with pytest.raises(StoreError, match=bad):
            next(stream_batches([bad], 4, 1))
    assert not (tmp_path / "ran").exists()


def test_fewer_tars_than_ranks_are_refused_at_once(urls):
    with pytest.raises(ValueError, match="urls: 2 tars can't feed 3 ranks"):
        stream_batches(urls[:2], 4, 1, 0, 3)
