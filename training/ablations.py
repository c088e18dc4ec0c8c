"""The paper's claims at small scale: configurations times seeds, a queue that can be stopped, one JSON a configuration and seed.

Each item is a project folder of its own under outputs/ablations/, with this clone's code, shards and foundation and its own params.yaml.
The stage commands run there as they do here, so that params.yaml, outputs/ and dvc.lock of the project stay as they are.
An experiment of mr_grpo begins with the project's own outputs/sft, which is scored on the same samples as the item `start`.
"""

import copy
import os
import shlex
import shutil
import string
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.exits import DONE, INTERRUPTED, Interrupted, Plain, StopRequest
from runtime.files import read_json, sha256_file, sha256_json, sha256_path, tensors_digest, write_json
from runtime.mlflow_store import open_store
from runtime.params import ParamsError, check_params, check_settings, parse_params
from runtime.progress import Progress
from runtime.recipe import load_stages
from runtime.run_folder import claimed
from runtime.stage import Locked
from training.config import ExperimentConfig

ROOMS = ("data", "model", "training", "runtime")
SHARED = (*ROOMS, "dvc.yaml", "takedown.txt", "foundation")
START = "start"  # the item of an mr_grpo experiment that trains nothing
SCORED = ("data", "model", "evaluation", "launch")  # sections of params.yaml that a score depends on
LEARNT = (*SCORED, "mixture", "foundation", "latents")  # and a model, beside the stages that it was trained in
BEGUN_WITH = ("foundation", "latents", "sft")  # outputs that an item of mr_grpo takes from the project
LETTERS = string.digits + string.ascii_letters
STATE = "state.json"  # of an item: its digests, the stages that are done, their seconds


class OtherResult(Plain):
    """A result is there, but of other params, code, data or foundation."""


class StageFailed(Plain):
    """A stage command of an item failed."""


@dataclass(frozen=True)
class Item:
    """One configuration with one seed. values is its params.yaml; digests say what its result depends on."""

    experiment: str
    configuration: str
    seed: int
    overrides: dict[str, Any]
    values: dict[str, Any]
    digests: dict[str, str]
    root: Path
    own_evaluation: bool  # its evaluation parts have another number of samples than the project's
    trained: tuple[str, ...]  # stages, in order
    guidances: tuple[float, ...] = ()  # at each of which the last stage is scored, sample by sample; (): each stage, as params.yaml says

    @property
    def name(self) -> str:
        return f"{self.configuration}-seed{self.seed}"

    @property
    def result(self) -> Path:
        return self.root / "ablations" / self.experiment / f"{self.name}.json"

    @property
    def project(self) -> Path:
        return self.root / "outputs" / "ablations" / self.experiment / self.name

    @property
    def stages(self) -> list[str]:
        parts = [f"shards@{part}" for part in self.values["evaluation"]["parts"]] if self.own_evaluation else []
        mixtures = [f"mixture@{stage}" for stage in self.trained]
        if self.guidances:
            return [*parts, *mixtures, *self.trained, *(f"evaluation@{self.scored} at {guidance}" for guidance in self.guidances)]
        trained = [name for stage in self.trained for name in (stage, f"evaluation@{stage}")]
        return [*parts, *mixtures, "foundation", "latents", *trained]

    @property
    def scored(self) -> str:
        """The stage whose model is scored at each guidance."""
        return self.trained[-1] if self.trained else "sft"

    def scores_at(self, guidance: float) -> Path:
        return self.project / "outputs" / "scores" / f"guidance-{guidance}"

    def steps(self, stage: str) -> int:
        return self.values[stage]["steps"] if stage in self.trained else 0


def load_experiment(root: Path, name: str) -> ExperimentConfig:
    """`ablations/<name>.yaml`.

    Raises:
        ParamsError: there is none of that name, or a key or value of it is wrong.
    """
    path = root / "ablations" / f"{name}.yaml"
    if not path.is_file():
        known = sorted(file.stem for file in path.parent.glob("*.yaml"))
        raise ParamsError(f"{name}: no such experiment in ablations/; allowed: {', '.join(known) or 'none yet'}")
    named = f"ablations/{path.name}"
    return check_settings(ExperimentConfig, parse_params(path.read_text(), named), named)


