"""A run with other settings than params.yaml has, from the launchpad: marked experimental, and never recorded in dvc.lock.

outputs/experiments/ID/ is a project beside the project: links to the code, params.yaml and outputs of its own. What they don't touch
is taken from this clone where dvc.lock says that it is up to date. The rest runs there by the same commands, tagged in MLflow.
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import dagster as dg

from orchestration.budget import PREDICTED_TAG, describe, predict, within_budget
from orchestration.comparison import draw_comparison
from orchestration.console import say
from orchestration.dvc import DvcCommand
from orchestration.launchpad import config_of, flat, merged
from orchestration.stage_process import StageFailed, StageProcess
from runtime.environment import git_state
from runtime.exits import Plain
from runtime.files import read_json, sha256_json, write_json
from runtime.mlflow_store import open_store
from runtime.params import STAGES, Params, ParamsError, check_params, load_params, parse_params
from runtime.recipe import Stage, load_stages, look_up, stages_above
from runtime.stage import EXPERIMENT, picture_markdown

FOLDER = Path("outputs/experiments")
TAG = "deepgen/experimental"
OWN = ("outputs", "params.yaml", "dvc.lock")  # of an experiment; all else is this clone's
LAST = f"evaluation@{STAGES[-1]}"


class NothingToTry(Plain):
    """The overrides leave params.yaml as it is, or no stage that is asked for reads what they change."""


@dataclass(frozen=True)
class Experiment:
    """What will be run where. `taken`: stages whose outputs are this clone's; `run`: the others, in their order.

    identity: of the same settings, code and taken outputs, which are the same experiment, and go on where it stopped.
    """

    root: Path
    identity: str
    overrides: dict[str, Any]
    values: dict[str, Any]
    taken: list[Stage]
    run: list[Stage]

    @property
    def folder(self) -> Path:
        return self.root / FOLDER / self.identity


def plan(root: Path, overrides: dict[str, Any], last: str, dvc: DvcCommand) -> Experiment:
    """Which stages an experiment needs, and which of them are untouched and up to date.

    Raises:
        ParamsError: an override names an unknown key or gives an impossible value, or there is no stage `last`.
        NothingToTry: nothing would be other than in this clone.
    """
    before = parse_params((root / "params.yaml").read_text())
    values = merged(before, overrides)
    check_params(values, "the launchpad's overrides on params.yaml")
    stages = load_stages(root, values)
    if last not in stages:
        raise ParamsError(f"last: {last!r} is no stage of dvc.yaml; allowed: {', '.join(stages)}")
    if values == before:
        raise NothingToTry("the overrides leave params.yaml as it is: materialize the assets instead.")
    above = {name: stages_above(stage, stages) for name, stage in stages.items()}
    needed, known = _needed(last, above), load_stages(root, before)
    changed = {name for name in needed if name not in known or _params(stages[name], values) != _params(known[name], before)}
    if not changed:
        raise NothingToTry(f"no stage up to {last} reads {', '.join(flat(overrides))}: nothing would be other than it is.")
    clean = dvc.clean_stages() - changed
    run: list[str] = []
    for name in needed:
        if name not in clean or not above[name].isdisjoint(run):
            run.append(name)
    taken = {name: md5 for name, md5 in dvc.recorded().items() if name in needed and name not in run}
    identity = sha256_json([values, taken, git_state(root)])[:12]
    return Experiment(root, identity, overrides, values, [stages[name] for name in taken], [stages[name] for name in run])


def _needed(last: str, above: Mapping[str, set[str]]) -> list[str]:
    """`last` and all that it grows from, each after what it reads."""
    wanted, found = [last], {last}
    while wanted:
        new = above[wanted.pop()] - found
        found |= new
        wanted += new
    return list(TopologicalSorter({name: sorted(above[name]) for name in sorted(found)}).static_order())


def _params(stage: Stage, values: dict[str, Any]) -> dict[str, Any]:
    return {"cmd": stage.cmd} | {key: look_up(values, key) for key in stage.params}


def make_project(experiment: Experiment) -> None:
    """The folder, if it is not there yet. params.yaml is written last: a folder without it is made anew."""
    root, folder = experiment.root, experiment.folder
    if (folder / "params.yaml").is_file():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for entry in root.iterdir():
        if entry.name not in OWN and not entry.name.startswith("."):
            (folder / entry.name).symlink_to(entry)
    for out in (out for stage in experiment.taken for out in stage.outs):
        target = folder / out
        target.parent.mkdir(parents=True, exist_ok=True)
        if (root / out).is_dir():  # hard links: a digest does not follow symbolic ones, and nothing published is written in place
            shutil.copytree(root / out, target, copy_function=os.link)
        else:
            os.link(root / out, target)
    write_json(folder / "params.yaml", experiment.values)  # JSON is YAML


def run_experiment(context: dg.OpExecutionContext, experiment: Experiment, params: Params) -> dict[str, Any]:
    """Run what it changes; the metadata to show.

    Raises:
        StageFailed: a stage ended with a code other than 0. The same launch goes on there.
    """
    root, folder = experiment.root, experiment.folder
    make_project(experiment)
    told = {"id": experiment.identity, "overrides": flat(experiment.overrides), "dagster_run": context.run_id} | git_state(root)
    write_json(folder / "experiment.json", told)
    mark = {EXPERIMENT: experiment.identity, "PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))}
    mark["MLFLOW_TRACKING_URI"] = open_store(root, params.registry.experiment)
    process = StageProcess(folder)
    for stage in experiment.taken:
        say(f"{stage.name}: untouched, taken as it is")
    for stage in experiment.run:
        if all((folder / out).exists() for out in stage.outs):
            say(f"{stage.name}: done before")
            continue
        say(f"{stage.name}: {stage.cmd}")
        process.run_plainly(context, stage, mark)
    return told | {"folder": dg.MetadataValue.path(str(folder))} | _results(experiment)


def _results(experiment: Experiment) -> dict[str, Any]:
    """Scores of what it evaluated last, and pictures of them beside this clone's, where that was evaluated on the same set."""
    evaluated = [stage.outs[0] for stage in (*experiment.taken, *experiment.run) if stage.group == "evaluation"]
    if not evaluated or not (experiment.folder / evaluated[-1] / "metrics.json").is_file():
        return {}
    ours, theirs = experiment.root / evaluated[-1], experiment.folder / evaluated[-1]
    metrics = read_json(theirs / "metrics.json")
    shown: dict[str, Any] = {f"{task} strict": row["strict"] for task, row in metrics.items()}
    pictures, why_not = draw_comparison(
        experiment.root, {"params.yaml": ours, "overrides": theirs}, experiment.folder / "outputs" / "comparison"
    )
    if not pictures:
        return shown | {"compared": why_not}
    return shown | {f"beside params.yaml: {file.stem}": dg.MetadataValue.md(picture_markdown(file)) for file in pictures}


