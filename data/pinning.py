"""What a part's source holds, as one digest in params.yaml: the same recipe never reads other bytes unnoticed."""

from pathlib import Path

from data.config import PartConfig
from runtime.exits import Plain
from runtime.fetched import published_at
from runtime.files import sha256_json, sha256_path


class OtherContent(Plain):
    """A source holds other bytes than the recipe was written for."""


def content_digest(part: PartConfig, root: Path) -> str | None:
    """Digest of everything under the part's paths; None for the drawn world, which is code.

    Raises:
        FileNotFoundError: a path is not there.
    """
    paths = [path for path in (part.path, part.images) if path is not None]
    return sha256_json([sha256_path(root / path) for path in paths]) if paths else None


def check_content(name: str, part: PartConfig, root: Path) -> None:
    """Raises OtherContent unless the source is as `content` in params.yaml says. A fetched data set may do without: its receipt says it."""
    fetched = part.data_set is not None and all(published_at(path) for path in (part.path, part.images) if path is not None)
    if part.content is None and fetched:
        return
    found = content_digest(part, root)
    if found != part.content:
        raise OtherContent(
            f"data.parts.{name}.content: {part.content} in params.yaml, but {part.path} holds {found}. If it is meant to be read as it is "
            f"now, write that digest there (`python -m data pin {name}` prints it)."
        )
