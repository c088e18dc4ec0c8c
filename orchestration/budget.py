"""What a run will take, told before it starts, and refused above `budget` of params.yaml: hours, disk, samples, GPU-hours, money.

Rates are those of the last finished run of each stage in this clone. Where there is none, the tiny preset has rates that were measured
on two cores, and a preset for GPUs is estimated from published speeds. What nobody measured says so, and counts as nothing.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from orchestration.datasets import shards_folder
from orchestration.dvc import DvcCommand
from orchestration.gc import shown_size
from runtime.exits import Plain
from runtime.files import read_json
from runtime.params import STAGES, Params, ParamsError, check_params, load_params, parse_params
from runtime.published import read_manifest
from runtime.recipe import Stage, load_stages, overlap
from runtime.run_folder import ENDED, ending_of, heartbeat_of

if TYPE_CHECKING:
    import dagster as dg

AROUND_SECONDS = 6.0  # a stage's process starts, and DVC records what it made
CACHED = 2  # an output lies in the workspace and, copied, in DVC's cache
GPU_STAGES = ("latents", "evaluation", *STAGES)
PREDICTED_TAG = "deepgen/predicted"


class Rate(NamedTuple):
    """Of a stage: seconds and bytes of outputs a unit of `_amount`, bytes of its run folder, and where they are from."""

    seconds: float
    out_bytes: float
    folder_bytes: float
    basis: str = ""


# Two cores of an AMD EPYC, `make run` of the tiny preset on 2026-11-28, by the stage's name or its group.
SHIPPED_PRESET = "tiny"
SHIPPED = {
    "shards@drawn_text_to_image": Rate(0.0018, 2_850, 0),
    "shards@drawn_image_edit": Rate(0.0028, 4_930, 0),
    "shards": Rate(0.0028, 4_930, 0),
    "mixture": Rate(0.5, 2_000, 0),
    "foundation": Rate(10.0, 14_800_000, 0),
    "latents": Rate(7.5, 4_000, 0),
    "alignment": Rate(0.0183, 640, 17_800_000),
    "sft": Rate(0.0248, 1_020, 99_000_000),
    "mr_grpo": Rate(0.00245, 335, 55_600_000),
    "evaluation": Rate(0.0057, 65, 400_000),
    "export_diffusers": Rate(22.0, 17_300_000, 0),
    "report": Rate(21.5, 340_000, 0),
}
SHOWN = 6  # stages of a group that get a line each
NEWEST = 20  # run folders of a group that are looked at: a group may have thousands


class OverBudget(Plain):
    """The run would take more than `budget` allows, or than the disk holds. Nothing was started."""


@dataclass(frozen=True)
class StagePrediction:
    """One stage that will run. None: not measured yet. samples: built, trained on or scored."""

    stage: str
    samples: int | None
    hours: float | None
    gpu_hours: float
    disk_bytes: float | None
    basis: str


@dataclass(frozen=True)
class Prediction:
    """Of the stages that will run; price is of one GPU for an hour, None where no GPU is asked for."""

    stages: tuple[StagePrediction, ...]
    free_bytes: int
    price: float | None

    @property
    def hours(self) -> float:
        return sum(stage.hours or 0.0 for stage in self.stages)

    @property
    def gpu_hours(self) -> float:
        return sum(stage.gpu_hours for stage in self.stages)

    @property
    def cost(self) -> float:
        return self.gpu_hours * (self.price or 0.0)

    @property
    def disk_bytes(self) -> float:
        return sum(stage.disk_bytes or 0.0 for stage in self.stages)

    @property
    def samples(self) -> int:
        return sum(stage.samples or 0 for stage in self.stages)

    @property
    def is_complete(self) -> bool:
        return all(stage.hours is not None and stage.disk_bytes is not None for stage in self.stages)

    @property
    def total(self) -> str:
        """The sum in one line."""
        parts = [f"{self.hours:.2f} h", f"{shown_size(self.disk_bytes)} of {shown_size(self.free_bytes)} free", f"{self.samples:,} samples"]
        if self.price is not None:
            parts.append(f"{self.gpu_hours:,.1f} GPU-hours, {self.cost:,.0f} at {self.price:g} an hour")
        return ("" if self.is_complete else "at least ") + ", ".join(parts)

    def to_json(self) -> dict[str, Any]:
        sums = {name: getattr(self, name) for name in ("hours", "gpu_hours", "cost", "disk_bytes", "free_bytes", "samples", "is_complete")}
        return sums | {"price_per_gpu_hour": self.price, "stages": [asdict(stage) for stage in self.stages]}


def check_budget(root: Path, params: Params, dvc: DvcCommand, among: Iterable[str] | None = None) -> Prediction:
    """What bringing the stages of `among` (all by default) up to date will take.

    Raises:
        OverBudget: naming each limit, what was predicted, what is allowed, and what to do.
    """
    return within_budget(predict(root, params, stages_to_make(root, dvc, among)), params)


def within_budget(prediction: Prediction, params: Params) -> Prediction:
    """The prediction, if it is within the budget of `params`; raises OverBudget as `check_budget` does."""
    if problems := over_budget(prediction, params):
        raise OverBudget("this run is refused before it starts:\n" + "\n".join(f"  {line}" for line in [*problems, prediction.total]))
    return prediction


def over_budget(prediction: Prediction, params: Params) -> list[str]:
    """One line for each limit that the prediction is above."""
    budget, problems = params.budget, []
    for key, predicted in (("max_hours", prediction.hours), ("max_gpu_hours", prediction.gpu_hours), ("max_cost", prediction.cost)):
        allowed = getattr(budget, key)
        if allowed is not None and predicted > allowed:
            problems.append(
                f"budget.{key}: predicted {predicted:,.2f}, allowed {allowed:g}. Raise it in params.yaml, or ask for less (steps, samples)."
            )
    if prediction.disk_bytes > prediction.free_bytes:
        problems.append(
            f"disk: predicted {shown_size(prediction.disk_bytes)}, free are {shown_size(prediction.free_bytes)}. "
            "`deepgen gc` frees what nothing needs any more."
        )
    return problems


def stages_to_make(root: Path, dvc: DvcCommand, among: Iterable[str] | None = None) -> list[Stage]:
    """The stages that are not up to date, and those that read what will be made anew, in the order of dvc.yaml."""
    stages = load_stages(root, parse_params((root / "params.yaml").read_text()))
    chosen = set(stages) if among is None else set(among)
    clean = dvc.clean_stages()
    made: list[Stage] = []
    for stage in stages.values():
        anew = stage.name not in clean or any(overlap(path, out) for path in stage.inputs for other in made for out in other.outs)
        if anew and stage.name in chosen:
            made.append(stage)
    return made


def predict(root: Path, params: Params, stages: list[Stage]) -> Prediction:
    """From what the last runs took; of a preset for GPUs that never ran here, from published speeds."""
    estimate = _estimate(root, params) if stages and needs_gpu(params) else None
    rates = _shipped(root, params) | _measured(root, params, {stage.group for stage in stages})
    rows = tuple(_predict_stage(root, params, stage, rates, estimate) for stage in stages)
    return Prediction(rows, shutil.disk_usage(root).free, estimate["price_per_gpu_hour"] if estimate else None)


def needs_gpu(params: Params) -> bool:
    """bf16 is what a preset for GPUs computes in; a CPU would emulate it."""
    return params.launch.precision == "bf16"


def describe(prediction: Prediction) -> str:
    """A short table of what will run; empty if nothing will."""
    if not prediction.stages:
        return ""
    rows = [row for _, members in groupby(prediction.stages, lambda row: row.stage.partition("@")[0]) for row in _shortened(list(members))]
    width = max(len(row.stage) for row in rows)
    lines = [f"predicted: {prediction.total}"]
    for row in rows:
        samples = f"{row.samples:,} samples" if row.samples else ""
        minutes = "-" if row.hours is None else f"{row.hours * 60:.1f} min" if row.hours < 10 else f"{row.hours:,.0f} h"
        disk = "-" if row.disk_bytes is None else shown_size(row.disk_bytes)
        lines.append(f"  {row.stage:<{width}} {samples:>18} {minutes:>10} {disk:>9}   {row.basis}")
    return "\n".join(lines)


def _shortened(rows: list[StagePrediction]) -> list[StagePrediction]:
    """The stages of a group, or one line for many of them."""
    if len(rows) <= SHOWN:
        return rows
    group = Prediction(tuple(rows), 0, None)
    name, basis = f"{rows[0].stage.partition('@')[0]} x {len(rows):,}", "" if group.is_complete else "at least: not all are measured yet"
    return [StagePrediction(name, group.samples, group.hours, group.gpu_hours, group.disk_bytes, basis)]


def refuse_over_budget(context: "dg.AssetExecutionContext", root: Path, dvc: DvcCommand) -> None:
    """Once a Dagster run, before its first stage that is not up to date: log what the chosen assets will take, and tag the run with it.

    Raises:
        dagster.Failure: it is above the budget.
    """
    import dagster as dg

    if context.run_id in _allowed:
        return
    params = load_params(root / "params.yaml")
    try:
        prediction = check_budget(root, params, dvc, _chosen(context, root))
    except OverBudget as error:
        raise dg.Failure(str(error), allow_retries=False) from None
    context.log.info(describe(prediction))
    context.instance.add_run_tags(context.run_id, {PREDICTED_TAG: prediction.total})
    _allowed.add(context.run_id)


_allowed: set[str] = set()  # Dagster runs of this process whose prediction was within the budget


def _chosen(context: "dg.AssetExecutionContext", root: Path) -> list[str]:
    """The stages of a Dagster run: those of its assets, of the partitioned ones the partitions it asks for."""
    from orchestration.assets import group_stages

    tags, stages = context.run.tags, load_stages(root, parse_params((root / "params.yaml").read_text()))
    names: list[str] = []
    for asset, members in group_stages(stages).items():
        if not any(key.path[-1] == asset for key in context.selected_asset_keys):
            continue
        keys = [str(stage.key) for stage in members]
        if members[0].meta.get("partitioned"):
            first = tags.get("dagster/partition") or tags.get("dagster/asset_partition_range_start") or keys[0]
            last = tags.get("dagster/partition") or tags.get("dagster/asset_partition_range_end") or keys[-1]
            members = members[keys.index(first) : keys.index(last) + 1]
        names += [stage.name for stage in members]
    return names


# --- one stage ----------------------------------------------------------------------------------------------------------------------


def _predict_stage(root: Path, params: Params, stage: Stage, rates: Mapping[str, Rate], estimate: dict[str, Any] | None) -> StagePrediction:
    samples, amount = _samples(root, params, stage), _amount(root, params, stage)
    rate = rates.get(stage.name) or rates.get(stage.group)
    seconds, disk = None, None
    if amount is None:
        basis = "not measured yet: nobody knows how many samples there are"
    elif rate is not None:
        seconds, disk = rate.seconds * amount + AROUND_SECONDS, CACHED * rate.out_bytes * amount + rate.folder_bytes
        basis = rate.basis
    elif estimate is not None and stage.group in STAGES:
        rows = {row["name"]: row for row in estimate["rows"]}
        time, held = rows[f"{stage.group}: time"], rows[f"{stage.group}: disk"]
        seconds, disk = time["value"] * 3600, held["value"] * 1e9
        basis = f"{estimate['gpus']} x {estimate['gpu']} as published, {time['basis']}"
    else:
        basis = "not measured yet"
    hours = None if seconds is None else seconds / 3600
    ranks = params.launch.processes if stage.group in (*STAGES, "latents") else 1
    gpu_hours = ranks * (hours or 0.0) if estimate is not None and stage.group in GPU_STAGES else 0.0
    return StagePrediction(stage.name, samples, hours, gpu_hours, disk, basis)


def _samples(root: Path, params: Params, stage: Stage) -> int | None:
    """What a stage builds, trains on or scores; 0 where it does the same work whatever the data."""
    parts = {"shards": (stage.key or "",), "latents": params.latents.parts, "evaluation": params.evaluation.parts}
    if stage.group in parts:
        known = [_part_samples(root, params, part) for part in parts[stage.group]]
        return None if None in known else sum(n or 0 for n in known)
    if stage.group == "mr_grpo":
        return params.mr_grpo.steps * params.mr_grpo.prompts_per_step * params.mr_grpo.group_size
    if stage.group in STAGES:
        section = getattr(params, stage.group)
        return int(section.steps * section.batch_size)
    return 0


def _part_samples(root: Path, params: Params, part: str) -> int | None:
    """As asked for; of a part that is read whole, what its last build found."""
    asked = params.data.parts[part].samples
    if asked is None and (shards_folder(root, part) / "manifest.json").is_file():
        return int(read_manifest(shards_folder(root, part))["samples"])
    return asked


def _amount(root: Path, params: Params, stage: Stage) -> float | None:
    """What a stage's time is proportional to: samples, times the passes of the model that each takes; 1 where there are none."""
    samples = _samples(root, params, stage)
    if stage.group == "evaluation":
        passes = float(params.evaluation.sampling_steps * (1 if params.evaluation.guidance == 1 else 2))
    elif stage.group == "mr_grpo":
        trained = params.mr_grpo.stochastic_steps + params.mr_grpo.auxiliary_per_image
        passes = params.mr_grpo.rollout_steps + 3 * trained  # an update is a pass forward and about two back
    else:
        passes = 1
    return None if samples is None else max(samples, 1) * passes


