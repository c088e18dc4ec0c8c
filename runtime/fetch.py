"""`deepgen fetch`: what a preset needs from the network, refused until its licences are accepted by name, then brought and verified."""

import contextlib
import fcntl
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from runtime.fetched import FETCHED, FetchedFile, FetchRefused, Wanted, fetched_files, foundation_wants, size_of, write_receipt
from runtime.files import sha256_file
from runtime.hub import Hub, RemoteFile, part_of
from runtime.params import Params
from runtime.progress import Progress

# Endings of what may come; none of them runs when it is opened as what it says.
SAFE = {".safetensors", ".json", ".txt", ".model", ".parquet", ".tar"}
SAFE_DATA = SAFE | {".jsonl", ".csv", ".tsv", ".arrow", ".jpg", ".jpeg", ".png", ".webp"}
PAYLOAD = {".safetensors", ".parquet", ".tar", ".arrow"}
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
SPARE = 1_000_000_000  # bytes that stay free on the disk
MEGABYTE = 1_000_000


class AlreadyFetching(Exception):
    """Another process fetches into this project."""


@dataclass
class Plan:
    """One thing to fetch, listed: what comes, what is left out by its ending, and the bytes that are here already."""

    wanted: Wanted
    files: list[RemoteFile]
    left_out: Counter[str] = field(default_factory=Counter)
    here: int = 0

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files)


def wanted_by(params: Params, catalogue: Iterable[Wanted] = ()) -> list[Wanted]:
    """All that a preset needs from the network: its foundation and the data sets of the catalogue. The one place where they are joined.

    Raises:
        FetchRefused: two of them have one name.
    """
    wants = [*foundation_wants(params.foundation), *catalogue]
    twice = [name for name, count in Counter(wanted.name for wanted in wants).items() if count > 1]
    if twice:
        raise FetchRefused(
            f"{', '.join(twice)}: named twice; the catalogue's names must differ from each other and from the foundation's parts."
        )
    return wants


def choose(wants: Sequence[Wanted], only: Sequence[str]) -> list[Wanted]:
    """Those named in `only`; all if it is empty."""
    known = [wanted.name for wanted in wants]
    unknown = [name for name in only if name not in known]
    if unknown:
        raise FetchRefused(f"--only {', '.join(unknown)}: no such name; allowed: {', '.join(known) or 'none, this preset needs nothing'}")
    return [wanted for wanted in wants if not only or wanted.name in only]


def fetch(root: Path, wants: Sequence[Wanted], accepted: Sequence[str], hub: Hub, dry_run: bool, say: Callable[[str], None]) -> None:
    """Bring what is not here yet. A dry run lists and stops; it needs no licence, for it downloads nothing.

    Raises:
        FetchRefused: no pinned revision, a licence or gate not accepted, nothing but pickles, too little disk: nothing was downloaded.
        FetchFailed: a download did not end well; what is whole stays.
        AlreadyFetching: naming the other process.
    """
    refuse_unread(wants)
    missing = [wanted for wanted in wants if fetched_files(root, wanted) is None]
    for wanted in wants:
        if wanted not in missing:
            say(f"{wanted.name}: already there, {wanted.folder}")
    if not missing:
        say("nothing to fetch")
        return
    if not dry_run:
        refuse_unaccepted(missing, accepted, hub)
    coming: set[Path] = set()
    plans = [make_plan(root, wanted, hub, coming) for wanted in missing]
    say(table(root, plans))
    refuse_short_disk(root, plans)
    if dry_run:
        say(f"dry run: nothing was downloaded. Licences to accept: {' '.join(f'--accept {name}' for name in _licences(missing))}")
        return
    with _alone(root):
        bring(root, plans, hub)
    say(f"fetched: {', '.join(plan.wanted.name for plan in plans)}")


def refuse_unread(wants: Sequence[Wanted]) -> None:
    """Raises FetchRefused for a revision or a licence that nobody has written down."""
    lines = []
    for wanted in wants:
        about = f"  {wanted.name}: {wanted.repo} has no"
        if wanted.revision is None:
            lines.append(f"{about} pinned revision; look at its files, then write the full commit hash into {wanted.revision_in}")
        if wanted.licence is None:
            lines.append(f"{about} licence written down; read its card, then write the licence's name into {wanted.licence_in}")
    if lines:
        raise FetchRefused("\n".join(["can't be fetched yet:", *lines, "--only NAME fetches the others."]))


def refuse_unaccepted(wants: Sequence[Wanted], accepted: Sequence[str], hub: Hub) -> None:
    """Raises FetchRefused unless every licence was accepted by its name, and every gate has a token."""
    lines = [f"  {wanted.name}: {wanted.licence}, {hub.page(wanted)}" for wanted in wants if wanted.licence not in accepted]
    if lines:
        names = _licences([wanted for wanted in wants if wanted.licence not in accepted])
        ask = " ".join(f"--accept {name}" for name in names)
        raise FetchRefused("\n".join(["licences to read first:", *lines, f"Accept them by name: {ask}. Nothing was downloaded."]))
    gated = [wanted.name for wanted in wants if wanted.gated]
    if gated and hub.token is None:
        raise FetchRefused(
            f"{', '.join(gated)}: gated; accept the conditions on the hub's page, then export HF_TOKEN, a read token of that account."
        )


