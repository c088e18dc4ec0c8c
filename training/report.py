"""The run on one page: accuracy by category with intervals, stage against stage on the same samples, pictures side by side, curves."""

import contextlib
import json
import math
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.build import build_part
from data.loader import Sample, read_part
from model.weights import load_foundation, load_model
from runtime.exits import Interrupted, Plain
from runtime.files import read_json, sha256_json, sha256_path, tensors_digest, write_json
from runtime.params import STAGES
from runtime.progress import Progress
from runtime.run_folder import SPOOL, run_folders, writer_of
from runtime.stage import StageRun
from training.dit_training import draw_images
from training.page import ALL, FOUNDATION, NO_WORDS, TITLES, columns, headlines, save_pictures, write_page
from training.scoring import Scored, facts, image_seeds, score, score_with, share
from training.spool import Spool
from training.text_encoder import TEXT_ENCODER, load_text_encoder
from training.tracking import attach

FULL = 1000  # samples a part with --full
Row = dict[str, Any]  # training.scoring.facts
Scores = dict[str, dict[str, list[Row]]]  # stage -> task -> rows
Scorer = Callable[[Sequence[Sample], Callable[[int], None]], list[Scored]]


class OtherSamples(Plain):
    """Two stages were scored on different samples: nothing can be compared."""


def run_report(run: StageRun, full: bool = False, as_json: bool = False) -> None:
    """Write `outputs/report/`: figures/ (figures.json and pictures, functions of what the stages left) and index.html, which also says who
    ran when. full: the same of more samples, in `outputs/report/full/`.
    """
    place = run.root / "outputs" / "report"
    folder = run.folder / "out"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        found = score_more(run, place / "full") if full else read_scores(run.root)
    scores = {name: {task: rows[task] for task in TITLES if task in rows} for name, rows in found.items()}
    figures = build_figures(run, scores)
    runs = runs_behind(run.root)
    pictures = save_pictures(run.root, figures, scores, folder)
    write_json(folder / "figures.json", figures)
    page = place / "full" / "index.html" if full else place / "index.html"
    if full:
        write_json(page.parent / "figures.json", figures)
    else:
        run.publish(folder)
        folder = run.out
    write_page(run.root, page, figures, runs, scores, folder)
    behind = runs.get(f"evaluation@{STAGES[-1]}")
    if behind:
        attach(run.root, run.root / behind["folder"], [page, *(folder / name for name in pictures)], "report_full" if full else "report")
    headline = {f"{stage}: {title}": row["strict"] for stage in STAGES for title, row in headlines(figures, stage).items()}
    link = {"raw_value": str(page), "type": "path"}
    run.report(headline | {"page": link}, {name.removesuffix(".png"): folder / name for name in pictures})
    if as_json:
        print(json.dumps(figures, indent=1, sort_keys=True), flush=True)
    else:
        print("\n".join([*as_text(figures), "", f"the page: {page.relative_to(run.root)}"]), flush=True)


def read_scores(root: Path) -> Scores:
    """What the evaluations kept of each sample.

    Raises:
        FileNotFoundError: an evaluation is of a version that kept nothing.
    """
    files = {stage: root / "outputs" / "evaluation" / stage / "samples.json" for stage in STAGES}
    for stage, file in files.items():
        if not file.is_file():
            raise FileNotFoundError(f"{file.relative_to(root)} is missing; make it with `dvc repro evaluation@{stage}` or `deepgen run`.")
    return {stage: read_json(file) for stage, file in files.items()}


# ---------------------------------------------------------------- figures


def build_figures(run: StageRun, scores: Scores) -> dict[str, Any]:
    """Every number of the page. Equal outputs give equal figures: who ran when is not among them."""
    gates = {stage: read_json(run.root / "outputs" / "evaluation" / stage / "gates.json") for stage in STAGES}
    mixtures = {stage: read_json(run.root / "outputs" / "mixture" / f"{stage}.json") for stage in STAGES}
    return {
        "preset": run.params.preset,
        "sampling": {"steps": run.params.evaluation.sampling_steps, "guidance": run.params.evaluation.guidance},
        "models": {stage: gates[stage]["model_digest"] for stage in STAGES},
        "datasets": {
            "evaluation": gates[STAGES[-1]]["evaluation_set"],
            **{stage: {row["part"]: row["dataset_id"] for rows in mixtures[stage]["tasks"].values() for row in rows} for stage in STAGES},
        },
        "accuracy": {
            stage: {
                task: {name: share([row["strict"] for row in some]) for name, some in groups(rows).items()}
                for task, rows in scores[stage].items()
            }
            for stage in scores
        },
        "parts": {stage: {task: part_means(rows) for task, rows in scores[stage].items()} for stage in STAGES},
        "paired": [
            {"before": before, "after": after, "tasks": compare(scores[before], scores[after], before, after)}
            for before, after in zip(STAGES, STAGES[1:], strict=False)
        ],
    }


def groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """A task's rows by name: all, without those that ask for words, seen and held-out combinations where there are any, and each kind."""
    named = {ALL: list(rows)}
    if any(row["kind"] == "word" for row in rows):
        named[NO_WORDS] = [row for row in rows if row["kind"] != "word"]
    if any(row["held_out"] for row in rows):
        named["seen combinations"] = [row for row in rows if not row["held_out"]]
        named["held-out combinations"] = [row for row in rows if row["held_out"]]
    for kind in sorted({row["kind"] for row in rows}):
        named[kind] = [row for row in rows if row["kind"] == kind]
    return {name: some for name, some in named.items() if some}


def part_means(rows: Sequence[Row]) -> dict[str, float]:
    """Mean of each part of the verdict where it applies."""
    values: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        for name, value in row["parts"].items():
            values[name].append(value)
    return {name: round(sum(some) / len(some), 4) for name, some in sorted(values.items())}


def compare(before: dict[str, list[Row]], after: dict[str, list[Row]], first: str, second: str) -> dict[str, dict[str, Any]]:
    """How the share of right ones moved between two stages, on the same samples, in every group.

    Raises:
        OtherSamples: the stages were scored on different ones.
    """
    moved: dict[str, dict[str, Any]] = {}
    for task in before | after:
        keys = [[row["key"] for row in rows.get(task, [])] for rows in (before, after)]
        if keys[0] != keys[1]:
            raise OtherSamples(
                f"{task}: {second} was scored on {len(keys[1])} samples, {first} on {len(keys[0])}, and they are not the same ones. "
                "`deepgen run` scores both on the evaluation set as it is now."
            )
        old, new = groups(before[task]), groups(after[task])
        moved[task] = {name: paired([row["strict"] for row in old[name]], [row["strict"] for row in new[name]]) for name in old}
    return moved


def paired(before: Sequence[bool], after: Sequence[bool]) -> dict[str, Any]:
    """McNemar's comparison: only samples that changed sides say anything.

    standard_error is that of the difference if both stages were equally good: sqrt(gained + lost) / n. falls: the difference is below
    minus two of it.
    """
    gained = sum(now and not then for then, now in zip(before, after, strict=True))
    lost = sum(then and not now for then, now in zip(before, after, strict=True))
    n = len(before)
    return {
        "n": n,
        "gained": gained,
        "lost": lost,
        "difference": round((gained - lost) / n, 4),
        "standard_error": round(math.sqrt(gained + lost) / n, 4),
        "falls": lost - gained > 2 * math.sqrt(gained + lost),
    }


def as_text(figures: dict[str, Any]) -> Iterator[str]:
    """The accuracy table for a terminal: share and 95% interval, and what fell."""
    yield f"{'right, 95% interval':<34} {'n':>5}  " + "".join(f"{name:<23}" for name in columns(figures))
    for task, named in figures["accuracy"][STAGES[-1]].items():
        for name, row in named.items():
            cells = [figures["accuracy"][column][task][name] for column in columns(figures)]
            shown = "".join("{:.3f} [{:.3f}, {:.3f}]   ".format(cell["strict"], *cell["interval_95"]) for cell in cells)
            yield f"{TITLES[task] + ': ' + name:<34} {row['n']:>5}  {shown}".rstrip()
    for pair in figures["paired"]:
        for task, named in pair["tasks"].items():
            for name, row in named.items():
                if row["falls"]:
                    moved = f"{row['difference']:+.3f}, standard error {row['standard_error']:.3f}"
                    yield f"fell from {pair['before']} to {pair['after']}: {TITLES[task]}: {name} ({moved})"


# ---------------------------------------------------------------- who ran when


def runs_behind(root: Path) -> dict[str, dict[str, str]]:
    """Stage -> its latest run that ended with the weights that were evaluated: folder, commit, dirty or not, when. What DVC brought from
    its cache has none here."""
    found: dict[str, dict[str, str]] = {}
    for stage in STAGES:
        digest = read_json(root / "outputs" / "evaluation" / stage / "gates.json")["model_digest"]
        for name in (stage, f"evaluation@{stage}"):
            runs = [facts for folder in _folders_of(root, name) if (facts := _run_facts(root, folder, digest))]
            if runs:
                found[name] = max(runs, key=lambda facts: facts["ended"])
    return found


