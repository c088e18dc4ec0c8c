"""A model hub over plain HTTPS: list a commit's files, download one, verified and resumable.

Why not the hub's own client: it deletes a half-loaded file when the process ends, compares no sha256 after a plain download, follows a
redirect to any scheme, and is held offline in all of our processes. This one needs no switch: nothing else calls it.
"""

import contextlib
import hashlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, urlsplit

from runtime.exits import Plain
from runtime.fetched import FetchRefused, Wanted
from runtime.files import fsync_folder, sha256_file

DEFAULT_ENDPOINT = "https://huggingface.co"
LOOPBACK = "127.0.0.1"  # the one host that plain http may reach, and only if the endpoint itself is there
MAX_PAGE = 64 << 20  # bytes of one page of a listing
BLOCK = 1 << 20
SLOWEST = 1024  # bytes a second, over a whole timeout: less is a stalled connection
RETRIES = 5  # in a row without a byte gained
BUSY = {408, 429, 500, 502, 503, 504}


class FetchFailed(Plain):
    """A download began and did not end well: which file, and what differs."""


@dataclass(frozen=True)
class RemoteFile:
    """A file in a commit. Large files carry their sha256, the others their git blob's sha1."""

    path: str
    size: int
    sha256: str | None
    blob: str

    def differs(self, local: Path) -> str | None:
        """What is wrong with a local copy, in words; None if it is the file."""
        if (size := local.stat().st_size) != self.size:
            return f"expected {self.size} bytes, got {size}"
        name, expected = ("sha256", self.sha256) if self.sha256 else ("git sha1", self.blob)
        found = sha256_file(local) if self.sha256 else git_blob(local)
        return None if found == expected else f"expected {name} {expected}, got {found}"


