"""A judge on loopback that answers as told: well, or in one of the ways in which services fail."""

import base64
import gzip
import io
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image

MODEL = "judge-8b@1"
BOMB = gzip.compress(b" " * 20_000_000)


class FakeJudge:
    """The brighter image is better. `fault(number) -> name` says how request number n is answered; "" well.

    seen: the comparisons that were asked, as (brightness of the first, of the second).
    """

    def __init__(
        self, fault: Callable[[int], str] = lambda number: "", delay: float = 0.0, prefer: Callable[[float, float], Any] | None = None
    ):
        self.fault, self.delay, self.model, self.marker = fault, delay, MODEL, ""
        self.prefer = prefer or (lambda first, second: 1 if first > second else 2)
        self.seen: list[tuple[float, float]] = []
        self.headers: list[dict[str, str]] = []
        self.lock, self.number, self.under_way, self.most = threading.Lock(), 0, 0, 0
        judge = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                self.reply({"data": [{"id": judge.model}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                first, second = (
                    brightness(part["image_url"]["url"]) for part in body["messages"][0]["content"] if part["type"] == "image_url"
                )
                with judge.lock:
                    number, judge.number = judge.number, judge.number + 1
                    judge.seen.append((first, second))
                    judge.headers.append(dict(self.headers))
                    judge.under_way += 1
                    judge.most = max(judge.most, judge.under_way)
                try:
                    time.sleep(judge.delay)
                    self.answer(judge.fault(number), judge.prefer(first, second))
                except OSError:
                    pass  # the client has gone
                finally:
                    with judge.lock:
                        judge.under_way -= 1

            def answer(self, fault: str, place: Any) -> None:
                good = {
                    "model": judge.model,
                    "choices": [{"message": {"content": f"<think>8 > 3</think><answer>Image {place} is better</answer>"}}],
                }
                name, _, value = fault.partition("=")
                if name == "":
                    self.reply(good)
                elif name == "status":
                    self.reply({"error": "down"}, int(value))
                elif name == "retry_after":
                    self.reply({"error": "busy"}, 503, {"Retry-After": value})
                elif name == "html":
                    self.raw(b"<html>not found</html>", "text/html", 404)
                elif name == "reset":
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    os.close(self.connection.detach())  # its files would keep it open
                elif name == "hang":
                    time.sleep(float(value))
                elif name == "drip":
                    self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
                    for _ in range(600):
                        self.wfile.write(b" ")
                        self.wfile.flush()
                        time.sleep(0.1)
                elif name == "headers":
                    self.wfile.write(b"HTTP/1.1 200 OK\r\n")
                    for i in range(600):
                        self.wfile.write(b"X-%d: more\r\n" % i)
                        self.wfile.flush()
                        time.sleep(0.1)
                elif name == "says":
                    self.reply({"model": judge.model, "choices": [{"message": {"content": json.loads(value)}}]})
                elif name == "json":
                    self.raw(value.encode())
                elif name == "huge":
                    self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 500000000\r\n\r\n")
                    for _ in range(500):
                        self.wfile.write(b" " * 1_000_000)
                elif name == "pickle":  # unpickled, it would leave a file behind
                    self.raw(b"cbuiltins\nopen\n(V" + judge.marker.encode() + b"\nVw\ntR.")
                elif name == "gzip":
                    self.raw(BOMB, encoding="gzip")
                elif name == "deep":
                    self.raw(b"[" * 200_000)
                elif name == "other_id":
                    self.reply(good, headers={"X-Request-Id": "somebody else's"})
                elif name == "model":
                    self.reply(good | {"model": value})
                else:
                    raise ValueError(fault)

            def reply(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
                self.raw(json.dumps(value).encode(), status=status, headers=headers)

            def raw(
                self,
                content: bytes,
                kind: str = "application/json",
                status: int = 200,
                headers: dict[str, str] | None = None,
                encoding: str = "",
            ) -> None:
                self.send_response(status)
                told = {"Content-Type": kind, "Content-Length": str(len(content))} | ({"Content-Encoding": encoding} if encoding else {})
                for name, value in (told | (headers or {})).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}/v1"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def brightness(url: str) -> float:
    content = base64.b64decode(url.removeprefix("data:image/png;base64,"))
    return float(np.asarray(Image.open(io.BytesIO(content), formats=["PNG"])).mean())