def plan_items(root: Path, name: str, samples: int | None = None) -> list[Item]:
    """Every item, all configurations of a seed before the next seed, so that what is done early can be compared; `start` before all.

    Args:
        samples: of each evaluation part; None takes the preset's.

    Raises:
        ParamsError: an override names an unknown key or gives an impossible value.
        FileNotFoundError: the preset's shards are not built, or mr_grpo has no outputs/sft to begin with.
    """
    experiment = load_experiment(root, name)
    preset = root / "presets" / f"{experiment.preset}.yaml"
    if not preset.is_file():
        raise ParamsError(f"ablations/{name}.yaml: preset: {experiment.preset} is no name in presets/")
    values = parse_params(preset.read_text(), preset.name)
    of_start = experiment.stages == ("mr_grpo",)
    planned: list[tuple[str, int, dict[str, Any], dict[str, Any]]] = []
    for seed in range(experiment.seeds):
        untrained: dict[str, dict[str, Any]] = {START: {}} if of_start and seed == 0 else {}
        for configuration, overrides in (untrained | experiment.configurations()).items():
            own = item_values(values, experiment, overrides, seed, samples) | {"registry": values["registry"] | {"experiment": name}}
            check_params(own, f"{configuration} of ablations/{name}.yaml")
            planned.append((configuration, seed, overrides, own))
    first = planned[0][3]
    shared, guidances = shared_digests(root, first, experiment.preset, samples is not None), experiment.guidances
    if of_start:
        guidances = guidances or (float(first["evaluation"]["guidance"]),)
        shared |= {START: start_digest(root), "guidances": sha256_json(guidances)}
    items = []
    for configuration, seed, overrides, own in planned:
        trained = () if configuration == START else experiment.stages
        digests = shared | {"params": params_digest(own, trained)}
        items.append(Item(name, configuration, seed, overrides, own, digests, root, samples is not None, trained, guidances))
    return items


def item_values(
    preset: dict[str, Any], experiment: ExperimentConfig, overrides: dict[str, Any], seed: int, samples: int | None
) -> dict[str, Any]:
    """params.yaml of one item: the preset with fewer steps, overridden by dotted keys, with its own seeds of weights, noise and order."""
    values = copy.deepcopy(preset)
    for stage in experiment.stages:
        values[stage]["steps"] = max(1, round(values[stage]["steps"] * experiment.share_of_steps))
    for dotted, value in (experiment.overrides | overrides).items():
        *sections, key = dotted.split(".")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise ParamsError(f"override {dotted}: {section} holds no keys in presets/{experiment.preset}.yaml; override it as a whole")
        place[key] = value
    for stage in experiment.stages:
        settings, mixture = values[stage], values["mixture"][stage]
        settings["seed"] = seed
        mixture["seed"] += 100 * seed
        if settings.get("auxiliary"):
            settings["auxiliary"]["seed"] = seed
        if mixture.get("auxiliary"):
            mixture["auxiliary"]["seed"] += 100 * seed
    if samples is not None:
        for part in values["evaluation"]["parts"]:
            values["data"]["parts"][part]["samples"] = samples
    return values


def params_digest(values: dict[str, Any], trained: Sequence[str]) -> str:
    """Of what the result of these stages depends on; that of none is a score alone."""
    sections = (*LEARNT, *trained) if trained else SCORED
    return sha256_json({section: values[section] for section in sections})


def start_digest(root: Path) -> str:
    """Of the weights that mr_grpo begins with.

    Raises:
        FileNotFoundError: there are none.
    """
    folder = root / "outputs" / "sft" / "model"
    if not folder.is_dir():
        raise FileNotFoundError("outputs/sft/model is missing: an experiment of mr_grpo begins with it. Make it with `dvc repro sft`.")
    return tensors_digest(folder)


