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

import numpy as np
import pytest
import yaml

from data.stages import run_shards
from runtime.exits import Interrupted, StopRequest
from runtime.files import read_json, sha256_path, tensors_digest, write_json
from runtime.params import ParamsError, check_params
from training import ablations
from training.ablation_table import changes, interval, interval_of_both, over_base, score_of, side, table, table_over_start, weighted
from training.ablations import Item, OtherResult, StageFailed, compact, expand, item_values, load_experiment, plan_items, run_queue
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
REINFORCEMENT = {
    "preset": "nano",
    "stages": ["mr_grpo"],
    "share_of_steps": 0.5,
    "seeds": 2,
    "guidances": [1.0, 2.0],
    "overrides": {"mr_grpo.strips_every": 0},
    "base": "as the smoke preset",
    "variants": {
        "control": {
            "claim": "advantages train",
            "paper": "none",
            "expected": "lower",
            "overrides": {"mr_grpo.control": True, "mr_grpo.auxiliary": None, "mixture.mr_grpo.auxiliary": None},
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
    # So many steps that SFT is still at it when the signal comes, on a busy machine too.
    declare(nano, EXPERIMENT | {"seeds": 1, "share_of_steps": 1.0, "overrides": {"sft.steps": 60}})
    base, other = plan_items(nano, "nano", samples=5)
    write_json(other.result, {"digests": other.digests})
    alone = run_alone(nano, tmp_path / "alone", base.values)
    before = {path.name: sha256_path(path) for path in [*(nano / "outputs").iterdir(), nano / "params.yaml"]}

    first = start(nano, "--samples", "5")
    while first.poll() is None and not list((base.project / "outputs" / "runs").glob("sft/*/step-*")):
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


@pytest.fixture
def reinforced(nano: Path) -> Path:
    """The experiment trains mr_grpo, and the project has an SFT model: its foundation, which nobody trained."""
    shutil.copytree(nano / "outputs" / "foundation", nano / "outputs" / "sft" / "model")
    return declare(nano, REINFORCEMENT)


def test_an_mr_grpo_experiment_scores_its_start_once_and_moves_every_seed_of_the_stage_alone(reinforced: Path):
    items = plan_items(reinforced, "nano")
    assert [item.name for item in items] == ["start-seed0", "base-seed0", "control-seed0", "base-seed1", "control-seed1"]
    assert items[0].stages == ["evaluation@sft at 1.0", "evaluation@sft at 2.0"]
    assert items[1].stages == ["mixture@mr_grpo", "mr_grpo", "evaluation@mr_grpo at 1.0", "evaluation@mr_grpo at 2.0"]
    first, later = items[1].values, items[3].values
    assert (first["mr_grpo"]["steps"], first["mr_grpo"]["seed"], later["mr_grpo"]["seed"]) == (1, 0, 1)
    assert [values["mr_grpo"]["auxiliary"]["seed"] for values in (first, later)] == [0, 1]
    assert [later["mixture"]["mr_grpo"]["seed"], later["mixture"]["mr_grpo"]["auxiliary"]["seed"]] == [113, 114]
    assert later["sft"] == first["sft"] and later["mixture"]["sft"] == first["mixture"]["sft"]


def test_a_result_from_another_start_or_at_other_guidances_is_refused_and_without_a_start_nothing_begins(reinforced: Path):
    for item in plan_items(reinforced, "nano"):
        write_json(item.result, {"digests": item.digests})
    declare(reinforced, REINFORCEMENT | {"guidances": [1.0]})
    with pytest.raises(OtherResult, match=r"start-seed0\.json is of other guidances than now"):
        run_queue(reinforced, "nano")
    declare(reinforced, REINFORCEMENT | {"overrides": {"mr_grpo.strips_every": 0, "mr_grpo.eta": 0.5}})
    with pytest.raises(OtherResult, match=r"base-seed0\.json is of other params than now"):  # which say nothing about the start
        run_queue(reinforced, "nano")
    declare(reinforced, REINFORCEMENT)
    weights = sorted((reinforced / "outputs" / "sft" / "model").rglob("*.safetensors"))[0]
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.unlink()  # it may be a link
    weights.write_bytes(content)
    with pytest.raises(OtherResult, match=r"start-seed0\.json is of other start than now"):
        run_queue(reinforced, "nano")
    shutil.rmtree(reinforced / "outputs" / "sft")
    with pytest.raises(FileNotFoundError, match=r"outputs/sft/model is missing.*`dvc repro sft`"):
        run_queue(reinforced, "nano")


@pytest.mark.parametrize("change", [{"stages": ["sft"]}, {"stages": ["alignment", "sft"]}, {"guidances": [1.0, 1.0]}])
def test_stages_that_no_queue_runs_and_guidances_that_nothing_reads_are_refused(reinforced: Path, change: dict):
    declare(reinforced, REINFORCEMENT | change)
    with pytest.raises(ParamsError, match=next(iter(change)) if change != {"stages": ["alignment", "sft"]} else "guidances"):
        load_experiment(reinforced, "nano")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_queue_of_mr_grpo_begins_with_the_projects_sft_and_keeps_each_samples_outcome_at_each_guidance(project: Path):
    for folder in ("ablations", "presets"):
        (project / folder).mkdir()
    (project / "presets" / "nano.yaml").write_text((project / "params.yaml").read_text())
    run_stage(project, "alignment")
    run_stage(project, "sft")
    declare(project, REINFORCEMENT | {"seeds": 1})
    weights = tensors_digest(project / "outputs" / "sft" / "model")

    said = start(project).communicate(timeout=900)[0]
    results = {item.configuration: read_json(item.result) for item in plan_items(project, "nano")}
    assert list(results) == ["start", "base", "control"], said
    assert tensors_digest(project / "outputs" / "sft" / "model") == weights
    digests = {name: result["guidances"]["1.0"]["model_digest"] for name, result in results.items()}
    assert digests["start"] == digests["control"] == weights != digests["base"]  # a control without auxiliary loss learns nothing
    assert results["base"]["stages"]["mr_grpo"]["steps"] == 1 and results["start"]["stages"] == {}
    kept = [results[name]["guidances"] for name in ("start", "control")]
    assert kept[0] == kept[1]
    items = plan_items(project, "nano")
    pictures = [sha256_path(items[1].scores_at(guidance) / "images") for guidance in (1.0, 2.0)]
    assert pictures[0] != pictures[1]  # what the verifier says of so small a model may be the same
    samples = read_json(items[1].scores_at(2.0) / "samples.json")
    for task, rows in samples.items():
        outcome = results["base"]["guidances"]["2.0"]["outcomes"][task]
        assert [letter == "1" for letter in outcome["strict"]] == [row["strict"] for row in rows]
        for name, part in outcome["parts"].items():
            assert expand(part) == [row["parts"].get(name) for row in rows]
    assert not (items[1].project / "outputs" / "sft").exists() and (items[1].project / "outputs" / "mr_grpo" / "model").is_dir()
    assert not (project / "dvc.lock").exists()


def test_four_thousand_samples_of_each_task_at_two_guidances_are_kept_in_less_than_300_kb(tmp_path: Path):
    draw = np.random.default_rng(0)
    shares = sorted({a / b for b in range(1, 7) for a in range(b + 1)})
    names = ("count", "shape", "color", "binding", "relation", "position", "word")
    rows = [
        {"key": f"{i:06d}", "strict": bool(draw.integers(2)), "parts": {name: draw.choice(shares) for name in names if draw.integers(2)}}
        for i in range(4000)
    ]
    kept = compact(rows)
    for name in names:
        assert expand(kept["parts"][name]) == [row["parts"].get(name) for row in rows]
    write_json(tmp_path / "kept.json", [kept] * 4)
    assert (tmp_path / "kept.json").stat().st_size < 300_000
    assert compact(rows[::-1])["keys"] != kept["keys"]
    with pytest.raises(ValueError, match="word: 63 different values, expected at most 62"):
        compact([{"key": str(i), "strict": True, "parts": {"word": i / 62}} for i in range(63)])


def test_trained_rewards_are_weighted_over_the_parts_that_apply_to_a_sample():
    rows = [{"count": 1.0, "binding": 0.5}, {"count": 0.0}, {"word": 1.0}]
    kept = compact([{"key": str(i), "strict": False, "parts": parts} for i, parts in enumerate(rows)])
    np.testing.assert_allclose(weighted(kept, {"count": 0.5, "binding": 1.0}), [(0.5 * 1 + 1 * 0.5) / 1.5, 0.0, np.nan])


def scored(name: str, seed: int, rewards: list[float], generated: list[int], edited: list[int], samples: str = "abcd") -> dict:
    """A result at guidance 1.0 of four samples a task; `count` is trained, `relation`, which only the last asks for, held out."""
    tasks = {
        "text_to_image": compact(
            [
                {"key": key, "strict": bool(right), "parts": {"count": reward} | ({"relation": reward} if key == samples[-1] else {})}
                for key, right, reward in zip(samples, generated, rewards, strict=True)
            ]
        ),
        "image_edit": compact(
            [{"key": key, "strict": bool(right), "parts": {"count": 0.0}} for key, right in zip(samples, edited, strict=True)]
        ),
    }
    return {
        "configuration": name,
        "seed": seed,
        "digests": {"code": "a", "data": "b", "foundation": "c", "start": "d"},
        "rewards": {"count": 0.5},
        "held_out_reward": "relation",
        "tasks": ["text_to_image"],
        "guidances": {"1.0": {"outcomes": tasks, "evaluation": {task: {"n": 4} for task in tasks}}},
    }


def test_changes_over_the_start_are_those_of_each_sample_and_other_samples_are_refused():
    before = scored("start", 0, [0.0, 0.25, 0.5, 0.5], [0, 0, 1, 1], [1, 1, 1, 1])
    after = scored("base", 0, [0.5, 0.25, 0.5, 1.0], [1, 0, 0, 1], [1, 1, 1, 0])
    changed = changes(before, [after, after], "1.0")
    assert {name: rows.tolist() for name, rows in changed.items()} == {
        "trained rewards": [[0.5, 0.0, 0.0, 0.5]] * 2,
        "held-out reward (relation)": [[0.5]] * 2,
        "generation, strict": [[1.0, 0.0, -1.0, 0.0]] * 2,
        "editing, strict": [[0.0, 0.0, 0.0, -1.0]] * 2,
    }
    with pytest.raises(ValueError, match="base-seed1: scored on other samples of text_to_image than start"):
        changes(before, [after, scored("base", 1, [0.0] * 4, [0] * 4, [0] * 4, samples="abce")], "1.0")


def test_the_interval_is_as_wide_as_that_of_samples_and_as_that_of_seeds():
    samples, seeds = np.array([[0.0, 0.1, 0.2, 0.3]] * 3), np.array([[0.0] * 4, [0.1] * 4, [0.2] * 4])
    assert interval_of_both(samples) == pytest.approx(interval([0.0, 0.1, 0.2, 0.3]))
    assert interval_of_both(seeds) == pytest.approx(interval([0.0, 0.1, 0.2]))
    assert interval_of_both(samples[:1]) == pytest.approx(interval([0.0, 0.1, 0.2, 0.3]))


def test_a_variant_is_held_against_base_of_its_own_seed():
    base = {0: scored("base", 0, [0.0] * 4, [0, 0, 0, 0], [1] * 4), 1: scored("base", 1, [0.0] * 4, [1, 1, 1, 1], [1] * 4)}
    other = {0: scored("kl", 0, [0.0] * 4, [1, 0, 0, 0], [1] * 4), 1: scored("kl", 1, [0.0] * 4, [1, 1, 1, 0], [1] * 4)}
    found = over_base({"base": base, "kl": other}, "kl", ["1.0"])
    assert found["generation at guidance 1.0"].tolist() == [[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, -1.0]]


@pytest.mark.parametrize(("ends", "said"), [((0.01, 0.2), "rises"), ((-0.2, -0.01), "falls"), ((-0.1, 0.1), "undecided")])
def test_a_change_is_told_in_words_where_its_interval_leaves_no_doubt(ends: tuple[float, float], said: str):
    assert side(ends) == said


def test_the_table_of_mr_grpo_tells_each_change_over_the_start_and_each_variant_beside_base():
    before = scored("start", 0, [0.0] * 4, [0] * 4, [1] * 4)
    base = {seed: scored("base", seed, [0.5] * 4, [1] * 4, [1] * 4) for seed in range(2)}
    control = {seed: scored("control", seed, [0.0] * 4, [0] * 4, [1, 1, 1, 0]) for seed in range(2)}
    experiment = ExperimentConfig.model_validate(REINFORCEMENT)
    text = table_over_start(experiment, {"start": {0: before}, "base": base, "control": control})
    assert "| base | 2 | 1.0 | trained rewards | 0.000 | +0.500 [+0.500, +0.500] | rises |" in text
    assert "| base | 2 | 1.0 | editing, strict | 1.000 | +0.000 [+0.000, +0.000] | undecided; at most 0.02 lost: yes |" in text
    assert "| control | 2 | 1.0 | editing, strict | 1.000 | -0.250 [-1.046, +0.546] | undecided; at most 0.02 lost: not shown |" in text
    assert "**shows**. lower than base expected; generation at guidance 1.0 -1.000 [-1.000, -1.000], editing at guidance 1.0 -0.250" in text
    alone = table_over_start(experiment, {"start": {0: before}, "base": {0: base[0]}, "control": {0: control[0]}})
    assert "(one seed)" in alone and "**not measured yet**" in alone
    with pytest.raises(FileNotFoundError, match="no result of start yet"):
        table_over_start(experiment, {"base": base})


@pytest.mark.parametrize("name", ["mr_grpo", "mr_grpo_guided"])
def test_the_mr_grpo_experiments_of_the_repository_are_settings_that_params_allow(name: str):
    experiment = load_experiment(REPO, name)
    preset = yaml.safe_load((REPO / "presets" / f"{experiment.preset}.yaml").read_text())
    for configuration, overrides in experiment.configurations().items():
        params = check_params(item_values(preset, experiment, overrides, seed=2, samples=None))
        assert (params.mr_grpo.steps, params.mr_grpo.seed, params.mr_grpo.probe) == (preset["mr_grpo"]["steps"], 2, None), configuration
