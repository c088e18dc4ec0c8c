"""A client for services that may fail in any way: one deadline for all, bounded retries, a breaker, replies that are capped and checked."""

import asyncio
import json
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import aiohttp

T = TypeVar("T")
FIRST_WAIT, LONGEST_WAIT = 0.1, 10.0  # seconds before a second attempt, and at most before a later one


class Unanswered(Exception):
    """A question has no answer that can be used. kind: why, for the counts; again: whether asking once more may help."""

    def __init__(self, kind: str, again: bool = True, wait: float | None = None) -> None:
        super().__init__(kind)
        self.kind, self.again, self.wait = kind, again, wait


class Breaker:
    """After `failures` in a row nothing is asked for `seconds`; then one request tries, and its answer opens the way or closes it again."""

    def __init__(self, failures: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.failures, self.seconds, self.clock = failures, seconds, clock
        self.in_a_row = self.opened = 0
        self.since: float | None = None
        self.trying = False

    def lets(self) -> bool:
        if self.since is None:
            return True
        if self.trying or self.clock() - self.since < self.seconds:
            return False
        self.trying = True
        return True

    def tell(self, answered: bool) -> None:
        if answered:
            self.in_a_row, self.since, self.trying = 0, None, False
            return
        self.in_a_row += 1
        if self.trying or (self.since is None and self.in_a_row >= self.failures):
            self.opened += self.since is None
            self.since, self.trying = self.clock(), False


class Service:
    """Asks for JSON over HTTP, from any thread; all requests run in one loop of a thread of its own.

    Nothing is read of a reply beyond `max_bytes`, none is decompressed or unpickled, no redirect is followed, no proxy taken from the
    environment. A reply that names another request than the one that was sent is refused. What comes after the deadline is not read.

    Args:
        headers: sent with each request; never part of a message.
    """

    def __init__(
        self, name: str, attempts: int, concurrency: int, max_bytes: int, breaker: Breaker, headers: dict[str, str] | None = None
    ) -> None:
        self.name, self.attempts, self.max_bytes, self.breaker = name, attempts, max_bytes, breaker
        self.headers = headers or {}
        self.counts: Counter[str] = Counter()
        self.latencies: list[float] = []
        self.jitter = random.Random()  # the global generator belongs to the training
        self.loop = asyncio.new_event_loop()
        self.free = asyncio.Semaphore(concurrency)
        threading.Thread(target=self.loop.run_forever, daemon=True, name=name).start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, which runs in the service's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    def session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            headers=self.headers | {"Accept-Encoding": "identity"},
            auto_decompress=False,
            trust_env=False,
            connector=aiohttp.TCPConnector(limit=0),
        )

    async def ask(self, session: aiohttp.ClientSession, method: str, url: str, request: str, body: Any = None, until: float = 0.0) -> Any:
        """The reply's JSON, by `attempts` requests at most.

        Args:
            request: id, told in the header X-Request-Id.
            until: of time.monotonic(), when nobody waits any more.

        Raises:
            Unanswered: after the last attempt, or at once where another would not help.
        """
        for attempt in range(self.attempts):
            try:
                async with self.free:
                    return await self._try(session, method, url, request, body, until)
            except Unanswered as error:
                self.counts[f"failed_{error.kind}"] += 1
                left = until - time.monotonic()
                wait = min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * (0.5 + self.jitter.random()) if error.wait is None else error.wait
                if not error.again or attempt + 1 == self.attempts or wait >= left:
                    raise
                self.counts["retries"] += 1
                await asyncio.sleep(wait)
        raise AssertionError("attempts is above 0")

    async def _try(self, session: aiohttp.ClientSession, method: str, url: str, request: str, body: Any, until: float) -> Any:
        left = until - time.monotonic()
        if left <= 0:
            raise Unanswered("deadline", again=False)
        if not self.breaker.lets():
            raise Unanswered("breaker", again=False)
        self.counts["requests"] += 1
        began, answered = time.monotonic(), False
        try:
            async with session.request(
                method,
                url,
                json=body,
                headers={"X-Request-Id": request},
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=left),
            ) as reply:
                value = await self._read(reply, request)
            answered = True
            self.latencies.append(time.monotonic() - began)
            return value
        except (TimeoutError, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError):
                raise
            raise Unanswered("deadline", again=False) from error
        except aiohttp.ClientError as error:
            raise Unanswered("connection") from error
        finally:
            self.breaker.tell(answered)

    async def _read(self, reply: aiohttp.ClientResponse, request: str) -> Any:
        if reply.status != 200:
            again = reply.status in (408, 425, 429) or reply.status >= 500
            raise Unanswered(f"status_{reply.status}", again, retry_after(reply.headers.get("Retry-After")))
        if reply.headers.get("Content-Encoding", "identity") != "identity":
            raise Unanswered("compressed", again=False)
        if reply.headers.get("X-Request-Id", request) != request:
            raise Unanswered("other_request")
        content = bytearray()
        async for piece in reply.content.iter_chunked(65_536):
            content += piece
            if len(content) > self.max_bytes:
                raise Unanswered("too_large", again=False)
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise Unanswered("no_json") from error

    def facts(self) -> dict[str, float]:
        """Counts and latencies since they were last asked for."""
        counts, latencies = self.counts, self.latencies
        self.counts, self.latencies = Counter(), []
        row = {f"{self.name}/{name}": float(value) for name, value in counts.items()}
        row[f"{self.name}/breaker_opened"] = float(self.breaker.opened)
        if latencies:
            row |= {f"{self.name}/latency_median_s": statistics.median(latencies), f"{self.name}/latency_max_s": max(latencies)}
        return row


def retry_after(value: str | None) -> float | None:
    """Seconds, where the header says some; a date is read as nothing."""
    try:
        seconds = float(value) if value is not None else None
    except ValueError:
        return None
    return seconds if seconds is not None and 0 <= seconds < 1e6 else None
