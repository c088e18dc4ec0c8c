"""The page of a run: whole in itself, its numbers the evaluation's, its comparisons sample by sample."""

import json
import math
import re
import shutil
from collections.abc import Callable
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from mlflow import MlflowClient
from PIL import Image
from safetensors.torch import save_file
from scipy.stats import binomtest

from data.verifier import Verdict
from model.weights import load_model, save_model
from runtime.exits import Interrupted, StopRequest
from runtime.files import read_json, sha256_bytes, sha256_path, write_json
from runtime.mlflow_store import open_store
from runtime.params import STAGES, load_params
from training import report, scoring
from training.evaluate import run_evaluation
from training.pictures import Shown, save_strips
from training.report import OtherSamples, compare, groups, paired, run_report
from training.scoring import share
from training.text_encoder import TEXT_ENCODER, PlainTextEncoder

from .conftest import begin

HISTORY = [{"step": step, "loss": 1 / step} for step in (1, 2)]


@pytest.fixture(scope="module")
def evaluated(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose three models, all of the foundation but one weight, were evaluated. What is right is drawn by lot, for models of
    seconds draw nothing that is."""
    root = tmp_path_factory.mktemp("evaluated") / "project"
    shutil.copytree(built, root, symlinks=True, ignore=shutil.ignore_patterns("runs"))
    for number, stage in enumerate(STAGES):
        model = load_model(root / "outputs" / "foundation" / "model")
        with torch.no_grad():
            next(model.dit.parameters()).mul_(1 + number / 10)
        save_model(model, root / "outputs" / stage / "model")
        rewards = [row | {"reward": row["loss"], "reward_count": row["loss"]} for row in HISTORY] if stage == "mr_grpo" else HISTORY
        write_json(root / "outputs" / stage / "history.json", rewards)
        with begin(root, f"evaluation@{stage}") as run, pytest.MonkeyPatch.context() as patch:
            patch.setattr(scoring, "verify", by_lot)
            run_evaluation(run, stage)
    return root


def by_lot(scene: dict, image: np.ndarray, task: str) -> Verdict:
    lot = sha256_bytes(image.tobytes())
    return Verdict(lot[0] < "8", {"count": int(lot[1], 16) / 16, "color": 1.0})


@pytest.fixture(scope="module")
def reported(evaluated: Path) -> tuple[Path, dict, str]:
    """That project with its report, its figures and its page; no test changes it."""
    return evaluated, *write_report(evaluated)


@pytest.fixture
def project(evaluated: Path, tmp_path: Path) -> Path:
    shutil.copytree(evaluated, tmp_path / "project", symlinks=True, ignore=shutil.ignore_patterns("report"))
    return tmp_path / "project"


def write_report(root: Path, full: bool = False, stop: StopRequest | None = None) -> tuple[dict, str]:
    """Its figures and its page."""
    with begin(root, "report", stop) as run:
        run_report(run, full)
    place = root / "outputs" / "report"
    page = place / "full" / "index.html" if full else place / "index.html"
    figures = place / "full" / "figures.json" if full else place / "figures" / "figures.json"
    return read_json(figures), page.read_text()


def test_the_page_refers_to_nothing_outside_of_itself(reported: tuple):
    _, _, page = reported
    places = re.findall(r"""(?:src|srcset|href|action|data)\s*=\s*["']?([^"'\s>]+)""", page) + re.findall(r"url\(([^)]*)\)", page)
    assert places and all(place.startswith("data:image/png;base64,") for place in places)
    assert not re.search(r"<script|<link|@import|https?://", page)
    assert len(page) < 3_000_000


def test_every_stage_and_category_of_the_metrics_is_there_with_its_numbers(reported: tuple):
    project, figures, page = reported
    words = unescape(re.sub(r"<[^>]+>", " ", page))
    for stage in STAGES:
        metrics = read_json(project / "outputs" / "evaluation" / stage / "metrics.json")
        assert stage in words and metrics.keys() == figures["accuracy"][stage].keys()
        for task, row in metrics.items():
            found = figures["accuracy"][stage][task]
            assert {name: row[name] for name in ("n", "strict", "interval_95")} == found["all"]
            assert row["parts"] == figures["parts"][stage][task]
            for kind, value in row["kinds"].items():
                assert value == {name: found[kind][name] for name in value}
                assert kind in words and f"{value['strict']:.3f} [{found[kind]['interval_95'][0]:.3f}, " in re.sub(r"\s+", " ", words)


def test_every_kept_sample_is_shown_before_after_each_stage_and_as_it_should_be(reported: tuple):
    _, _, page = reported
    for stage in STAGES:
        assert page.count(f'<img alt="{stage}"') == 16, "8 a task"
    assert page.count('<img alt="before"') >= page.count('<img alt="target"') == 8


def test_a_report_made_again_has_the_same_figures_and_pictures(reported: tuple, project: Path):
    write_report(project)
    assert sha256_path(project / "outputs" / "report" / "figures") == sha256_path(reported[0] / "outputs" / "report" / "figures")


def test_it_says_which_runs_are_behind_it_and_they_keep_the_page(reported: tuple):
    project, _, page = reported
    (folder,) = (project / "outputs" / "runs" / "evaluation" / "mr_grpo").glob("*")
    assert str(folder.relative_to(project)) in page
    artifacts = MlflowClient(open_store(project)).list_artifacts(read_json(folder / "mlflow.json")["run_id"], "report")
    assert {"report/index.html", "report/accuracy.png", "report/stages_image_edit.png"} <= {item.path for item in artifacts}


def test_a_share_comes_with_wilsons_interval():
    interval = binomtest(8, 10).proportion_ci(method="wilson")
    assert share([True] * 8 + [False] * 2) == {"n": 10, "strict": 0.8, "interval_95": [round(interval.low, 4), round(interval.high, 4)]}
    assert [str(end) for n in (3, 17, 29) for end in (share([False] * n)["interval_95"][0], share([True] * n)["interval_95"][1])] == [
        "0.0",
        "1.0",
    ] * 3


def test_a_paired_difference_counts_only_what_changed_sides():
    before = [True] * 60 + [False] * 40
    after = [True] * 45 + [False] * 15 + [True] * 3 + [False] * 37  # 15 lost, 3 gained
    row = paired(before, after)
    assert (row["n"], row["gained"], row["lost"]) == (100, 3, 15)
    assert row["difference"] == -0.12 and row["standard_error"] == round(math.sqrt(18) / 100, 4)
    assert row["falls"], "12 is more than twice the root of 18"
    assert not paired(after, before)["falls"], "a rise is no fall"
    assert not paired([True] * 4, [False] * 4)["falls"], "four of four is not beyond chance"
    assert paired(before, before) == {"n": 100, "gained": 0, "lost": 0, "difference": 0.0, "standard_error": 0.0, "falls": False}


def row(key: str, kind: str = "single", strict: bool = True, held_out: bool = False) -> dict:
    return {"key": key, "kind": kind, "prompt": "", "held_out": held_out, "strict": strict, "parts": {}}


def test_seen_and_held_out_combinations_are_told_apart_where_there_are_any():
    rows = [row("a"), row("b", "word"), row("c", held_out=True)]
    assert {name: [one["key"] for one in some] for name, some in groups(rows).items()} == {
        "all": ["a", "b", "c"],
        "without words": ["a", "c"],
        "seen combinations": ["a", "b"],
        "held-out combinations": ["c"],
        "single": ["a", "c"],
        "word": ["b"],
    }
    assert groups(rows[:1]).keys() == {"all", "single"}


def test_stages_that_were_scored_on_different_samples_are_not_compared():
    with pytest.raises(OtherSamples, match="text_to_image: sft was scored on 1 samples, alignment on 1, and they are not the same"):
        compare({"text_to_image": [row("a")]}, {"text_to_image": [row("b")]}, "alignment", "sft")


def test_without_an_evaluation_it_names_what_is_missing_and_the_command(project: Path):
    (project / "outputs" / "evaluation" / "mr_grpo" / "samples.json").unlink()
    with pytest.raises(
        FileNotFoundError, match="mr_grpo/samples.json is missing; make it with `dvc repro evaluation@mr_grpo` or `deepgen run"
    ):
        write_report(project)
    shutil.rmtree(project / "outputs" / "evaluation" / "sft")
    with pytest.raises(FileNotFoundError, match="outputs/evaluation/sft is missing; make it with `dvc repro report` or `deepgen run`"):
        write_report(project)
    assert not (project / "outputs" / "report").exists()


class StopAfter(StopRequest):
    """Asks to stop once it was looked at this often."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.looks = looks

    def __bool__(self) -> bool:
        self.looks -= 1
        return self.looks < 0


@pytest.mark.slow
def test_more_samples_interrupted_and_gone_on_give_what_an_uninterrupted_count_gives(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(report, "FULL", 26)
    shutil.copytree(project, tmp_path / "other", symlinks=True)
    whole, _ = write_report(tmp_path / "other", full=True)
    with pytest.raises(Interrupted, match="the same command goes on"):
        write_report(project, full=True, stop=StopAfter(batches(project) + 1))
    kept = sorted(path.name for path in (project / "outputs" / "report" / "full").iterdir())
    assert kept == ["alignment.json"], "the stage that was whole"
    monkeypatch.setattr(report, "load_model", refusing("alignment", report.load_model))
    capsys.readouterr()
    gone_on, page = write_report(project, full=True)
    assert gone_on == whole and "n 26" in page
    assert "report: 156/156 images" in capsys.readouterr().out
    assert gone_on["accuracy"]["sft"]["image_edit"]["all"]["n"] == 26


@pytest.mark.slow
def test_a_full_count_has_a_column_for_a_foundation_that_ships_its_text_encoder(
    project: Path, edit_params: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(report, "FULL", 24)
    shutil.copytree(project / "outputs" / "foundation" / "model", project / "own")
    shapes = load_params(project / "params.yaml").model
    encoder = PlainTextEncoder(shapes.vlm.vocab_size, shapes.dit.joint_attention_dim, shapes.dit.pooled_projection_dim)
    save_file(encoder.state_dict(), project / "own" / TEXT_ENCODER)
    edit_params(project, lambda params: params["foundation"].update(source="folder", path="own"))
    figures, page = write_report(project, full=True)
    assert list(figures["accuracy"]) == ["alignment", "foundation", "mr_grpo", "sft"]
    assert figures["accuracy"]["foundation"]["image_edit"]["all"]["n"] == 24
    assert "<th>n</th><th>foundation</th><th>alignment</th>" in page
    assert re.search(r"n  foundation +alignment", capsys.readouterr().out)


def batches(root: Path) -> int:
    """Looks at the stop request that one stage takes: one a batch of at most `batch_size` images, for each task."""
    size = yaml.safe_load((root / "params.yaml").read_text())["evaluation"]["batch_size"]
    return 2 * math.ceil(26 / size)


def refusing(stage: str, load: Callable) -> Callable:
    def loaded(folder: Path):
        assert folder.parent.name != stage, f"{stage} was scored already"
        return load(folder)

    return loaded


def test_more_samples_hold_those_of_the_shards(project: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(report, "FULL", 26)
    with begin(project, "report") as run:
        for part in run.params.evaluation.parts:
            task = run.params.data.parts[part].task
            keys = [sample.key for sample in report.more_samples(run, part)]
            scored = [row["key"] for row in read_json(project / "outputs" / "evaluation" / "sft" / "samples.json")[task]]
            assert len(keys) == 26 and set(scored) <= set(keys)


def test_asked_for_json_it_prints_the_figures_and_nothing_else(project: Path, capsys: pytest.CaptureFixture):
    with begin(project, "report") as run:
        capsys.readouterr()
        run_report(run, as_json=True)
    assert json.loads(capsys.readouterr().out) == read_json(project / "outputs" / "report" / "figures" / "figures.json")


def test_the_pictures_that_rewards_tell_apart_are_on_the_page_where_there_are_any(reported: tuple, project: Path):
    assert "What the rewards tell apart" not in reported[2]
    shown = [Shown("count", "a red circle", value, np.full((64, 64, 3), light, np.uint8)) for value, light in ((1.0, 250), (0.0, 20))]
    folder = project / "outputs" / "mr_grpo" / "strips"
    folder.mkdir()
    for update in (8, 16):
        save_strips(shown, folder / f"update-{update:06d}.png")
    with Image.open(folder / "update-000008.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert (pixels[20, 20] > 240).all() and (pixels[200, 20] < 30).all(), "the best is above the worst"
    _, page = write_report(project)
    assert "What the rewards tell apart" in page and page.index("update 000008") < page.index("update 000016")


def test_large_pictures_are_reduced_for_a_strip_so_that_a_page_of_them_can_be_mailed(tmp_path: Path):
    rng = np.random.default_rng(0)
    large = [np.asarray(Image.fromarray(rng.integers(0, 256, (32, 24, 3), np.uint8)).resize((384, 512))) for _ in range(8)]
    save_strips([Shown("clip", "a red circle", 0.5, image) for image in large], tmp_path / "strip.png")
    with Image.open(tmp_path / "strip.png") as image:
        assert image.size == (4 * (144 + 4) + 4, 2 * (192 + 14 + 4) + 4)
    assert (tmp_path / "strip.png").stat().st_size < 150_000
