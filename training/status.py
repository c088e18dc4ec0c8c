"""`python -m training status`: what each run folder of a training stage is doing, or how it ended. Imports no torch."""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runtime.params import STAGES, parse_params
from runtime.recipe import load_stages
from runtime.run_folder import checkpoints, command_for, ending_of, heartbeat_of, last_whole_checkpoint, run_folders, writer_of
from runtime.stage import stage_digests

SILENT_S = 60.0  # a writer that says nothing for this long, and for ten of its steps, may hang


@dataclass(frozen=True)
class RunStatus:
    """One run folder, as it is now.

    state: running; finished; stopped (asked to, state saved); failed; dead (killed: no writer, and no word of how it ended).
    current: whether the present params.yaml, code and inputs go on in this folder; None where that can't be told, `note` says why.
    rate in units a second, eta_s and heartbeat_age_s in seconds; None where nothing was written.
    """

    stage: str
    fingerprint: str
    state: str
    current: bool | None
    step: int | None
    steps: int | None
    rate: float | None
    eta_s: float | None
    loss: float | None
    last_checkpoint: str | None
    heartbeat_age_s: float | None
    pid: int | None
    note: str
    command: str | None


def read_status(root: Path, stage: str | None = None) -> list[RunStatus]:
    """Run folders of `stage`, or of every training stage, in their order; the most recent heartbeat first within a stage."""
    wanted = STAGES if stage is None else (stage,)
    by_stage: dict[str, list[tuple[Path, dict[str, Any]]]] = {name: [] for name in wanted}
    for folder in run_folders(root):
        try:
            facts = json.loads((folder / "run.json").read_text())
        except (OSError, ValueError):  # being made, or removed, this moment
            continue
        if facts.get("stage") in by_stage:
            by_stage[facts["stage"]].append((folder, facts))
    rows = []
    for name, found in by_stage.items():
        if found:
            digests, problem = _present_digests(root, name)
            told = [_status_of(root, folder, facts, digests, problem) for folder, facts in found]
            rows += sorted(told, key=lambda row: (not row.current, row.heartbeat_age_s if row.heartbeat_age_s is not None else 1e18))
    return rows


def _present_digests(root: Path, stage: str) -> tuple[dict[str, str] | None, str]:
    """What the stage would start from now; (None, why) if it could not start."""
    try:
        values = parse_params((root / "params.yaml").read_text())
        return stage_digests(root, load_stages(root, values)[stage], values), ""
    except Exception as error:  # a broken params.yaml must not hide what runs
        return None, f"which run would go on can't be told: {error}"


def _status_of(root: Path, folder: Path, facts: dict[str, Any], digests: dict[str, str] | None, problem: str) -> RunStatus:
    beat, pid, ending = heartbeat_of(folder), writer_of(folder), ending_of(folder)
    whole, stage = last_whole_checkpoint(folder), facts["stage"]
    said = beat or {}
    age = None if beat is None else max(0.0, time.time() - beat["time"])
    current = None if digests is None else facts["digests"] == digests
    notes = [problem] if problem else []
    if pid is not None:
        state = "running"
        if beat is not None and age is not None and age > max(SILENT_S, 10 / max(beat["rate"], 1e-9)):
            notes.append("its lock is held and it says nothing: it may hang")
    elif ending is None:
        state = "dead"
        notes.append(f"process {_last_pid(folder)} is gone without a word: killed, or the machine went down")
    else:
        state = {"interrupted": "stopped"}.get(ending["state"], ending["state"])
        notes += [ending["error"].splitlines()[0]] if ending["error"] else []
    if damaged := [path.name for path in checkpoints(folder) if whole is None or path.name > whole.name]:
        notes.append(f"not whole: {', '.join(damaged)}")
    goes_on = state in ("stopped", "dead", "failed")
    if goes_on and current is False:
        notes.append("present params, code or inputs are others: they start a run of their own; put them back to go on with this one")
    elif goes_on and whole is None:
        notes.append("no checkpoint yet: it begins at step 0")
    return RunStatus(
        stage=stage,
        fingerprint=folder.name,
        state=state,
        current=current,
        step=said.get("step"),
        steps=said.get("total"),
        rate=said.get("rate"),
        eta_s=max(0.0, beat["eta_s"] - (age or 0.0)) if beat is not None and state == "running" else None,
        loss=said.get("loss"),
        last_checkpoint=str(whole.relative_to(root)) if whole else None,
        heartbeat_age_s=age if age is None else round(age, 1),
        pid=pid,
        note="; ".join(notes),
        command=command_for(stage) if goes_on and current is not False else None,
    )


def _last_pid(folder: Path) -> str:
    try:
        return (folder / "lock").read_text().strip() or "unknown"
    except OSError:
        return "unknown"


def print_status(rows: list[RunStatus], as_json: bool = False) -> None:
    """A block a run, or one JSON list."""
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
        return
    if not rows:
        print(f"no run of {', '.join(STAGES)} yet; `deepgen run` starts the first")
    for row in rows:
        mark = "*" if row.current else " "
        steps = "no step yet" if row.step is None else f"step {row.step} of {row.steps}"
        print(f"{mark} {row.stage} {row.fingerprint}  {row.state}, {steps}")
        facts = {
            "process": row.pid,
            "rate": None if row.rate is None else f"{row.rate:.3g}/s",
            "ETA": None if row.eta_s is None else _span(row.eta_s),
            "loss": None if row.loss is None else f"{row.loss:.4g}",
            "heartbeat": None if row.heartbeat_age_s is None else f"{_span(row.heartbeat_age_s)} ago",
        }
        shown = "  ".join(f"{name} {value}" for name, value in facts.items() if value is not None)
        for line in (shown, f"checkpoint {row.last_checkpoint}" if row.last_checkpoint else "", row.note):
            if line:
                print(f"    {line}")
        if row.command:
            print(f"    go on: {row.command}")
    if any(row.current for row in rows):
        print("* the run that the present params.yaml, code and inputs belong to")


def _span(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.0f} s"
