"""Batches as tars stream past, for data that lies in object storage and is read once, with a weaker promise than the loader's.

| | `data.loader.Loader` | `stream_batches` |
|---|---|---|
| needs | a published part: manifest, index | URLs of tars |
| order | sample i is a function of i | tars shuffled each pass, samples through a buffer |
| stopped | goes on at the very sample | begins a new pass |
| ranks | the union is the same whatever their number | each reads its own tars, so that passes end apart |
| mixture | ratios of tasks, weights of parts, rows taken out | none: whatever is in the tars |

Where a result must be repeated, or a row was taken down, use the loader: it reads tars in a store as well.
"""

import json
import os
import random
from collections.abc import Iterator, Sequence
from itertools import chain, count, islice
from typing import Any, BinaryIO

from data.loader import Batch, Encoded, encoded, make_batch
from data.shards import BLOCK, check_images
from runtime.keys import seed_from
from runtime.published import ShardMismatch
from runtime.store import StoreError, open_stream


def stream_batches(
    urls: Sequence[str],
    batch_size: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    shuffle_buffer: int = 1000,
    passes: int | None = None,
) -> Iterator[Batch]:
    """Batches of one task and one size from tars behind fsspec URLs, read from beginning to end.

    In a pass every tar is read by one rank, in an order that `seed` and the number of the pass give, and every sample is in one batch. A
    sample waits until its task and size have filled a batch: those that have not at the end of a pass come out as smaller batches.

    Args:
        urls: plain tars as a build writes them, the same list on every rank; `data.store.tar_urls` names those of a part.
        batch_size: samples a batch of this rank.
        shuffle_buffer: samples held, encoded, while their order is drawn; 0 keeps that of the tars.
        passes: over all tars; None for no end.

    Yields:
        Batches as the loader's. Their positions differ between ranks and batches, but are no sample's place in a stage's stream.

    Raises:
        ValueError: there are fewer tars than ranks: one would wait for ever.
        ShardMismatch: naming the URL: no whole tar, or a sample that lacks an image of its JSON or has another.
        StoreError: naming the URL: its protocol can't be spoken here, or it can't be read.
        BadImage: an image is not whole.
    """
    if len(urls) < world_size:
        raise ValueError(f"urls: {len(urls)} tars can't feed {world_size} ranks; give at least one for each, or write smaller shards.")
    turns = count() if passes is None else range(passes)
    return _batches((_one_pass(urls, seed, turn, rank, world_size, shuffle_buffer) for turn in turns), batch_size, rank, world_size)


def _batches(passes: Iterator[Iterator[Encoded]], batch_size: int, rank: int, world_size: int) -> Iterator[Batch]:
    index = position = 0
    for samples in passes:
        for group in _grouped(samples, batch_size):
            positions = tuple((position + i) * world_size + rank for i in range(len(group)))
            yield make_batch(index, group[0].bucket, group, positions)
            index += 1
            position += len(group)


def _grouped(samples: Iterator[Encoded], batch_size: int) -> Iterator[list[Encoded]]:
    """Samples of one task and size, `batch_size` at a time; at the end what is left, each group by itself."""
    waiting: dict[tuple[str, str], list[Encoded]] = {}
    for sample in samples:
        kind = sample.task, sample.bucket
        group = waiting.setdefault(kind, [])
        group.append(sample)
        if len(group) == batch_size:
            yield waiting.pop(kind)
    yield from waiting.values()


def _one_pass(urls: Sequence[str], seed: int, turn: int, rank: int, world_size: int, shuffle_buffer: int) -> Iterator[Encoded]:
    os.environ["WDS_SECURE"] = "1"  # read at import: no pipes, no pickles
    import webdataset

    pipeline = webdataset.DataPipeline(
        webdataset.SimpleShardList(list(urls), seed=seed_from("stream tars", seed, turn)),
        lambda tars: islice(tars, rank, None, world_size),
        lambda tars: chain.from_iterable(read_tar(tar["url"]) for tar in tars),
        webdataset.shuffle(shuffle_buffer, initial=shuffle_buffer, rng=random.Random(seed_from("stream samples", seed, turn, rank))),
    )
    yield from pipeline


def read_tar(url: str) -> Iterator[Encoded]:
    """Samples of one tar in order, each with every image that its JSON lists.

    webdataset opens URLs with curl through a pipe, which is shut here, so fsspec opens them. It also takes a tar that ends between two
    members for a whole one, and a sample without its images for a sample: both are refused.

    Raises: as `stream_batches`.
    """
    os.environ["WDS_SECURE"] = "1"
    from webdataset.tariterators import group_by_keys, tar_file_expander

    try:
        with open_stream(url) as stream:
            ending = _Ending(stream)
            for sample in group_by_keys(tar_file_expander([{"url": url, "stream": ending}])):
                yield _packed(sample, url)
            if any(ending.last) or len(ending.last) < BLOCK:
                raise ShardMismatch(
                    f"{url}: does not end with the zeros that end a tar; it was cut, or is compressed. Bring it there again."
                )
    except (ShardMismatch, StoreError):
        raise
    except (OSError, EOFError) as error:
        raise StoreError(f"{url}: {type(error).__name__}: {error}. Is it there, and may this machine read it?") from error
    except Exception as error:  # tarfile's, zlib's, and what each protocol's library has of its own
        told = error.args[0] if error.args else error  # webdataset puts the stream and the URL behind it
        raise ShardMismatch(f"{url}: {type(error).__name__}: {told}; expected a whole tar of samples. Bring it there again.") from error


def _packed(sample: dict[str, Any], url: str) -> Encoded:
    key = sample["__key__"]
    if "json" not in sample:
        raise ShardMismatch(f"{url}: sample {key} has no {key}.json; expected a tar as `python -m data shards` writes it.")
    facts = json.loads(sample["json"])
    if not {"images", "task", "kind", "prompt", "bucket", "scene"} <= facts.keys():
        raise ShardMismatch(f"{url}: {key}.json lacks images, task or bucket; expected a tar as `python -m data shards` writes it.")
    images = {name: content for name, content in sample.items() if name != "json" and not name.startswith("__")}
    check_images(facts, images, f"{url} {key}")
    return encoded(url, key, facts, images)


class _Ending:
    """A stream that keeps the last block of what was read of it."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.last = stream, b""

    def read(self, size: int = -1) -> bytes:
        content = self.stream.read(size)
        self.last = (self.last + content)[-BLOCK:]
        return content