def shared_digests(root: Path, values: dict[str, Any], preset: str, own_evaluation: bool) -> dict[str, str]:
    """What all items read alike: code, foundation by its provenance (a random one is in the params), training data by dataset id.

    Raises:
        FileNotFoundError: a part is not built, or was built with other numbers than the preset's.
    """
    ids = {}
    for part, config in values["data"]["parts"].items():
        if own_evaluation and part in values["evaluation"]["parts"]:
            continue
        manifest = root / "outputs" / "shards" / part / "manifest.json"
        found = read_json(manifest) if manifest.is_file() else None
        if found is None or config["samples"] not in (None, found["counts"]["input"]):
            raise FileNotFoundError(
                f"outputs/shards/{part} {'is missing' if found is None else 'holds another number of records'}: an ablation reads the "
                f"shards of preset {preset}. Build them: `deepgen preset use {preset}`, then `dvc repro shards@{part}` or `deepgen run`."
            )
        ids[part] = found["dataset_id"]
    takedown, provenance = root / "takedown.txt", root / values["foundation"]["path"] / "provenance.json"
    return {
        "code": sha256_json({room: sha256_path(root / room) for room in ROOMS}),
        "data": sha256_json([ids, sha256_file(takedown)]),
        "foundation": sha256_file(provenance) if values["foundation"]["source"] == "folder" else "none",
    }


def run_queue(root: Path, name: str, samples: int | None = None, again: bool = False, jobs: int = 1) -> None:
    """Run what has no result yet, in order.

    Args:
        again: run those anew whose results are of other params, code, data or foundation.
        jobs: items at a time, each with its launch.processes and launch.threads.

    Raises:
        OtherResult: there are such results, and `again` was not asked for.
        Interrupted: asked to stop; the same command goes on in the stage that it was in.
        StageFailed: naming the command, its exit code and its log.
        Locked: another process works on this experiment.
    """
    if jobs < 1:
        raise ParamsError(f"--jobs {jobs}: at least one item at a time")
    items = plan_items(root, name, samples)
    todo = [item for item in items if not has_result(item, again)]
    print(f"{name}: {len(items) - len(todo)} of {len(items)} results are there", flush=True)
    if todo:
        run_items(root, name, items, todo, jobs)
    print(f"{name}: all results are in ablations/{name}/; `python -m training ablate {name} --table` compares them", flush=True)


def run_items(root: Path, name: str, items: list[Item], todo: list[Item], jobs: int) -> None:
    """`jobs` at a time, under the experiment's lock, with one MLflow store for all: outputs/ablations/NAME/outputs/mlflow.

    Where one fails the others are stopped, saved, and go on with the next call.
    """
    folder = root / "outputs" / "ablations" / name
    folder.mkdir(parents=True, exist_ok=True)
    stop = StopRequest()
    stop.install()
    with claimed(folder) as ours:
        if not ours:
            raise Locked(f"{folder.relative_to(root)} is being written by another `ablate {name}`; wait or stop it.")
        paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "MLFLOW_TRACKING_URI": open_store(folder, name)}
        total = sum(item.steps(stage) for item in items for stage in item.trained)
        left = sum(item.steps(stage) for item in todo for stage in item.trained if stage not in read_state(item)["done"])
        with Progress(total, "step", f"ablate {name}", start=total - left) as progress, ThreadPoolExecutor(jobs) as pool:
            writing = threading.Lock()

            def advance(steps: int) -> None:
                with writing:
                    progress.update(steps)

            running = [pool.submit(run_item, item, environment, stop, advance) for item in todo]
            done, _ = wait(running, return_when=FIRST_EXCEPTION)
            if any(future.exception() for future in done):
                stop.ask()
            wait(running)
            raise_first(running)
    stop.over()


