"""Settings of notices, as written in params.yaml."""

from typing import Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from runtime.settings import Settings

LOOPBACK = "127.0.0.1"


class EmailConfig(Settings):
    """A mail server and who is written to. STARTTLS is required, but for a server at 127.0.0.1."""

    host: str = Field(min_length=1)
    port: int = Field(587, ge=1, le=65535)
    user: str | None = Field(None, description="logs in with DEEPGEN_SMTP_PASSWORD from the environment; null: no login")
    sender: str = Field(min_length=3)
    to: tuple[str, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _no_login_in_the_clear(self) -> Self:
        if self.user is not None and self.host == LOOPBACK:
            raise ValueError(f"user: {self.user!r} given for {LOOPBACK}, where nothing is encrypted; set it to null")
        return self


class NoticesConfig(Settings):
    """Who is told when a training stage finishes, and when any stage fails or is interrupted. No part of any stage's fingerprint."""

    webhook: str | None = Field(
        None,
        description="https address that gets a JSON POST; {token} in it, else an Authorization header, is DEEPGEN_WEBHOOK_TOKEN",
    )
    email: EmailConfig | None = None

    @field_validator("webhook")
    @classmethod
    def _is_private(cls, url: str | None) -> str | None:
        if url is None:
            return None
        parts = urlsplit(url)
        if not parts.hostname or (parts.scheme, parts.hostname) != ("http", LOOPBACK) and parts.scheme != "https":
            raise ValueError(f"scheme and host {parts.scheme}://{parts.hostname} given; expected https, or http to {LOOPBACK}")
        if parts.username or parts.password:
            raise ValueError("holds a user or password; put the secret into DEEPGEN_WEBHOOK_TOKEN and write {token} in its place")
        return url
