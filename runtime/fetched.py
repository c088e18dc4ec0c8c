"""What `deepgen fetch` brings and where it lies. Reading only: nothing here opens the network.

`outputs/fetched/<model|dataset>/<owner--name>/<revision>/` holds files as published; beside it, `<revision>.<name>.json` is the receipt.
"""

import fnmatch
import re
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Literal

from model.config import FoundationConfig
from runtime.exits import Plain
from runtime.files import read_json, write_json

FETCHED = Path("outputs") / "fetched"
REVISION = re.compile(r"[0-9a-f]{40}")
REPO = re.compile(r"(?!.*\.\.)\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
NAME = re.compile(r"\w[\w-]*", re.ASCII)
HUB_PARTS = ("vlm", "dit", "vae")


class FetchRefused(Plain):
    """Nothing was downloaded: what stands in the way, and who can change it."""


@dataclass(frozen=True)
class Wanted:
    """One thing to fetch: files of a hub repository at one commit.

    A null revision, or a null licence, is one that nobody has looked at yet: it is refused when it comes to fetching.
    """

    name: str
    repo: str
    repo_type: Literal["model", "dataset"]
    revision: str | None
    licence: str | None
    gated: bool = False
    allow_patterns: tuple[str, ...] = ("*",)  # of whole paths; `*` crosses folders
    revision_in: str = "foundation.hub of the params file"  # where a person writes it
    licence_in: str = "foundation.hub of the params file"

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise FetchRefused(f"{self.name!r}: a name is letters, digits, - and _.")
        if not REPO.fullmatch(self.repo):
            raise FetchRefused(f"{self.name}: repo is {self.repo!r}; expected owner/name.")
        if self.revision is not None and not REVISION.fullmatch(self.revision):
            raise FetchRefused(
                f"{self.name}: revision is {self.revision!r}; expected a full commit hash, 40 hex digits: branches and tags move."
            )

    @property
    def folder(self) -> Path:
        """Where its files lie, relative to the project."""
        return FETCHED / self.repo_type / self.repo.replace("/", "--") / (self.revision or "unpinned")

    @property
    def receipt(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.{self.name}.json")

    def allows(self, path: str) -> bool:
        return any(fnmatch.fnmatchcase(path, pattern) for pattern in self.allow_patterns)


@dataclass(frozen=True)
class FetchedFile:
    """One line of a receipt."""

    bytes: int
    sha256: str


def foundation_wants(config: FoundationConfig) -> list[Wanted]:
    """The parts of a hub foundation; none for another source."""
    if config.source != "hub":
        return []
    wants = []
    for part in HUB_PARTS:
        weights = config.hub[part]  # type: ignore[index]
        patterns = (f"{weights.subfolder}/*",) if weights.subfolder else ("*",)
        place = f"foundation.hub.{part} of the params file"
        wants.append(Wanted(part, weights.repo, "model", weights.revision, weights.licence, weights.gated, patterns, place, place))
    return wants


def write_receipt(root: Path, wanted: Wanted, files: dict[str, FetchedFile]) -> None:
    """The last thing written: with it, `wanted` is there."""
    lines = {path: {"bytes": file.bytes, "sha256": file.sha256} for path, file in files.items()}
    write_json(root / wanted.receipt, _head(wanted) | {"files": lines})


def published_at(path: str) -> str | None:
    """`owner/name@revision` of a path, from the project, that lies in the folder of some `Wanted`; None for any other."""
    parts = PurePath(path).parts
    inner = parts[len(FETCHED.parts) :]
    if parts[: len(FETCHED.parts)] != FETCHED.parts or len(inner) < 3 or not REVISION.fullmatch(inner[2]):
        return None
    return f"{inner[1].replace('--', '/', 1)}@{inner[2]}"


def fetched_files(root: Path, wanted: Wanted) -> dict[str, FetchedFile] | None:
    """Path within `wanted.folder` -> bytes and sha256; None if it was not fetched, not as now wanted, or a file's size changed since."""
    if wanted.revision is None or not (root / wanted.receipt).is_file():
        return None
    receipt = read_json(root / wanted.receipt)
    files = {path: FetchedFile(**line) for path, line in receipt.pop("files").items()}
    whole = all(size_of(root / wanted.folder / path) == file.bytes for path, file in files.items())
    return files if whole and receipt == _head(wanted) else None


def _head(wanted: Wanted) -> dict[str, object]:
    return {
        "name": wanted.name,
        "repo": wanted.repo,
        "repo_type": wanted.repo_type,
        "revision": wanted.revision,
        "licence_accepted": wanted.licence,
        "patterns": list(wanted.allow_patterns),
    }


def size_of(path: Path) -> int:
    """Bytes of a file; 0 if there is none."""
    return path.stat().st_size if path.is_file() else 0