def build_experiment_job(root: Path, stages: Mapping[str, Stage]) -> dg.JobDefinition:
    """The job `experiment`, whose launchpad takes any setting of params.yaml."""
    names = [stage.name for stage in stages.values() if stage.group != "shards"]
    schema = {
        "overrides": dg.Field(config_of(Params, "params"), description="settings that differ from params.yaml; the rest is as it is there"),
        "last": dg.Field(
            dg.Enum("last_stage", [dg.EnumValue(name) for name in names]),
            is_required=False,
            default_value=LAST if LAST in names else names[-1],
            description="the stage at which it ends",
        ),
    }

    @dg.op(name="try_settings", config_schema=schema, pool="gpu")
    def try_settings(context: dg.OpExecutionContext, dvc: dg.ResourceParam[DvcCommand]) -> None:
        config: dict[str, Any] = context.op_config
        try:
            experiment = plan(root, config["overrides"], config["last"], dvc)
            params, tried = load_params(root / "params.yaml"), check_params(experiment.values)
            prediction = within_budget(predict(root, tried, experiment.run), params)  # an override does not raise the budget
            context.log.info(describe(prediction))
            context.instance.add_run_tags(context.run_id, {TAG: experiment.identity, PREDICTED_TAG: prediction.total})
            context.add_output_metadata(run_experiment(context, experiment, tried))
        except StageFailed as error:
            raise dg.Failure(str(error), allow_retries=False, metadata=error.metadata) from None
        except (Plain, ParamsError) as error:
            raise dg.Failure(f"experiment: {error}", allow_retries=False) from None

    @dg.job(
        name="experiment",
        tags={TAG: "true"},
        description="Trains with other settings, in a folder of its own: params.yaml, outputs and dvc.lock stay as they are.",
    )
    def job() -> None:
        try_settings()

    return job