def raise_first(ended: list[Future[None]]) -> None:
    """The first failure of them; where there is none, the first that was merely stopped."""
    errors = [error for future in ended if (error := future.exception())]
    for error in sorted(errors, key=lambda error: isinstance(error, Interrupted)):
        raise error


def has_result(item: Item, again: bool) -> bool:
    """Whether the item needs no run. Raises OtherResult for a result of something else, unless it may be replaced."""
    if not item.result.is_file():
        return False
    found = read_json(item.result)["digests"]
    moved = sorted(name for name in found.keys() | item.digests.keys() if found.get(name) != item.digests.get(name))
    if moved and not again:
        raise OtherResult(
            f"{item.result.relative_to(item.root)} is of other {', '.join(moved)} than now. Put that back, or run such items anew with "
            "--again, which replaces their JSON (git keeps the old one)."
        )
    return not moved


def read_state(item: Item) -> dict[str, Any]:
    """How far the item's project folder is; a folder of other digests, or one half made, counts as none."""
    path = item.project / STATE
    state = read_json(path) if path.is_file() else {}
    return state if state.get("digests") == item.digests else {"digests": item.digests, "done": [], "seconds": {}}


def make_project(item: Item) -> None:
    """The item's project folder, anew. Its state is written last: without one the folder counts for nothing."""
    shutil.rmtree(item.project, ignore_errors=True)
    shards = item.project / "outputs" / "shards"
    shards.mkdir(parents=True)
    for name in SHARED:
        (item.project / name).symlink_to(item.root / name)
    own = item.values["evaluation"]["parts"] if item.own_evaluation else ()
    linked = [f"shards/{part}" for part in item.values["data"]["parts"] if part not in own]
    linked += [name for name in BEGUN_WITH if (item.root / "outputs" / name).is_dir()] if item.guidances else []
    for name in linked:  # hard links: a digest does not follow symbolic ones, and nothing published is written in place
        shutil.copytree(item.root / "outputs" / name, item.project / "outputs" / name, copy_function=os.link)
    write_json(item.project / "params.yaml", item.values)  # JSON is YAML
    write_json(item.project / STATE, read_state(item))


def run_item(item: Item, environment: dict[str, str], stop: StopRequest, advance: Callable[[int], None]) -> None:
    """The stages that are not done yet, in order; then the result, written once."""
    if stop:  # in a queue that was stopped every waiting item comes here
        raise Interrupted(f"stopped before {item.name}; the same command goes on")
    if not (item.project / STATE).is_file() or read_json(item.project / STATE)["digests"] != item.digests:
        make_project(item)
    state, log = read_state(item), item.project / "log.txt"
    commands = load_stages(item.project, item.values)
    for stage in item.stages:
        if stage in state["done"]:
            continue
        if stop:
            raise Interrupted(f"stopped before {stage} of {item.name}; the same command goes on")
        print(f"{item.name}: {stage}, as told in {log.relative_to(item.root)}", flush=True)
        name, _, guidance = stage.partition(" at ")
        if guidance:
            evaluation = item.values["evaluation"] | {"guidance": float(guidance)}
            write_json(item.project / "params.yaml", item.values | {"evaluation": evaluation})
        began, command = time.monotonic(), commands[name].cmd
        code = run_command(command, item.project, log, environment, stop)
        state["seconds"][stage] = round(state["seconds"].get(stage, 0.0) + time.monotonic() - began, 1)
        if code == DONE:
            if guidance:
                set_aside(item.project / "outputs" / "evaluation" / item.scored, item.scores_at(float(guidance)))
            state["done"].append(stage)
        write_json(item.project / STATE, state)
        if code == INTERRUPTED or (code < 0 and stop):  # a command that was still importing dies of the signal
            raise Interrupted(f"stopped in {stage} of {item.name}; the same command goes on")
        if code != DONE:
            last = "\n".join(log.read_text().splitlines()[-20:])
            raise StageFailed(f"{item.name}: `{command}` ended with {code}, see {log.relative_to(item.root)}:\n{last}")
        if steps := item.steps(stage):
            advance(steps)
    write_json(item.result, result_of(item, state["seconds"]))
    (item.project / STATE).unlink()
    for name in ("runs", "shards", "mixture", *BEGUN_WITH):  # what was trained, curves and pictures stay
        if name in item.trained:
            continue
        shutil.rmtree(item.project / "outputs" / name, ignore_errors=True)


