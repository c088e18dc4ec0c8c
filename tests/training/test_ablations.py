"""A queue of configurations and seeds that can be stopped, repeats nothing, and leaves the project as it is."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from data.stages import run_shards
from runtime.exits import Interrupted, StopRequest
from runtime.files import read_json, sha256_path, tensors_digest, write_json
from runtime.params import ParamsError, check_params
from training import ablations
from training.ablation_table import changes, interval, paired_interval, reinforced_table, score_of, table
from training.ablations import Item, OtherResult, StageFailed, item_values, load_experiment, plan_items, run_queue
from training.config import ExperimentConfig
from training.evaluate import run_evaluation

from .conftest import REPO, begin
from .test_resume import StopAt, run_stage

EXPERIMENT = {
    "preset": "nano",
    "share_of_steps": 0.5,
    "seeds": 2,
    "base": "as the smoke preset",
    "variants": {
        "last_layer": {
            "claim": "six layers are better",
            "paper": "table 6",
            "expected": "lower",
            "overrides": {"model.vlm.stacked_layers": [6]},
        }
    },
}


@pytest.fixture
def nano(project: Path) -> Path:
    """A built project with an experiment and the preset that it names."""
    for folder in ("ablations", "presets"):
        (project / folder).mkdir()
    (project / "presets" / "nano.yaml").write_text((project / "params.yaml").read_text())
    return declare(project, EXPERIMENT)


def declare(project: Path, experiment: dict) -> Path:
    (project / "ablations" / "nano.yaml").write_text(yaml.safe_dump(experiment))
    return project


def start(project: Path, *options: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    command = [sys.executable, "-m", "training", "ablate", "nano", *options]
    return subprocess.Popen(command, cwd=project, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run_alone(project: Path, copy: Path, values: dict) -> Path:
    """A copy of the project in which the stages ran once, in this process."""
    shutil.copytree(project, copy, symlinks=True)
    (copy / "params.yaml").write_text(yaml.safe_dump(values))
    for part in values["evaluation"]["parts"]:
        with begin(copy, f"shards@{part}") as run:
            run_shards(run)
    for stage in ("alignment", "sft"):
        run_stage(copy, stage)
        with begin(copy, f"evaluation@{stage}") as run:
            run_evaluation(run, stage)
    return copy


def test_all_configurations_of_a_seed_come_before_the_next_seed_and_read_the_same_data_in_the_same_order(nano: Path):
    items = plan_items(nano, "nano")
    assert [item.name for item in items] == ["base-seed0", "last_layer-seed0", "base-seed1", "last_layer-seed1"]
    base, other, next_base, _ = (item.values for item in items)
    assert base["mixture"] == other["mixture"] != next_base["mixture"]
    assert (base["alignment"]["seed"], next_base["sft"]["seed"], base["alignment"]["steps"]) == (0, 1, 2)
    assert other["model"]["vlm"]["stacked_layers"] == [6]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"model.connector.think_tokens": 0}, r"model\.connector\.think_tokens: unknown key; did you mean 'num_think_tokens'"),
        ({"modle.connector.layers": 1}, r"modle: unknown key; did you mean 'model'"),
        ({"alignment.lora.rank": 4}, r"alignment\.lora\.rank: lora holds no keys"),
        ({"model.vlm.stacked_layers": [7]}, r"last_layer of ablations/nano\.yaml can't be used:\n.*\[7\] lie beyond"),
    ],
)
def test_an_override_that_params_do_not_allow_is_refused_before_any_work(nano: Path, overrides: dict, said: str):
    variant = EXPERIMENT["variants"]["last_layer"] | {"overrides": overrides}
    declare(nano, EXPERIMENT | {"variants": {"last_layer": variant}})
    with pytest.raises(ParamsError, match=said):
        run_queue(nano, "nano")
    assert not (nano / "outputs" / "ablations").exists()


def test_shards_of_another_preset_are_refused_with_the_command_that_builds_them(nano: Path):
    preset = yaml.safe_load((nano / "presets" / "nano.yaml").read_text())
    preset["data"]["parts"]["drawn_image_edit"]["samples"] = 25
    (nano / "presets" / "nano.yaml").write_text(yaml.safe_dump(preset))
    with pytest.raises(
        FileNotFoundError, match=r"another number of records.*`deepgen preset use nano`, then `dvc repro shards@drawn_image_edit`"
    ):
        run_queue(nano, "nano")


def test_a_result_is_not_run_twice_and_one_of_something_else_is_refused(nano: Path, capsys: pytest.CaptureFixture[str]):
    items = plan_items(nano, "nano")
    for item in items:
        write_json(item.result, {"digests": item.digests})
    run_queue(nano, "nano")
    assert "4 of 4 results are there" in capsys.readouterr().out
    assert not (nano / "outputs" / "ablations").exists()

    write_json(items[1].result, {"digests": items[1].digests | {"code": "of yesterday"}})
    with pytest.raises(OtherResult, match=r"last_layer-seed0\.json is of other code than now\. Put that back, or .* --again"):
        run_queue(nano, "nano")
    declare(nano, EXPERIMENT | {"share_of_steps": 1.0})
    with pytest.raises(OtherResult, match=r"base-seed0\.json is of other params than now"):
        run_queue(nano, "nano")


def test_an_item_of_a_stopped_queue_makes_no_folder(nano: Path):
    stop, item = StopRequest(), plan_items(nano, "nano")[0]
    stop.ask()
    with pytest.raises(Interrupted, match="stopped before base-seed0"):
        ablations.run_item(item, {}, stop, print)
    assert not item.project.exists()


def test_two_at_a_time_are_two_and_where_one_fails_the_other_is_stopped_and_no_more_begin(nano: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(StopRequest, "install", lambda stop: None)
    both, begun = threading.Barrier(2, timeout=60), []

    def run_item(item: Item, environment: dict, stop: StopRequest, advance: Callable) -> None:
        begun.append(item.name)
        if stop:
            raise Interrupted(f"stopped before {item.name}")
        both.wait()
        if item.name == "last_layer-seed0":
            raise StageFailed("out of memory")
        while not stop:
            time.sleep(0.01)
        raise Interrupted(f"stopped in {item.name}")

    monkeypatch.setattr(ablations, "run_item", run_item)
    with pytest.raises(StageFailed, match="out of memory"):
        run_queue(nano, "nano", jobs=2)
    assert set(begun[:2]) == {"base-seed0", "last_layer-seed0"}
    with pytest.raises(ParamsError, match="--jobs 0: at least one"):
        run_queue(nano, "nano", jobs=0)


@pytest.mark.slow
@pytest.mark.timeout(1200)  # a dozen processes, one after the other
def test_a_queue_stopped_in_sft_goes_on_to_the_figures_of_stages_that_nothing_stopped(nano: Path, tmp_path: Path):
    declare(nano, EXPERIMENT | {"seeds": 1, "share_of_steps": 1.0})
    base, other = plan_items(nano, "nano", samples=5)
    write_json(other.result, {"digests": other.digests})
    alone = run_alone(nano, tmp_path / "alone", base.values)
    before = {path.name: sha256_path(path) for path in [*(nano / "outputs").iterdir(), nano / "params.yaml"]}

    first = start(nano, "--samples", "5")
    while first.poll() is None and not list((base.project / "outputs" / "runs").glob("sft/*/step-000002")):
        time.sleep(0.01)
    first.send_signal(signal.SIGTERM)
    said = first.communicate(timeout=600)[0]
    assert first.returncode == 75 and "stopped in sft of base-seed0; the same command goes on" in said
    assert not base.result.exists()

    second = start(nano, "--samples", "5")
    said = second.communicate(timeout=600)[0]
    assert second.returncode == 0 and "base-seed0: sft" in said and "base-seed0: alignment" not in said, said
    assert "sft: going on from step" in (base.project / "log.txt").read_text()
    result = read_json(base.result)
    assert (result["configuration"], result["overrides"], result["digests"]) == ("base", {}, base.digests)
    for stage, row in result["stages"].items():
        assert row["model_digest"] == tensors_digest(alone / "outputs" / stage / "model")
        metrics, scores = (read_json(alone / "outputs" / place / "metrics.json") for place in (stage, f"evaluation/{stage}"))
        assert metrics == {name: row[name] for name in metrics}
        for task, score in scores.items():
            assert row["evaluation"][task] == score and score["n"] == 5

    after = {path.name: sha256_path(path) for path in [*(nano / "outputs").iterdir(), nano / "params.yaml"] if path.name != "ablations"}
    assert after == before and not (nano / "dvc.lock").exists()


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"connector": {"num_think_tokens": 0}}, {"vlm": {"stacked_layers": [6]}}])
def test_without_think_tokens_or_with_one_layer_a_stage_stopped_and_started_again_ends_with_the_same_bytes(
    project: Path, tmp_path: Path, edit_params, change: dict
):
    edit_params(project, lambda params: [params["model"][part].update(keys) for part, keys in change.items()])
    undisturbed = tmp_path / "undisturbed"
    shutil.copytree(project, undisturbed, symlinks=True)
    for stage in ("alignment", "sft"):
        run_stage(undisturbed, stage)
        with pytest.raises(Interrupted):
            run_stage(project, stage, StopAt(3))
        run_stage(project, stage)
        ends = [tensors_digest(root / "outputs" / stage / "model") for root in (project, undisturbed)]
        assert ends[0] == ends[1]


def result(seed: int, right: float, words: int = 0, connector: int = 100) -> dict:
    kinds = {"single": {"n": 10, "strict": right}, "two": {"n": 30, "strict": right}, "word": {"n": words, "strict": 1.0}}
    parameters = {part: {"trained": connector, "frozen": 0} for part in ("connector", "think_tokens", "dit")}
    stage = {"parameters": parameters, "evaluation": {task: {"kinds": kinds} for task in ("text_to_image", "image_edit")}}
    return {"seed": seed, "digests": {"code": "a", "data": "b", "foundation": "c"}, "stages": {"alignment": stage, "sft": stage}}


def test_words_count_for_nothing_and_other_kinds_by_their_number():
    one = result(0, 0.5, words=50)
    one["stages"]["sft"]["evaluation"]["text_to_image"]["kinds"]["single"]["strict"] = 0.9
    assert score_of(one, "sft", "text_to_image") == pytest.approx((10 * 0.9 + 30 * 0.5) / 40)


def test_the_interval_of_three_seeds_is_students():
    low, high = interval([0.1, 0.2, 0.3])
    assert (low, high) == pytest.approx((0.2 - 4.302653 * 0.1 / 3**0.5, 0.2 + 4.302653 * 0.1 / 3**0.5))


@pytest.mark.parametrize(
    ("changes", "said", "shown"),
    [
        ((-0.1, -0.11, -0.12), "shows", "-0.110 [-0.135, -0.085]"),
        ((0.1, 0.11, 0.12), "reverse", "+0.110 [+0.085, +0.135]"),
        ((-0.1, 0.0, 0.1), "does not show at this scale", "+0.000 [-0.248, +0.248]"),
        ((-0.1,), "not measured yet", "-0.100 (one seed)"),
    ],
)
def test_a_claim_is_judged_by_paired_differences_to_base(changes: tuple[float, ...], said: str, shown: str):
    base = {seed: result(seed, 0.4 + seed / 10) for seed in range(3)}  # seeds differ by more than the variant does
    other = {seed: result(seed, 0.4 + seed / 10 + change, connector=50) for seed, change in enumerate(changes)}
    text = table(ExperimentConfig.model_validate(EXPERIMENT), {"base": base, "last_layer": other})
    assert "| base | 3 | 200 | sft | 0.500 | - | 0.500 | - |" in text
    assert f"| last_layer | {len(changes)} | 100 | sft |" in text
    assert f"(table 6): **{said}**. lower expected; after SFT generation without words {shown}, editing {shown}." in text


def test_the_claims_of_the_repository_are_settings_that_params_allow():
    experiment = load_experiment(REPO, "claims")
    preset = yaml.safe_load((REPO / "presets" / f"{experiment.preset}.yaml").read_text())
    for overrides in experiment.configurations().values():
        params = check_params(item_values(preset, experiment, overrides, seed=2, samples=None))
        assert (params.alignment.steps, params.sft.steps) == (round(preset["alignment"]["steps"] / 4), round(preset["sft"]["steps"] / 4))


# ---------------------------------------------------------------- stage 3, from the project's own SFT

REINFORCED = {
    "preset": "nano",
    "stages": ["mr_grpo"],
    "share_of_steps": 0.5,
    "seeds": 2,
    "guidances": [1.0, 2.0],
    "overrides": {"mr_grpo.strips_every": 0},
    "base": "as the smoke preset",
    "variants": {"control": {"claim": "advantages do it", "paper": "none", "expected": "lower", "overrides": {"mr_grpo.control": True}}},
}


def test_without_the_model_that_they_start_from_such_experiments_are_refused(nano: Path):
    declare(nano, REINFORCED)
    with pytest.raises(FileNotFoundError, match=r"outputs/sft is missing.*`dvc repro sft`"):
        plan_items(nano, "nano")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_each_item_trains_stage_three_alone_from_the_same_start_and_keeps_what_became_of_each_sample(nano: Path):
    for stage in ("alignment", "sft"):
        run_stage(nano, stage)
    declare(nano, REINFORCED | {"seeds": 1, "guidances": [2.0]})
    items = plan_items(nano, "nano")
    assert [item.name for item in items] == ["start-seed0", "base-seed0", "control-seed0"]
    assert not any(stage in item.stages for item in items for stage in ("alignment", "sft"))
    write_json(items[2].result, {"configuration": "control", "seed": 0, "digests": items[2].digests, "guidances": {}})
    done = start(nano, "--jobs", "2")
    assert done.wait(timeout=900) == 0, done.stdout.read() if done.stdout else ""
    before, after = (read_json(item.result) for item in items[:2])
    for result in (before, after):
        for task, row in result["guidances"]["2.0"].items():
            assert len(row["strict"]) == len(row["rewards"].split()) == row["evaluation"]["n"] == 8
            assert row["strict"].count("1") == round(8 * row["evaluation"]["strict"])
            assert "-" not in row["rewards"].split() or task == "image_edit"
    assert before["stages"]["mr_grpo"] == {} and after["stages"]["mr_grpo"]["steps"] == 1
    text = reinforced_table(load_experiment(nano, "nano"), {"start": {0: before}, "base": {0: after}})
    assert "| base | 2.0 | 1 |" in text and "undecided" in text

    shutil.rmtree(nano / "outputs" / "sft" / "model")
    shutil.copytree(nano / "outputs" / "alignment" / "model", nano / "outputs" / "sft" / "model")
    with pytest.raises(OtherResult, match="is of other start than now"):
        run_queue(nano, "nano")


def scored(configuration: str, seed: int, strict: str, rewards: str) -> dict:
    row = {"evaluation": {}, "samples": "s", "strict": strict, "rewards": rewards, "held_out": " ".join("-" for _ in strict)}
    digests = dict.fromkeys(("code", "data", "foundation", "start"), "x")
    guidances = {"1.0": {"text_to_image": row, "image_edit": row | {"rewards": row["held_out"]}}}
    return {"configuration": configuration, "seed": seed, "digests": digests, "guidances": guidances}


def test_changes_are_paired_by_sample_and_the_wider_interval_is_told():
    before = {0: scored("start", 0, "0011" * 50, " ".join(["0.2 0.4 0.6 0.8"] * 50))}
    better = {seed: scored("base", seed, "0111" * 50, " ".join(["0.3 0.5 0.7 0.9"] * 50)) for seed in range(3)}
    text = reinforced_table(ExperimentConfig.model_validate(REINFORCED), {"start": before, "base": better})
    assert "| start | 1.0 | - | 0.500 (n 200) | - | 0.500 (n 200) | 0.500 (n 200) |" in text
    assert "| base | 1.0 | 3 | +0.1000 [+0.1000, +0.1000] rises | - | +0.2500 [+0.1898, +0.3102] rises |" in text


def test_a_change_that_seeds_do_not_agree_on_is_undecided():
    value, low, high = paired_interval([[0.1] * 50, [0.0] * 50, [0.2] * 50])
    half = 4.302653 * 0.1 / 3**0.5
    assert (value, low, high) == pytest.approx((0.1, 0.1 - half, 0.1 + half))


def test_scores_of_other_samples_are_not_compared():
    one, other = scored("start", 0, "01", "0 1"), scored("base", 1, "01", "0 1")
    other["guidances"]["1.0"]["text_to_image"] = other["guidances"]["1.0"]["text_to_image"] | {"samples": "others"}
    with pytest.raises(ValueError, match="base-seed1 and start were scored on other samples"):
        changes(other, one, "1.0", "text_to_image", "strict")


def test_the_experiment_of_the_repository_with_stage_three_is_one_that_params_allow():
    experiment = load_experiment(REPO, "mr_grpo")
    preset = yaml.safe_load((REPO / "presets" / f"{experiment.preset}.yaml").read_text())
    for configuration, overrides in experiment.configurations().items():
        config = check_params(item_values(preset, experiment, overrides, seed=2, samples=None)).mr_grpo
        assert config.seed == 2 and (config.auxiliary is None) == (configuration == "no_auxiliary")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stages": ["sft"]}, r"allowed: \[alignment, sft\] or \[mr_grpo\]"),
        ({"stages": ["alignment", "sft"]}, r"guidances: \[1.0, 2.0\] given; allowed with stages \[alignment, sft\]: none"),
        ({"variants": {"start": REINFORCED["variants"]["control"]}}, "neither base nor start"),
    ],
)
def test_an_experiment_that_can_not_be_is_refused(change: dict, said: str):
    with pytest.raises(ValueError, match=said):
        ExperimentConfig.model_validate(REINFORCED | change)
