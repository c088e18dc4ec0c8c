"""How a stage ends is noted and told; a notice that can't be sent changes nothing and shows no secret."""

import json
import socketserver
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from runtime import notices
from runtime.config import EmailConfig, NoticesConfig
from runtime.exits import Interrupted
from runtime.notices import Notice, send_notices, told
from runtime.run_folder import ending_of

SECRET = "hunter2-very-secret"
NOTICE = Notice("sft", "failed", "NonFiniteLoss: step 7", "outputs/runs/sft/abc/step-000005", "deepgen run", "abc")


@contextmanager
def server(handler: type[socketserver.BaseRequestHandler]) -> Iterator[int]:
    """A server on a free port of 127.0.0.1."""
    socketserver.ThreadingTCPServer.daemon_threads = True
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as listening:
        threading.Thread(target=listening.serve_forever, args=(0.02,), daemon=True).start()
        yield listening.server_address[1]
        listening.shutdown()


def web(status: int = 200, location: str | None = None, delay: float = 0.0) -> tuple[type[BaseHTTPRequestHandler], list[Any]]:
    """A handler that answers every POST alike, and what it was sent: (path, headers, body)."""
    seen: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append((self.path, dict(self.headers), self.rfile.read(int(self.headers["Content-Length"]))))
            time.sleep(delay)
            self.send_response(status)
            if location:
                self.send_header("Location", location)
            self.end_headers()

        do_GET = do_POST

        def log_message(self, *_: Any) -> None:
            pass

    return Handler, seen


def smtp(certificate: Path | None = None) -> tuple[type[socketserver.StreamRequestHandler], list[str]]:
    """A mail server of few words, and the lines that it heard; it offers STARTTLS if it has a certificate."""
    heard: list[str] = []

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.say(b"220 test")
            secure = False
            while line := self.rfile.readline().decode().rstrip():
                heard.append(("tls " if secure else "") + line)
                verb = line.split()[0].upper()
                if verb == "EHLO":
                    offers = [b"250-test", b"250-AUTH PLAIN"] if secure or certificate is None else [b"250-test", b"250-STARTTLS"]
                    self.say(*offers, b"250 8BITMIME")
                elif verb == "STARTTLS":
                    self.say(b"220 go")
                    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                    context.load_cert_chain(certificate)
                    self.request = context.wrap_socket(self.request, server_side=True)
                    self.rfile, self.wfile, secure = self.request.makefile("rb"), self.request.makefile("wb", 0), True
                elif verb == "AUTH":
                    self.say(b"235 in")
                elif verb == "DATA":
                    self.say(b"354 send")
                    while (text := self.rfile.readline()) not in (b".\r\n", b""):
                        heard.append(text.decode().rstrip())
                    self.say(b"250 kept")
                elif verb == "QUIT":
                    return self.say(b"221 bye")
                else:
                    self.say(b"250 ok")

        def say(self, *lines: bytes) -> None:
            self.wfile.write(b"".join(line + b"\r\n" for line in lines))

    return Handler, heard


def webhook(port: int, path: str = "/hook") -> NoticesConfig:
    return NoticesConfig(webhook=f"http://127.0.0.1:{port}{path}")


def mailbox(host: str, port: int, user: str | None = None) -> NoticesConfig:
    return NoticesConfig(email=EmailConfig(host=host, port=port, user=user, sender="deepgen@example.org", to=("a@example.org",)))


def test_a_webhook_gets_what_happened_the_checkpoint_and_the_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(notices.TOKEN, SECRET)
    handler, seen = web()
    with server(handler) as port:
        send_notices(NOTICE, webhook(port))
    path, headers, body = seen[0]
    sent = json.loads(body)
    assert path == "/hook" and headers["Authorization"] == f"Bearer {SECRET}"
    assert {"stage": "sft", "state": "failed", "command": "deepgen run", "fingerprint": "abc"}.items() <= sent.items()
    assert sent["last_checkpoint"].endswith("step-000005") and SECRET not in body.decode()


