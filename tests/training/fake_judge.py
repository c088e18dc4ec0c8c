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
        self.server = Server(("127.0.0.1", 0), type("Handler", (Handler,), {"judge": self}))
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}/v1"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class Server(ThreadingHTTPServer):
    request_queue_size = 256  # 5 of the library's: of a group's 56 connections at once most would wait for a second SYN, or a fifth


class Handler(BaseHTTPRequestHandler):
    """A fault is a method of its name, told what stands behind "=" and what a good answer would be."""

    protocol_version = "HTTP/1.1"
    judge: FakeJudge

    def log_message(self, *_: Any) -> None:
        """Tests stay quiet."""

    def do_GET(self) -> None:
        self.reply({"data": [{"id": self.judge.model}]})

    def do_POST(self) -> None:
        judge, body = self.judge, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        images = [part["image_url"]["url"] for part in body["messages"][0]["content"] if part["type"] == "image_url"]
        first, second = map(brightness, images)
        with judge.lock:
            number, judge.number = judge.number, judge.number + 1
            judge.seen.append((first, second))
            judge.headers.append(dict(self.headers))
            judge.under_way += 1
            judge.most = max(judge.most, judge.under_way)
        text = f"<think>8 > 3</think><answer>Image {judge.prefer(first, second)} is better</answer>"
        name, _, value = judge.fault(number).partition("=")
        try:
            time.sleep(judge.delay)
            getattr(self, name or "well")(value, {"model": judge.model, "choices": [{"message": {"content": text}}]})
        except OSError:
            pass  # the client has gone
        finally:
            with judge.lock:
                judge.under_way -= 1

    def well(self, value: str, good: dict[str, Any]) -> None:
        self.reply(good)

    def status(self, value: str, good: dict[str, Any]) -> None:
        self.reply({"error": "down"}, int(value))

    def retry_after(self, value: str, good: dict[str, Any]) -> None:
        self.reply({"error": "busy"}, 503, {"Retry-After": value})

    def html(self, value: str, good: dict[str, Any]) -> None:
        self.raw(b"<html>not found</html>", "text/html", 404)

    def reset(self, value: str, good: dict[str, Any]) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())  # its files would keep it open

    def hang(self, value: str, good: dict[str, Any]) -> None:
        time.sleep(float(value))

    def drip(self, value: str, good: dict[str, Any]) -> None:
        self.slowly(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", b" ")

    def endless_headers(self, value: str, good: dict[str, Any]) -> None:
        self.slowly(b"HTTP/1.1 200 OK\r\n", b"X-More: more\r\n")

    def says(self, value: str, good: dict[str, Any]) -> None:
        self.reply(good | {"choices": [{"message": {"content": json.loads(value)}}]})

    def text(self, value: str, good: dict[str, Any]) -> None:
        self.raw(value.encode())

    def huge(self, value: str, good: dict[str, Any]) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 500000000\r\n\r\n")
        for _ in range(500):
            self.wfile.write(b" " * 1_000_000)

    def pickled(self, value: str, good: dict[str, Any]) -> None:
        """Unpickled, it would leave a file behind."""
        self.raw(b"cbuiltins\nopen\n(V" + self.judge.marker.encode() + b"\nVw\ntR.")

    def gzipped(self, value: str, good: dict[str, Any]) -> None:
        self.raw(BOMB, headers={"Content-Encoding": "gzip"})

    def deep(self, value: str, good: dict[str, Any]) -> None:
        self.raw(b"[" * 200_000)

    def other_id(self, value: str, good: dict[str, Any]) -> None:
        self.reply(good, headers={"X-Request-Id": "somebody else's"})

    def other_model(self, value: str, good: dict[str, Any]) -> None:
        self.reply(good | {"model": value})

    def slowly(self, first: bytes, more: bytes) -> None:
        """For a minute."""
        self.wfile.write(first)
        for _ in range(600):
            self.wfile.write(more)
            self.wfile.flush()
            time.sleep(0.1)

    def reply(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.raw(json.dumps(value).encode(), status=status, headers=headers)

    def raw(self, content: bytes, kind: str = "application/json", status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Type": kind, "Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


def brightness(url: str) -> float:
    content = base64.b64decode(url.removeprefix("data:image/png;base64,"))
    return float(np.asarray(Image.open(io.BytesIO(content), formats=["PNG"])).mean())
