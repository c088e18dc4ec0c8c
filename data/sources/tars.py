"""WebDataset tars: {key}.jpg with {key}.txt or {key}.json as img2dataset writes them, or the members of our own shards.

Headers are read with tarfile, images by their offset; no member is unpacked or decoded, and one that could run code is never opened.
"""

import tarfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from data.config import PartConfig
from data.records import Reason
from data.sources.files import Bad, check_size, list_files, relative, shown
from data.sources.members import caption_of, images_of
from data.sources.reader import Found, Reader

COMPRESSED = (".tgz", ".tar.gz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
RUNS_CODE = ("pickle", "pkl", "dill", "joblib", "pth", "pt", "ckpt", "npy", "npz", "mat", "pyd", "py", "pyc", "so", "dll", "exe", "sh")


@dataclass
class Sample:
    """Members of one key that lie beside each other: extension -> offset and size. bad: why they are no record."""

    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    bad: tuple[Reason, str] | None = None


class Tars(Reader):
    """Memory holds a number a tar, and the index of the tar that is being read."""

    def __init__(self, name: str, part: PartConfig, root: Path):
        super().__init__(name, part, root)
        self.tars = list_files(self.path, part.glob or "**/*", (".tar", *COMPRESSED))
        for tar in self.tars:
            with open(tar, "rb") as handle:
                if tar.name.lower().endswith(COMPRESSED) or handle.read(6).startswith(MAGIC):
                    raise ValueError(
                        f"{tar} is compressed, so that no record in it can be read alone. Uncompress it first: `gunzip` or the like."
                    )
        self.ends = list(accumulate(len(index_tar(tar)) for tar in self.tars))
        self.total = self.ends[-1]

    def find(self, start: int, stop: int) -> Iterator[tuple[str, Callable[[], Found]]]:
        while start < stop:
            which = bisect_right(self.ends, start)
            first, end = self.ends[which - 1] if which else 0, min(stop, self.ends[which])
            label = relative(self.tars[which], self.path)
            with open(self.tars[which], "rb") as handle:
                for sample in index_tar(self.tars[which])[start - first : end - first]:
                    yield f"{label}#{shown(sample.key)}", partial(self._found, sample, handle, label)
            start = end

    def _found(self, sample: Sample, handle: BinaryIO, label: str) -> Found:
        if sample.bad is not None:
            raise Bad(sample.bad[0], f"{label}: {sample.bad[1]}")

        def read(extension: str) -> bytes:
            offset, size = sample.members[extension]
            check_size(size, f"{label}#{sample.key}.{extension}")
            handle.seek(offset)
            return handle.read(size)

        target, references = images_of(sample.members)
        prompt, row = caption_of(sample.members, read, self.part.caption_field)
        return Found(prompt, read(target), [read(reference) for reference in references], row)


def index_tar(path: Path) -> list[Sample]:
    """The samples of a tar in their order, by one pass over its headers.

    A tar that is cut or damaged ends in a sample that says so, in place of the one it breaks in.
    """
    samples: list[Sample] = []
    size, offset, cut, problem = path.stat().st_size, 0, False, "no header there"
    try:
        with tarfile.open(path, "r:") as archive:  # ":" says not to try to uncompress
            for member in archive:
                offset = member.offset
                if not member.isdir():
                    _add(samples, member)
                if cut := not 0 <= member.size <= size - member.offset_data:  # below 0, tarfile would go round and round
                    problem = f"a member of {member.size:,} bytes"
                    break
                offset = archive.offset
    except Exception as error:  # a hostile header raises whatever it likes
        cut, problem = bool(samples), str(error)
    with open(path, "rb") as handle:
        handle.seek(offset)
        end, rest = handle.read(512), handle.read(1 << 20)
    if end != bytes(512):  # tarfile takes a header that it can't read for the end mark
        last = samples.pop().key if samples else ""  # what more belonged to it is not known
        reason = Reason.ZERO_BYTES if size == 0 else Reason.TRUNCATED if cut or len(end) < 512 else Reason.RECORD_BAD
        message = f"cut or damaged at byte {offset:,} of {size:,}: {problem}. Records before it are kept; fetch the tar again."
        samples.append(Sample(last, bad=(reason, message)))
    elif rest.strip(b"\0"):
        message = f"more follows its end mark at byte {offset:,}; expected one tar, not several joined"
        samples.append(Sample("", bad=(Reason.RECORD_BAD, message)))
    times = Counter(sample.key for sample in samples)
    for sample in samples:
        if times[sample.key] > 1 and sample.bad is None:
            message = f"key {shown(sample.key)!r} comes {times[sample.key]} times; expected its members side by side, once"
            sample.bad = (Reason.RECORD_BAD, message)
    return samples


def _add(samples: list[Sample], member: tarfile.TarInfo) -> None:
    name = PurePosixPath(member.name)
    stem, _, extension = name.name.partition(".")
    key, extension = str(name.with_name(stem)) if stem else str(name), extension.lower()
    if not samples or samples[-1].key != key:
        samples.append(Sample(key))
    sample = samples[-1]
    if name.is_absolute() or ".." in name.parts:
        bad = Reason.PATH_OUTSIDE, f"member {shown(member.name)!r} leads out of the tar"
    elif not member.isreg() or member.issparse():
        bad = Reason.RECORD_BAD, f"member {shown(member.name)!r} is a link, a device or sparse; expected a plain file"
    elif extension.removesuffix(".gz").rpartition(".")[2] in RUNS_CODE:
        bad = Reason.RECORD_BAD, f"member {shown(member.name)!r} could run code when opened; it is not"
    elif extension in sample.members:
        bad = Reason.RECORD_BAD, f"member {shown(member.name)!r} comes twice"
    else:
        sample.members[extension] = member.offset_data, member.size
        return
    sample.bad = sample.bad or bad