def _folders_of(root: Path, name: str) -> list[Path]:
    parent = root / "outputs" / "runs" / name.replace("@", "/")
    return [folder for folder in run_folders(root) if folder.parent == parent and writer_of(folder) is None and (folder / SPOOL).exists()]


def _run_facts(root: Path, folder: Path, model_digest: str) -> dict[str, str] | None:
    tags: dict[str, str] = {}
    began = ended = 0
    for event, _ in Spool(folder).read():
        tags |= event["texts"] if event["kind"] == "tags" else {}
        if event["kind"] == "status":
            began, ended = began or event["time"], event["time"]
    if tags.get("model_digest") != model_digest:
        return None
    return {
        "folder": str(folder.relative_to(root)),
        "commit": tags["git_commit"],
        "dirty": tags["git_dirty"],
        "params_digest": tags["digest.params"],
        "began": _clock(began),
        "ended": _clock(ended),
    }


def _clock(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")


# ---------------------------------------------------------------- --full


def score_more(run: StageRun, folder: Path) -> Scores:
    """Every stage's model, and the foundation where it ships its text encoder, on FULL samples of each evaluation part. What is scored is
    kept in `folder`, by the digest of its weights, the settings and the code.

    Raises:
        Interrupted: asked to stop; the same command goes on with the stage that was under way.
    """
    torch.set_num_threads(run.params.launch.threads)
    config = run.params.evaluation
    parts = [list(more_samples(run, name)) for name in config.parts]
    settings = [config.model_dump(mode="json"), [sample.key for samples in parts for sample in samples], run.digests["code"]]
    models = {stage: run.root / "outputs" / stage / "model" for stage in STAGES}
    own = run.root / (run.params.foundation.path or "")
    if run.params.foundation.source == "folder" and (own / TEXT_ENCODER).is_file():
        models = {FOUNDATION: own} | models
    weights = {name: sha256_path(model) if name == FOUNDATION else tensors_digest(model) for name, model in models.items()}
    digests = {name: sha256_json([digest, settings]) for name, digest in weights.items()}
    scores: Scores = {}
    for name in models:
        kept = read_json(folder / f"{name}.json") if (folder / f"{name}.json").exists() else {}
        if kept.get("digest") == digests[name]:
            scores[name] = kept["samples"]
    each = sum(len(samples) for samples in parts)
    log = run.folder / "progress.jsonl"
    with Progress(each * len(models), "image", "report", log, start=each * len(scores)) as progress:

        def count(images: int) -> None:
            progress.update(images)
            if run.stop and progress.done < progress.total:
                raise Interrupted(
                    f"stopped at image {progress.done} of {progress.total}; the same command goes on from the last whole stage"
                )

        for name in models:
            if name in scores:
                continue
            scorer = foundation_scorer(run, models[name]) if name == FOUNDATION else model_scorer(run, models[name])
            rows = [scorer(samples, count) for samples in parts]
            scores[name] = {samples[0].task: [facts(row) for row in scored] for samples, scored in zip(parts, rows, strict=True)}
            write_json(folder / f"{name}.json", {"digest": digests[name], "samples": scores[name]})
    return scores


def model_scorer(run: StageRun, folder: Path) -> Scorer:
    config, model = run.params.evaluation, load_model(folder)
    return lambda samples, count: score(model, samples, config.sampling_steps, config.guidance, config.batch_size, config.seed, count)


def foundation_scorer(run: StageRun, folder: Path) -> Scorer:
    """Of the foundation's DiT from its own plain text encoder, as it was trained: what the stages come from, and aim for."""
    config, shapes = run.params.evaluation, run.params.model
    model = load_foundation(folder, shapes).eval()
    encoder = load_text_encoder(folder, shapes)

    def draw(batch: Sequence[Sample]) -> np.ndarray:
        return draw_images(model, encoder, batch, image_seeds(batch, config.seed), config.sampling_steps)

    return lambda samples, count: score_with(draw, samples, config.batch_size, count)


def more_samples(run: StageRun, name: str) -> Iterator[Sample]:
    """FULL samples as the part defines them: a drawn part is drawn further, and holds what its shards hold; another ends there."""
    part = run.params.data.parts[name]
    if part.source != "drawn":
        yield from read_part(run.root / "outputs" / "shards" / name)
        return
    more = part.model_copy(update={"samples": max(FULL, part.samples or 0)})
    with tempfile.TemporaryDirectory(dir=run.folder) as folder:
        build_part(name, run.params.data.model_copy(update={"parts": {name: more}}), Path(folder), run.root)
        yield from read_part(Path(folder))