def set_aside(scores: Path, kept: Path) -> None:
    """Make room for the same evaluation at another guidance."""
    shutil.rmtree(kept, ignore_errors=True)  # of one who was killed before its state was written
    kept.parent.mkdir(exist_ok=True)
    scores.rename(kept)


def run_command(command: str, folder: Path, log: Path, environment: dict[str, str], stop: StopRequest) -> int:
    """Exit code of a stage command of dvc.yaml in an item's folder. Ctrl-C does not reach its session: it is told once, from here."""
    with open(log, "a") as output:
        process = subprocess.Popen(
            [sys.executable, *shlex.split(command)[1:]],
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        told = False
        while process.poll() is None:
            if stop and not told:
                process.terminate()
                told = True
            time.sleep(0.1)
    return process.returncode


def result_of(item: Item, seconds: dict[str, float]) -> dict[str, Any]:
    """What is kept of an item: per stage its steps, parameters, losses, model digest, and scores with 95% intervals (Wilson)."""
    stages = {}
    for stage in item.trained:
        stages[stage] = read_json(item.project / "outputs" / stage / "metrics.json")
        if not item.guidances:
            stages[stage] |= scores_of(item.project / "outputs" / "evaluation" / stage)
    result = {
        "experiment": item.experiment,
        "configuration": item.configuration,
        "seed": item.seed,
        "overrides": item.overrides,
        "digests": item.digests,
        "stages": stages,
        "seconds": seconds,
    }
    if not item.guidances:
        return result
    settings, ratio = item.values["mr_grpo"], item.values["mixture"]["mr_grpo"]["ratio"]
    scored = {str(guidance): scores_of(item.scores_at(guidance)) for guidance in item.guidances}
    for guidance in item.guidances:
        samples = read_json(item.scores_at(guidance) / "samples.json")
        scored[str(guidance)]["outcomes"] = {task: compact(rows) for task, rows in samples.items()}
    return result | {
        "rewards": settings["rewards"],
        "held_out_reward": settings.get("held_out_reward"),
        "tasks": sorted(task for task, share in ratio.items() if share),
        "guidances": scored,
    }


def scores_of(evaluation: Path) -> dict[str, Any]:
    return {
        "model_digest": read_json(evaluation / "gates.json")["model_digest"],
        "evaluation": read_json(evaluation / "metrics.json"),
    }


def compact(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of a task: samples named by a digest of their keys in order, strict as 0 and 1, each part as one letter a sample.

    A letter is the place of the value in the part's `values`, 0-9, then a-z, then A-Z; where a part does not apply there is a `-`.
    """
    parts: dict[str, dict[str, Any]] = {}
    for name in sorted({name for row in samples for name in row["parts"]}):
        found = [row["parts"].get(name) for row in samples]
        values = sorted({value for value in found if value is not None})
        if len(values) > len(LETTERS):
            raise ValueError(f"{name}: {len(values)} different values, expected at most {len(LETTERS)}: the verifier's parts are shares.")
        place = {value: LETTERS[i] for i, value in enumerate(values)} | {None: "-"}
        parts[name] = {"values": values, "samples": "".join(place[value] for value in found)}
    return {
        "keys": sha256_json([row["key"] for row in samples]),
        "strict": "".join("01"[row["strict"]] for row in samples),
        "parts": parts,
    }


def expand(part: dict[str, Any]) -> list[float | None]:
    """A part's value of each sample, None where it does not apply."""
    return [None if letter == "-" else part["values"][LETTERS.index(letter)] for letter in part["samples"]]