def _measured(root: Path, params: Params, groups: set[str]) -> dict[str, Rate]:
    """By the last finished run in this clone of each stage with this model; under a group's name, of its newest."""
    stages = load_stages(root, parse_params((root / "params.yaml").read_text()))
    rates: dict[str, Rate] = {}
    for group in groups:
        folder = root / "outputs" / "runs" / group
        notes = sorted([*folder.glob(f"*/{ENDED}"), *folder.glob(f"*/*/{ENDED}")], key=lambda note: note.stat().st_mtime, reverse=True)
        for note in notes[:NEWEST]:
            name = "@".join(note.parent.parent.relative_to(root / "outputs" / "runs").parts)
            if name not in rates and name in stages and (rate := _rate_of(root, params, stages[name], note.parent)):
                rates[name] = rate
                rates.setdefault(group, rate)
    return rates


def _rate_of(root: Path, params: Params, stage: Stage, folder: Path) -> Rate | None:
    """By one run; None if it did not finish, or was of another model."""
    ending = ending_of(folder)
    if ending is None or ending["state"] != "finished" or not ending.get("seconds"):
        return None
    try:
        then = check_params(read_json(folder / "run.json")["params"])
        amount = _amount(root, then, stage)
    except (OSError, ValueError, KeyError, ParamsError):  # of a time when params.yaml looked otherwise
        return None
    if amount is None or not _same_model(then, params):
        return None
    beat, seconds = heartbeat_of(folder), float(ending["seconds"])
    if beat is not None and beat["rate"] > 0:  # the last command of a run that went on from a checkpoint was only a part of it
        seconds = max(seconds, beat["total"] / beat["rate"])
    outs = sum(_size(root / out) for out in stage.outs)
    return Rate(seconds / amount, outs / amount, _size(folder), f"as {stage.name} here: {seconds / 60:.1f} min for the last one")


def _shipped(root: Path, params: Params) -> dict[str, Rate]:
    """The rates that come with the project, if the model is the one they are of."""
    preset = root / "presets" / f"{SHIPPED_PRESET}.yaml"
    if not preset.is_file() or not _same_model(load_params(preset), params):
        return {}
    return {name: rate._replace(basis=f"not measured yet here: as {SHIPPED_PRESET} on two cores") for name, rate in SHIPPED.items()}


def _same_model(a: Params, b: Params) -> bool:
    return (a.model, a.launch, a.data.image_size) == (b.model, b.launch, b.data.image_size)


def _estimate(root: Path, params: Params) -> dict[str, Any]:
    """`python -m training estimate`, in a process of its own: it counts on a model, and so imports torch."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "estimate.json"
        command = [sys.executable, "-m", "training", "estimate", "--gpu", params.budget.gpu, "--json", str(file)]
        command += ["--rates", params.budget.rates] if params.budget.rates else []
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        if done.returncode:
            raise OverBudget(f"what the run will take can't be estimated: {done.stderr.strip()[-2000:]}")
        return dict(json.loads(file.read_text()))


def _size(path: Path) -> int:
    """Bytes of a file, or of all files under a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())