def make_plan(root: Path, wanted: Wanted, hub: Hub, coming: set[Path]) -> Plan:
    """List the commit and keep what may come.

    coming: files that an earlier plan brings, for two names may share a repository; this plan's are added.

    Raises:
        FetchRefused: weights come as pickles only, or nothing fits the patterns.
    """
    plan, pickles, safe = Plan(wanted, []), [], SAFE_DATA if wanted.repo_type == "dataset" else SAFE
    for file in hub.list_files(wanted):
        ending = PurePosixPath(file.path).suffix
        if not wanted.allows(file.path):
            continue
        if ending in safe:
            plan.files.append(file)
            target = root / wanted.folder / file.path
            there = target in coming or size_of(target) == file.size
            plan.here += file.size if there else min(size_of(part_of(target)), file.size)
            coming.add(target)
            continue
        plan.left_out[ending or "no ending"] += 1
        pickles += [file.path] if ending in PICKLES else []
    if pickles and not any(PurePosixPath(file.path).suffix in PAYLOAD for file in plan.files):
        raise FetchRefused(
            f"{wanted.name}: {wanted.repo} holds its content as pickles only ({pickles[0]}), which run code; find a safetensors release."
        )
    if not plan.files:
        raise FetchRefused(
            f"{wanted.name}: no file of {wanted.repo} fits {', '.join(wanted.allow_patterns)} with endings {', '.join(sorted(safe))}."
        )
    return plan


def table(root: Path, plans: Sequence[Plan]) -> str:
    """What would come, and where to."""
    rows = [("name", "files", "size", "here", "licence", "destination")]
    for plan in plans:
        wanted = plan.wanted
        rows.append((wanted.name, str(len(plan.files)), _size(plan.bytes), _size(plan.here), str(wanted.licence), str(wanted.folder)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for plan in plans:
        if plan.left_out:
            lines.append(
                f"{plan.wanted.name}: left out {', '.join(f'{count} {ending}' for ending, count in sorted(plan.left_out.items()))}"
            )
    lines.append(f"to download {_size(_missing(plans))}, disk free {_size(_free(root))}")
    return "\n".join(lines)


def refuse_short_disk(root: Path, plans: Sequence[Plan]) -> None:
    """Raises FetchRefused if the download would leave less than SPARE bytes free."""
    needed, free = _missing(plans) + SPARE, _free(root)
    if free < needed:
        raise FetchRefused(
            f"{FETCHED}: {_size(free)} free, {_size(needed)} needed ({_size(_missing(plans))} to download, {_size(SPARE)} to spare). "
            "Free some, or let outputs/fetched be a link to a larger disk. Nothing was downloaded."
        )


def bring(root: Path, plans: Sequence[Plan], hub: Hub) -> None:
    """Download, verify, write a receipt for each. A file that lies there without a receipt counts if its bytes are the commit's."""
    total, done = sum(plan.bytes for plan in plans), sum(plan.here for plan in plans)
    with Progress(_megabytes(total), "megabyte", "fetch", start=done // MEGABYTE) as progress:

        def counted(gained: int) -> None:
            nonlocal done
            done += gained
            whole = _megabytes(total) if done >= total else done // MEGABYTE
            if whole > progress.done:
                progress.update(whole - progress.done)

        for plan in plans:
            brought = {}
            for file in plan.files:
                target = root / plan.wanted.folder / file.path
                if target.is_file() and file.differs(target):
                    counted(-file.size if size_of(target) == file.size else 0)
                    target.unlink()
                if not target.is_file():
                    hub.download(plan.wanted, file, target, counted)
                brought[file.path] = FetchedFile(file.size, file.sha256 or sha256_file(target))
            write_receipt(root, plan.wanted, brought)


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    (root / FETCHED).mkdir(parents=True, exist_ok=True)
    with open(root / FETCHED / "lock", "a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.seek(0)
            raise AlreadyFetching(f"{FETCHED} is being written by process {handle.read().strip() or 'unknown'}; wait or stop it.") from None
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        yield


def _licences(wants: Sequence[Wanted]) -> list[str]:
    return sorted({str(wanted.licence) for wanted in wants})


def _missing(plans: Sequence[Plan]) -> int:
    return sum(plan.bytes - plan.here for plan in plans)


def _free(root: Path) -> int:
    """Bytes free where the files will lie."""
    folder = root / FETCHED
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _megabytes(count: int) -> int:
    return -(-count // MEGABYTE)


def _size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