def test_a_token_in_the_address_comes_from_the_environment_and_in_no_header(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(notices.TOKEN, "T1/B2")
    handler, seen = web()
    with server(handler) as port:
        send_notices(NOTICE, webhook(port, "/services/{token}"))
    assert seen[0][0] == "/services/T1/B2" and "Authorization" not in seen[0][1]


def test_a_redirect_is_not_followed_with_the_token(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv(notices.TOKEN, SECRET)
    elsewhere, stolen = web()
    with server(elsewhere) as target:
        handler, seen = web(302, f"http://127.0.0.1:{target}/steal")
        with server(handler) as port:
            send_notices(NOTICE, webhook(port))
    assert len(seen) == 1 and not stolen
    assert "not sent (HTTPError 302)" in capsys.readouterr().err


def test_mail_goes_out_with_the_same_words():
    handler, heard = smtp()
    with server(handler) as port:
        send_notices(NOTICE, mailbox("127.0.0.1", port))
    assert "Subject: DeepGen: sft failed" in heard and "go on with: deepgen run" in heard
    assert "rcpt to:<a@example.org>" in (line.lower() for line in heard)


def test_a_password_crosses_only_after_starttls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv(notices.PASSWORD, SECRET)
    certificate = tmp_path / "both.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-subj",
        "/CN=localhost",
        "-addext",
        "subjectAltName=DNS:localhost",
    ]
    subprocess.run([*command, "-keyout", tmp_path / "key", "-out", tmp_path / "cert"], check=True, capture_output=True)
    certificate.write_text((tmp_path / "key").read_text() + (tmp_path / "cert").read_text())
    plain, in_the_clear = smtp()
    with server(plain) as port:
        send_notices(NOTICE, mailbox("localhost", port, "me"))
    assert not any("AUTH" in line or "DATA" in line for line in in_the_clear), "a server without STARTTLS gets nothing"
    handler, heard = smtp(certificate)
    with server(handler) as port:
        send_notices(NOTICE, mailbox("localhost", port, "me"))
        assert not any("AUTH" in line for line in heard), "a certificate that nobody vouches for ends the talk"
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert"))
        send_notices(NOTICE, mailbox("localhost", port, "me"))
    assert any(line.startswith("tls AUTH") for line in heard) and "Subject: DeepGen: sft failed" in heard
    assert SECRET not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"webhook": "http://hooks.example.org/x"}, "expected https, or http to 127.0.0.1"),
        ({"webhook": "https://me:word@example.org/x"}, "DEEPGEN_WEBHOOK_TOKEN"),
        ({"webhook": "file:///etc/passwd"}, "expected https"),
        ({"email": {"host": "127.0.0.1", "user": "me", "sender": "a@b.c", "to": ["a@b.c"]}}, "nothing is encrypted"),
    ],
)
def test_what_would_leak_is_refused_when_params_are_read(settings: dict[str, Any], words: str):
    with pytest.raises(ValidationError, match=words):
        NoticesConfig.model_validate(settings)


def ended_as(folder: Path, config: NoticesConfig, body: Callable[[], None], on_finish: bool = True) -> dict[str, Any] | None:
    with told(folder, "sft", folder, config, on_finish):
        body()
    return ending_of(folder)


def test_a_finish_a_failure_and_an_interruption_are_noted_and_told(tmp_path: Path):
    def fail() -> None:
        raise ValueError("no such sample")

    def stop() -> None:
        raise Interrupted("stopped at step 3 of 9")

    handler, seen = web()
    with server(handler) as port:
        assert ended_as(tmp_path, webhook(port), lambda: None)["state"] == "finished"  # type: ignore[index]
        for body, error, state in ((fail, ValueError, "failed"), (stop, Interrupted, "interrupted")):
            with pytest.raises(error):
                ended_as(tmp_path, webhook(port), body)
            assert ending_of(tmp_path)["state"] == state  # type: ignore[index]
        ended_as(tmp_path, webhook(port), lambda: None, on_finish=False)
    assert [json.loads(body)["state"] for _, _, body in seen] == ["finished", "failed", "interrupted"]


def test_a_run_says_nothing_of_its_end_before_it_has_ended(tmp_path: Path):
    ended_as(tmp_path, NoticesConfig(), lambda: None)
    with told(tmp_path, "sft", tmp_path, NoticesConfig(), True):
        assert ending_of(tmp_path) is None, "a killed second try must not pass for the first one's finish"


def test_a_server_that_refuses_sleeps_or_is_gone_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv(notices.TOKEN, SECRET)
    monkeypatch.setattr(notices, "TIMEOUT", 0.3)
    for handler in (web(500)[0], web(delay=2.0)[0]):
        with server(handler) as port:
            assert ended_as(tmp_path, webhook(port), lambda: None)["state"] == "finished"  # type: ignore[index]
    assert ended_as(tmp_path, webhook(port), lambda: None)["state"] == "finished"  # type: ignore[index]
    said = capsys.readouterr().err
    assert said.count("webhook at 127.0.0.1") >= 3 and SECRET not in said


def test_a_secret_that_is_not_in_the_environment_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(notices.TOKEN, raising=False)
    send_notices(NOTICE, NoticesConfig(webhook="https://example.invalid/{token}"))
    assert f"{notices.TOKEN} is not in the environment" in capsys.readouterr().err