def git_blob(path: Path) -> str:
    """The name that git gives to a file's bytes."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with open(path, "rb") as handle:
        while block := handle.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


class Hub:
    """Args:
    endpoint: the hub, or a mirror with the same API.
    token: sent to the endpoint's host and no other, and never part of a message.
    timeout: seconds without a byte, and seconds over which SLOWEST is measured.
    pause: seconds before the first retry; doubled for each further one.
    """

    def __init__(self, endpoint: str = DEFAULT_ENDPOINT, token: str | None = None, timeout: float = 30.0, pause: float = 1.0) -> None:
        self.endpoint, self.token, self.timeout, self.pause = endpoint.rstrip("/"), token, timeout, pause
        self.check(self.endpoint)
        handlers: list[urllib.request.BaseHandler] = [_Redirects(self)]
        if urlsplit(self.endpoint).hostname == LOOPBACK:
            handlers.append(urllib.request.ProxyHandler({}))
        self.opener = urllib.request.build_opener(*handlers)

    @classmethod
    def from_environment(cls) -> "Hub":
        """HF_ENDPOINT and HF_TOKEN; a token that some other program stored is not looked for."""
        return cls(os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT, os.environ.get("HF_TOKEN") or None)

    def check(self, url: str) -> None:
        """Raises FetchRefused for an address that is not https."""
        parts = urlsplit(url)
        local = parts.scheme == "http" and parts.hostname == LOOPBACK == urlsplit(self.endpoint).hostname
        if not parts.hostname or parts.username or not (parts.scheme == "https" or local):
            raise FetchRefused(f"{_bare(url)}: expected an https address without a user name; see HF_ENDPOINT, or the hub redirects there.")

    def page(self, wanted: Wanted) -> str:
        """Where a person reads about `wanted`."""
        return f"{self.endpoint}/{'datasets/' if wanted.repo_type == 'dataset' else ''}{wanted.repo}"

    def list_files(self, wanted: Wanted) -> list[RemoteFile]:
        """Every file of the commit, allowed or not, sorted.

        Raises:
            FetchRefused: a name that would leave the folder; no access.
            FetchFailed: no such commit; not a listing.
        """
        address = f"{self.endpoint}/api/{wanted.repo_type}s/{wanted.repo}/tree/{wanted.revision}"
        query, files = "recursive=true&expand=false", []
        while query:
            body, query = self._retried(wanted, lambda url=f"{address}?{query}": self._listing(url))  # type: ignore[misc]
            files += [_remote_file(wanted, entry) for entry in body if entry.get("type") == "file"]
        if len({file.path for file in files}) != len(files):
            raise FetchRefused(f"{wanted.name}: the listing of {wanted.repo} names a file twice; expected a commit's tree.")
        return sorted(files, key=lambda file: file.path)

    def download(self, wanted: Wanted, file: RemoteFile, target: Path, counted: Callable[[int], None]) -> None:
        """Put `file` at `target`, whole and verified, going on from what an earlier process had loaded; `counted` gets bytes gained.

        Raises:
            FetchRefused: no access.
            FetchFailed: other bytes than the commit's; the connection kept breaking (what came stays for the next try).
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        part = part_of(target)
        kind = "datasets/" if wanted.repo_type == "dataset" else ""
        url = f"{self.endpoint}/{kind}{wanted.repo}/resolve/{wanted.revision}/{quote(file.path)}"
        with open(part, "a+b") as handle:
            if handle.seek(0, os.SEEK_END) > file.size:
                handle.truncate(0)
            if handle.seek(0, os.SEEK_END) < file.size:
                self._retried(wanted, lambda: self._pull(url, file, handle, counted), lambda: handle.seek(0, os.SEEK_END))
            handle.flush()
            os.fsync(handle.fileno())
        if problem := file.differs(part):
            part.unlink()
            raise FetchFailed(
                f"{wanted.name}: {file.path} came with other bytes: {problem}. It was removed; the same command loads it again."
            )
        os.replace(part, target)
        fsync_folder(target.parent)

    def _pull(self, url: str, file: RemoteFile, handle: IO[bytes], counted: Callable[[int], None]) -> None:
        """One connection's worth of the file, appended. Never more than the commit announced."""
        have = handle.seek(0, os.SEEK_END)
        with self._open(url, {"Range": f"bytes={have}-"} if have else {}) as response:
            if have and response.status != 206:  # this server sends the whole again
                handle.truncate(0)
                counted(-have)
                have = 0
            elif have and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                raise FetchFailed(f"{file.path}: asked for bytes from {have}, got {response.headers.get('Content-Range')!r}.")
            announced = response.headers.get("Content-Length")
            if announced is not None and int(announced) != file.size - have:
                raise FetchFailed(f"{file.path}: the commit says {file.size - have} bytes are to come, the server {announced}.")
            began, window = time.monotonic(), 0
            while have < file.size and (block := response.read1(min(BLOCK, file.size - have))):
                handle.write(block)
                counted(len(block))
                have, window = have + len(block), window + len(block)
                if (passed := time.monotonic() - began) > self.timeout:
                    if window < SLOWEST * passed:
                        raise TimeoutError(f"{window} bytes in {passed:.0f} s")
                    began, window = time.monotonic(), 0
        if have < file.size:
            raise ConnectionError(f"the connection closed {file.size - have} bytes early")

    def _listing(self, url: str) -> tuple[list[dict[str, Any]], str]:
        """One page, and the query of the next; empty after the last."""
        with self._open(url) as response:
            content = response.read(MAX_PAGE + 1)
            following = re.search(r'<([^>]+)>;\s*rel="next"', response.headers.get("Link", ""))
        try:
            body = json.loads(content)
        except ValueError:
            body = None
        if len(content) > MAX_PAGE or not isinstance(body, list) or not all(isinstance(entry, dict) for entry in body):
            raise FetchFailed(f"{_bare(url)} answered {len(content)} bytes that are no listing; expected a JSON list of files.")
        query = urlsplit(following[1]).query if following else ""  # the address stays ours: a mirror may name the original's
        return body, "" if query == urlsplit(url).query else query

    @contextlib.contextmanager
    def _open(self, url: str, headers: dict[str, str] | None = None) -> Iterator[http.client.HTTPResponse]:
        self.check(url)
        request = urllib.request.Request(url, headers={"User-Agent": "deepgen-fetch", "Accept-Encoding": "identity"} | (headers or {}))
        self.sign(request)
        with self.opener.open(request, timeout=self.timeout) as response:
            yield response

    def sign(self, request: urllib.request.Request) -> None:
        """Add the token, if the request goes to the endpoint itself; a redirect elsewhere does not inherit it."""
        if self.token and urlsplit(request.full_url)[:2] == urlsplit(self.endpoint)[:2]:
            request.add_unredirected_header("Authorization", f"Bearer {self.token}")

    def _retried(self, wanted: Wanted, attempt: Callable[[], Any], gained: Callable[[], int] = lambda: 0) -> Any:
        """`attempt()`, again and again after what may pass by itself, until RETRIES in a row gained nothing."""
        failures = 0
        while True:
            before = gained()
            try:
                return attempt()
            except urllib.error.HTTPError as error:
                if error.code not in BUSY:
                    raise self._explained(wanted, error) from None
                reason = f"HTTP {error.code}"
            except (OSError, http.client.HTTPException) as error:
                reason = f"{type(error).__name__}: {getattr(error, 'reason', None) or error}"
            failures = 1 if gained() > before else failures + 1
            if failures > RETRIES:
                raise FetchFailed(
                    f"{wanted.name}: {self.page(wanted)}: {reason}; {failures} tries in vain. The same command goes on."
                ) from None
            time.sleep(self.pause * 2 ** (failures - 1))

    def _explained(self, wanted: Wanted, error: urllib.error.HTTPError) -> Exception:
        if error.code in (401, 403):
            who = "the account of HF_TOKEN may not read it" if self.token else "no HF_TOKEN is set"
            return FetchRefused(
                f"{wanted.name}: {wanted.repo} is gated or private (HTTP {error.code}), and {who}. "
                f"Accept its conditions on {self.page(wanted)}, then export HF_TOKEN, a read token of that account."
            )
        return FetchFailed(
            f"{wanted.name}: {_bare(error.url or '')} answered HTTP {error.code}; expected {wanted.repo} at {wanted.revision}."
        )


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Each hop is checked like the first address."""

    max_redirections = 5

    def __init__(self, hub: Hub) -> None:
        self.hub = hub

    def redirect_request(self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        self.hub.check(newurl)
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None:
            self.hub.sign(request)
        return request


def part_of(target: Path) -> Path:
    """Where a file lies while it is loaded."""
    return target.with_name(f".{target.name}.part")


def _remote_file(wanted: Wanted, entry: dict[str, Any]) -> RemoteFile:
    path, large = entry.get("path"), entry.get("lfs") or {}
    if not isinstance(path, str) or not _stays_inside(path):
        raise FetchRefused(f"{wanted.name}: {wanted.repo} lists a file named {path!r}; expected a path inside the repository.")
    size, sha256, blob = entry.get("size"), large.get("oid"), entry.get("oid")
    hexadecimal = re.fullmatch(r"[0-9a-f]{64}", str(sha256)) if large else re.fullmatch(r"[0-9a-f]{40}", str(blob))
    if not isinstance(size, int) or size < 0 or not hexadecimal:
        raise FetchFailed(f"{wanted.name}: {path} is listed with size {size!r} and digest {sha256 or blob!r}; expected both.")
    return RemoteFile(path, size, sha256, str(blob))


def _stays_inside(path: str) -> bool:
    parts = path.split("/")
    return path.isprintable() and "\\" not in path and not any(part in ("", ".", "..") for part in parts)


def _bare(url: str) -> str:
    """An address without its query and user, which may hold credentials."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname or ''}{f':{parts.port}' if parts.port else ''}{parts.path}"
