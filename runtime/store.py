"""A store: a folder behind an fsspec URL, on this machine or in object storage, that holds the tars of a part."""

import contextlib
import hashlib
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from runtime.exits import Plain, Unreachable

BLOCK = 1 << 22  # bytes a read


class StoreError(Plain):
    """A store can't be opened, written or read; the message names the URL and what to install or set."""


class StoreUnreachable(StoreError, Unreachable):
    """A store that could be opened did not do as asked; the next time it may."""


class Store:
    """The files of one folder, by name.

    Credentials come from the environment, as each protocol's library reads them.

    Raises:
        StoreError: nothing installed speaks the URL's protocol.
    """

    def __init__(self, url: str) -> None:
        self.folder = url.rstrip("/")
        self.fs, path = open_url(self.folder)
        self.path = path.rstrip("/")
        self.listing: dict[str, int] | None = None

    def url(self, name: str) -> str:
        return f"{self.folder}/{name}"

    def check_writable(self) -> None:
        """Write a file of a few bytes and remove it. Raises StoreError where that can't be done."""
        name = ".deepgen"
        try:
            self.fs.pipe_file(self._place(name), b"written to see that it can be")
        except Exception as error:  # each protocol has its own
            raise StoreError(
                f"data.store: {self.folder!r} can't be written: {type(error).__name__}: {error}. Expected a folder or bucket that is there "
                "and takes new files: make it, or give this machine the right to write there, or set data.store to null."
            ) from error
        with contextlib.suppress(Exception):  # a store that never forgets is one too
            self.fs.rm_file(self._place(name))

    def size(self, name: str) -> int | None:
        """Bytes of a file, None where there is none. The folder is listed once; files that the listing lacks are asked for one by one."""
        if self.listing is None:
            self.listing = {}
            with contextlib.suppress(Exception):  # it saves requests, and some stores list nothing
                self.fs.invalidate_cache(self.path)
                entries = self.fs.ls(self.path, detail=True)
                self.listing = {entry["name"].rpartition("/")[2]: entry["size"] for entry in entries if entry["size"] is not None}
        return self.listing[name] if name in self.listing else self._ask_size(name)

    def _ask_size(self, name: str) -> int | None:
        try:
            with self._asking(name):
                return cast(int, self.fs.info(self._place(name))["size"])
        except FileNotFoundError:
            return None

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop` of a file, fewer where it ends before.

        Raises:
            FileNotFoundError: it is not there.
            StoreError: it can't be read.
        """
        with self._asking(name):
            return cast(bytes, self.fs.cat_file(self._place(name), start, stop))

    def sha256(self, name: str) -> str:
        """Of a whole file, fetched block by block. Raises as `read` does."""
        digest = hashlib.sha256()
        with self._asking(name), open_stream(self.url(name)) as stream:
            while block := stream.read(BLOCK):
                digest.update(block)
        return digest.hexdigest()

    def put(self, file: Path, name: str) -> bool:
        """Bring a local file here; False where one of that name and size is there already.

        Where the file system can move, the bytes arrive under another name first: the final name is never that of half a file. Where it
        can't, as in object storage, a file appears when it is whole, or is replaced by the next upload for its size.

        Raises:
            StoreError: it can't be written, or has another size afterwards.
        """
        from fsspec import AbstractFileSystem

        size = file.stat().st_size
        found = self.size(name)
        if found == size:
            return False
        moves = type(self.fs).mv is not AbstractFileSystem.mv  # theirs is a copy and a removal
        place, final = self._place(f".{name}.{uuid.uuid4().hex}.tmp" if moves else name), self._place(name)
        with self._asking(name):
            self.fs.makedirs(self.path, exist_ok=True)
            try:
                self.fs.put_file(str(file), place)
                if moves and found is not None:
                    self.fs.rm_file(final)  # not every one of them moves onto a file
                if moves:
                    self.fs.mv(place, final)
            except BaseException:
                with contextlib.suppress(Exception):
                    self.fs.rm_file(place)
                raise
            self.fs.invalidate_cache(self.path)
        (self.listing or {}).pop(name, None)
        if (found := self._ask_size(name)) != size:
            raise StoreError(f"{self.url(name)}: {found} bytes after the upload, {size} were sent. The same command sends it again.")
        return True

    def _place(self, name: str) -> str:
        return f"{self.path}/{name}"

    @contextlib.contextmanager
    def _asking(self, name: str) -> Iterator[None]:
        """What a protocol's library raises, whatever that is, leaves with the URL; that a file is not there is left as it is."""
        try:
            yield
        except (FileNotFoundError, StoreError):
            raise
        except Exception as error:
            raise StoreUnreachable(
                f"{self.url(name)}: {type(error).__name__}: {error}. Check the network, the credentials of this machine, and data.store."
            ) from error


def shard_store(manifest: dict[str, Any]) -> Store | None:
    """Where a part's tars lie, each as `tar_name` says; None where they lie beside their manifest.

    Raises:
        StoreError: nothing installed speaks the URL's protocol.
    """
    return Store(f"{manifest['store'].rstrip('/')}/{manifest['part']}") if manifest.get("store") else None


def tar_name(shard: dict[str, Any]) -> str:
    """A tar's name in a store: by its content, so that builds of a part share what they have in common and none overwrites another's."""
    return f"{shard['sha256']}.tar"


def open_url(url: str) -> tuple[Any, str]:
    """(fsspec file system, path in it) of a URL.

    Raises:
        StoreError: its protocol is unknown, or the library for it is not installed.
    """
    from fsspec.core import url_to_fs

    try:
        return cast(tuple[Any, str], url_to_fs(url))
    except ImportError as error:
        raise StoreError(
            f"{url}: {error}. Install it with `.venv/bin/pip install -c constraints.txt PACKAGE`, or set data.store to another URL or null."
        ) from error
    except Exception as error:  # an unknown protocol is a ValueError, bad credentials are each library's own
        raise StoreError(f"{url}: {error}. Expected a URL that fsspec knows, as file:///data/store or s3://bucket/folder.") from error


def open_stream(url: str) -> BinaryIO:
    """A file behind a URL, to be read once from its beginning to its end."""
    fs, path = open_url(url)
    options = {"block_size": 0} if url.startswith(("http://", "https://")) else {}  # one request, for not every server knows ranges
    return cast(BinaryIO, fs.open(path, "rb", **options))
