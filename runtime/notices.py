"""How a stage ended, written into its run folder and told by webhook and mail. A notice that can't be sent changes nothing."""

import json
import os
import smtplib
import ssl
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from email.message import EmailMessage
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from runtime.config import LOOPBACK, EmailConfig, NoticesConfig
from runtime.exits import Interrupted
from runtime.files import write_json
from runtime.run_folder import ENDED, command_for, last_whole_checkpoint

TIMEOUT = 5.0  # seconds a notice may take, name look-up and a slow answer included
ERROR_CHARACTERS = 2000
TOKEN, PASSWORD = "DEEPGEN_WEBHOOK_TOKEN", "DEEPGEN_SMTP_PASSWORD"


@dataclass(frozen=True)
class Notice:
    """What is sent: nothing that only the machine itself should know."""

    stage: str
    state: str  # finished, interrupted or failed
    message: str
    last_checkpoint: str | None
    command: str
    fingerprint: str

    @property
    def title(self) -> str:
        return f"DeepGen: {self.stage} {self.state}"

    @property
    def text(self) -> str:
        rows = {
            "what happened": self.message or self.state,
            "last good checkpoint": self.last_checkpoint or "none",
            "go on with": self.command,
            "fingerprint": self.fingerprint,
        }
        return "\n".join(f"{name}: {value}" for name, value in rows.items()) + "\n"


@contextmanager
def told(root: Path, stage: str, folder: Path, config: NoticesConfig, on_finish: bool) -> Iterator[None]:
    """Note in the run folder how the body ends, and send notices of it: of a failure or interruption always, of a finish if `on_finish`.

    The body's own error, whatever it is, goes on unchanged.
    """
    (folder / ENDED).unlink(missing_ok=True)
    began = time.monotonic()
    try:
        yield
    except BaseException as error:
        told_to_stop = isinstance(error, (Interrupted, KeyboardInterrupt))
        tell_end(root, stage, folder, config, "interrupted" if told_to_stop else "failed", f"{type(error).__name__}: {error}")
        raise
    tell_end(root, stage, folder, config, "finished", "", on_finish, time.monotonic() - began)


def tell_end(
    root: Path, stage: str, folder: Path, config: NoticesConfig, state: str, message: str, send: bool = True, seconds: float | None = None
) -> None:
    """Note in the run folder how a stage ends, and send the notice; returns in bounded time and raises nothing."""
    message = message[:ERROR_CHARACTERS]
    try:
        write_json(folder / ENDED, {"state": state, "error": message or None, "time": time.time(), "seconds": seconds})
        if send:
            checkpoint = last_whole_checkpoint(folder)
            command = "deepgen run" if state == "finished" else command_for(stage)
            place = str(checkpoint.relative_to(root)) if checkpoint else None
            send_notices(Notice(stage, state, message, place, command, folder.name), config)
    except Exception as error:  # a full disk, say: how the stage ended stands
        _warn(f"its end could not be noted ({type(error).__name__})")


def send_notices(notice: Notice, config: NoticesConfig) -> None:
    """By every way that is configured, at once; returns after at most TIMEOUT seconds and raises nothing."""
    ways: list[tuple[str, Callable[[], None]]] = []
    if config.webhook is not None:
        webhook = config.webhook
        ways.append((f"webhook at {urlsplit(webhook).hostname}", lambda: post(webhook, notice)))
    if config.email is not None:
        email = config.email
        ways.append((f"mail through {email.host}", lambda: mail(email, notice)))
    threads = [threading.Thread(target=_try, args=way, daemon=True, name=way[0]) for way in ways]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + TIMEOUT
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            _warn(f"{thread.name}: no answer in {TIMEOUT:g} s; the notice may be lost")


def _try(name: str, send: Callable[[], None]) -> None:
    try:
        send()
    except KeyError as error:
        _warn(f"{name}: the notice was not sent; {error.args[0]} is not in the environment")
    except Exception as error:
        code = getattr(error, "code", None) or getattr(error, "smtp_code", None)
        # Not the error's own words: a server may repeat what it was sent, a secret included.
        _warn(f"{name}: the notice was not sent ({type(error).__name__}{f' {code}' if code else ''})")


def _warn(words: str) -> None:
    print(f"notices: {words}", file=sys.stderr, flush=True)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the token to a host that nobody configured."""

    def redirect_request(self, *_: Any) -> None:
        return None


def post(url: str, notice: Notice) -> None:
    """POST the notice as JSON, with `text` for chat systems that show that key.

    Raises:
        KeyError: the address needs the token and the environment has none.
        OSError: not reached, or an answer other than 2xx; a redirect is one.
    """
    headers = {"Content-Type": "application/json"}
    if "{token}" in url:
        url = url.replace("{token}", quote(os.environ[TOKEN], safe="/"))
    elif TOKEN in os.environ:
        headers["Authorization"] = f"Bearer {os.environ[TOKEN]}"
    body = json.dumps(asdict(notice) | {"text": f"{notice.title}\n{notice.text}"}).encode()
    direct = [urllib.request.ProxyHandler({})] if urlsplit(url).hostname == LOOPBACK else []
    request = urllib.request.Request(url, body, headers, method="POST")
    with urllib.request.build_opener(_NoRedirects, *direct).open(request, timeout=TIMEOUT) as answer:
        answer.read(1)


def mail(config: EmailConfig, notice: Notice) -> None:
    """Send the notice to `config.to`; the password leaves this process over TLS only.

    Raises:
        KeyError: a user without a password in the environment.
        OSError: not reached, no STARTTLS, a certificate that isn't the host's, or refused (smtplib's errors are OSErrors).
    """
    letter = EmailMessage()
    letter["Subject"], letter["From"], letter["To"] = notice.title, config.sender, ", ".join(config.to)
    letter.set_content(notice.text)
    with smtplib.SMTP(config.host, config.port, timeout=TIMEOUT) as server:
        if config.host != LOOPBACK:
            server.starttls(context=ssl.create_default_context())
        if config.user is not None:
            server.login(config.user, os.environ[PASSWORD])
        server.send_message(letter)
