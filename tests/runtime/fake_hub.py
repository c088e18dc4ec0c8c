"""A hub on 127.0.0.1 with the two addresses that a fetch uses, and the ways in which a real one fails."""

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

REVISION = "0123456789abcdef0123456789abcdef01234567"
LARGE = 1000  # bytes from which a file is kept apart, with a sha256


class FakeHub(ThreadingHTTPServer):
    """Serves `files`. `cuts` holds, for a path, how many bytes each coming connection carries before it breaks."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.names: dict[str, str] = {}  # path -> the name it is listed under
        self.served = dict(files)  # what comes, where that is not what is listed
        self.cuts: dict[str, list[int]] = {}
        self.drip: set[str] = set()
        self.busy = 0  # answers of 503 before the first good one
        self.gate: int | None = None
        self.redirect: str | None = None
        self.page_length = 1000
        self.ranges = True
        self.requests: list[tuple[str, dict[str, str]]] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def bodies(self) -> list[str]:
        return [path for path, _ in self.requests if "/resolve/" in path]

    def tree(self) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = [{"type": "directory", "path": "folder", "oid": "0" * 40, "size": 0}]
        for path, content in self.files.items():
            entry: dict[str, Any] = {"type": "file", "path": self.names.get(path, path), "size": len(content)}
            entry["oid"] = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
            if len(content) >= LARGE:
                entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
                entry["oid"] = "f" * 40  # of the pointer, not of the content
            entries.append(entry)
        return entries


class Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        hub, address = self.server, urlsplit(self.path)
        hub.requests.append((address.path, {name.lower(): value for name, value in self.headers.items()}))
        if hub.busy:
            hub.busy -= 1
            self.answer(503, b"")
        elif hub.gate:
            self.answer(hub.gate, b"")
        elif f"/tree/{REVISION}" in address.path:
            self.listing(int(parse_qs(address.query).get("cursor", ["0"])[0]))
        elif f"/resolve/{REVISION}/" in address.path:
            self.body(unquote(address.path.split(f"/resolve/{REVISION}/")[1]))
        else:
            self.answer(404, b"")

    def listing(self, start: int) -> None:
        tree, stop = self.server.tree(), start + self.server.page_length
        more = {"Link": f'<https://elsewhere.example/api?recursive=true&cursor={stop}>; rel="next"'} if stop < len(tree) else {}
        self.answer(200, json.dumps(tree[start:stop]).encode(), more)

    def body(self, path: str) -> None:
        hub, content = self.server, self.server.served[path]
        if hub.redirect:
            self.answer(302, b"", {"Location": hub.redirect})
            return
        start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-")) if hub.ranges and "Range" in self.headers else 0
        more = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        rest = content[start:]
        if path in hub.drip:
            self.answer(206 if start else 200, rest[:1], more, len(rest))
            for byte in rest[1:]:
                time.sleep(0.02)
                self.wfile.write(bytes([byte]))
        elif hub.cuts.get(path):
            self.answer(206 if start else 200, rest[: hub.cuts[path].pop(0)], more, len(rest))
            self.close_connection = True
        else:
            self.answer(206 if start else 200, rest, more)

    def answer(self, code: int, content: bytes, headers: dict[str, str] | None = None, length: int | None = None) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None: ...


@contextmanager
def serving(files: dict[str, bytes]) -> Iterator[FakeHub]:
    with FakeHub(files) as hub:
        threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield hub
        hub.shutdown()
