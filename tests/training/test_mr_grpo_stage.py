"""Stage 3 as a whole, on a project of seconds: killed in each phase, stopped by a silent reward, refilled, probed, averaged, with edits."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from data.config import PartConfig
from data.pinning import content_digest
from data.stages import run_mixture, run_shards
from model.weights import load_model
from runtime.files import read_json, tensors_digest, write_json
from runtime.params import ParamsError, check_params
from training import mr_grpo
from training.evaluate import run_evaluation, spell_marks
from training.guards import StepsRefused
from training.mr_grpo import RewardsMissing
from training.pictures import Shown
from training.probe import RewardHacked, paired
from training.rewards.scores import Group, Scores

from .conftest import REPO, begin
from .test_resume import run_stage

pytestmark = pytest.mark.slow
PHASES = ("rollout", "reward", "advantage", "update")  # in a save: test_kills.py


class Brightness:
    """The mean of an image, so that each image has another reward; missing for those images that `silent` picks."""

    names = ("count",)

    def __init__(self, silent: Callable[[Group, int], bool] = lambda group, image: False) -> None:
        self.silent = silent
        self.groups: list[Group] = []

    def __call__(self, group: Group) -> Scores:
        self.groups.append(group)
        scores = Scores.missing(self.names, len(group.images))
        for i, image in enumerate(group.images):
            if not self.silent(group, i):
                scores.values[i, 0], scores.valid[i, 0] = float(image.mean()) / 255, True
        return scores

    def facts(self) -> dict[str, float]:
        return {"asked": float(len(self.groups))}


@pytest.fixture(scope="module")
def start(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose SFT is done, with a short stage 3."""
    root = tmp_path_factory.mktemp("start") / "project"
    shutil.copytree(built, root, symlinks=True, ignore=shutil.ignore_patterns("runs"))
    change(
        root,
        steps=3,
        checkpoint_every=1,
        rollout_prompts=1,
        optimizer={"lr": 1e-3},
        auxiliary={"batch_size": 4, "share": None, "weight": 0.5},
    )
    for stage in ("alignment", "sft"):
        run_stage(root, stage)
    return root


def change(root: Path, **values: Any) -> None:
    params = yaml.safe_load((root / "params.yaml").read_text())
    for name, value in values.items():
        params["mr_grpo"][name] = {**params["mr_grpo"].get(name, {}), **value} if name == "optimizer" else value
    (root / "params.yaml").write_text(yaml.safe_dump(params))


@pytest.fixture
def project(start: Path, tmp_path: Path) -> Path:
    root = tmp_path / "project"
    shutil.copytree(start, root, symlinks=True, ignore=shutil.ignore_patterns("runs"))
    return root


@pytest.fixture(scope="module")
def undisturbed(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("undisturbed") / "project"
    shutil.copytree(start, root, symlinks=True, ignore=shutil.ignore_patterns("runs"))
    run_stage(root, "mr_grpo")
    return root


def weights(root: Path) -> str:
    return tensors_digest(root / "outputs" / "mr_grpo" / "model")


def history(root: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read_json(root / "outputs" / "mr_grpo" / "history.json")
    return rows


def rewarded_by(monkeypatch: pytest.MonkeyPatch, reward: Brightness) -> Brightness:
    monkeypatch.setattr(mr_grpo, "build_rewards", lambda *_: [reward])
    return reward


def test_killed_in_each_phase_and_started_again_it_ends_with_the_same_bytes(project: Path, undisturbed: Path):
    for phase in PHASES:
        shutil.rmtree(project / "outputs" / "runs", ignore_errors=True)
        environment = os.environ | {"PYTHONPATH": str(REPO), "DEEPGEN_FAULT": f"{phase}:2"}
        done = subprocess.run([sys.executable, "-m", "training", "mr_grpo"], cwd=project, env=environment, capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, (phase, done.stderr[-2000:])
        assert not (project / "outputs" / "mr_grpo").exists()
        run_stage(project, "mr_grpo")
        assert weights(project) == weights(undisturbed), phase
        assert history(project) == history(undisturbed), phase
        shutil.rmtree(project / "outputs" / "mr_grpo")


def test_an_update_is_one_step_of_the_optimizer_however_many_passes_it_takes(project: Path, monkeypatch: pytest.MonkeyPatch):
    taken = []
    real = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *args: (taken.append(1), real(self, *args))[1])
    change(project, micro_batch_size=1)
    run_stage(project, "mr_grpo")
    assert len(taken) == 3 == len(history(project))
    assert all(row["ratio_error"] < 1e-5 and row["auxiliary_loss"] > 0 for row in history(project))


def test_neither_the_layout_of_the_rollout_nor_how_often_is_logged_changes_what_is_drawn(project: Path, undisturbed: Path):
    change(project, rollout_prompts=2, log_every=2, strips_every=1)
    run_stage(project, "mr_grpo")
    for ours, theirs in zip(history(project), history(undisturbed), strict=True):
        assert ours["reward"] == pytest.approx(theirs["reward"]) and ours["diversity"] == pytest.approx(theirs["diversity"], rel=1e-4)
    (folder,) = (project / "outputs" / "runs" / "mr_grpo").iterdir()
    strips = [sorted(path.name for path in (place / "strips").glob("*.png")) for place in (folder, project / "outputs" / "mr_grpo")]
    assert strips[0] == strips[1] == [f"update-{update:06d}.png" for update in (1, 2, 3)]


def test_a_silent_reward_stops_the_stage_by_name_and_no_weight_was_changed(project: Path, monkeypatch: pytest.MonkeyPatch):
    rewarded_by(monkeypatch, Brightness(silent=lambda group, image: image == 0))
    change(project, rewards={"count": 1.0}, min_coverage=0.9)
    with pytest.raises(RewardsMissing, match=r"step 1: 75% of the reward values are valid \(count 75%\).*min_coverage is 90%"):
        run_stage(project, "mr_grpo")
    assert not list((project / "outputs" / "runs" / "mr_grpo").glob("*/step-*"))


def test_where_the_recipe_says_skip_such_updates_are_left_out_and_told_of(project: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[str] = []

    def silent(group: Group, image: int) -> bool:
        seen.append(group.name)
        return group.name in sorted(set(seen), key=seen.index)[:2]  # the first update's two prompts

    rewarded_by(monkeypatch, Brightness(silent))
    change(project, rewards={"count": 1.0}, on_low_coverage="skip", rollout_prompts=2)
    run_stage(project, "mr_grpo")
    assert len(history(project)) == 3 and all(row["coverage"] == 1.0 for row in history(project))
    assert read_json(project / "outputs" / "mr_grpo" / "metrics.json")["steps_skipped"] == 1
    (log,) = (project / "outputs" / "runs" / "mr_grpo").glob("*/guards.jsonl")
    assert "0% of the reward values are valid (count 0%)" in json.loads(log.read_text())["why"]


def test_above_the_floor_the_rest_is_trained_on(project: Path, monkeypatch: pytest.MonkeyPatch):
    rewarded_by(monkeypatch, Brightness(silent=lambda group, image: image == 0))
    change(project, rewards={"count": 1.0}, min_coverage=0.7)
    run_stage(project, "mr_grpo")
    assert all(row["coverage"] == row["valid_count"] == 0.75 for row in history(project))


def test_groups_without_spread_make_room_for_others_where_there_are_any(project: Path, monkeypatch: pytest.MonkeyPatch):
    class Flat(Brightness):
        def __call__(self, group: Group) -> Scores:
            scores = super().__call__(group)
            scores.values.mul_(float(int(group.name.partition(":")[0]) % 2))  # every other prompt has no spread
            return scores

    flat = rewarded_by(monkeypatch, Flat())
    change(project, rewards={"count": 1.0}, noise_floor={"count": 0.0})
    run_stage(project, "mr_grpo")
    assert [row["zero_variance_share"] for row in history(project)] == [0.5] * 3 and len(flat.groups) == 6
    shutil.rmtree(project / "outputs" / "mr_grpo")
    refilled = rewarded_by(monkeypatch, Flat())
    change(project, refill=3)
    run_stage(project, "mr_grpo")
    assert [row["zero_variance_share"] for row in history(project)] == [0.0] * 3 and len(refilled.groups) == 12
    assert read_json(project / "outputs" / "mr_grpo" / "metrics.json")["samples_seen"] == 12


def test_the_held_out_reward_is_logged_and_does_not_train(project: Path, undisturbed: Path):
    change(project, held_out_reward="word")
    run_stage(project, "mr_grpo")
    assert weights(project) == weights(undisturbed)


def test_the_average_is_what_is_published(project: Path, undisturbed: Path):
    change(project, ema_decay=0.9)
    run_stage(project, "mr_grpo")
    assert history(project) == history(undisturbed) and weights(project) != weights(undisturbed)


def test_edits_are_rolled_out_from_their_references(project: Path, monkeypatch: pytest.MonkeyPatch):
    groups = rewarded_by(monkeypatch, Brightness()).groups
    params = yaml.safe_load((project / "params.yaml").read_text())
    params["mixture"]["mr_grpo"] |= {"ratio": {"image_edit": 1, "text_to_image": 1}, "parts": params["mixture"]["sft"]["parts"]}
    (project / "params.yaml").write_text(yaml.safe_dump(params))
    change(project, rewards={"count": 1.0}, steps=2, guidance=2.0, kl_weight=0.1)
    with begin(project, "mixture@mr_grpo") as run:
        run_mixture(run)
    run_stage(project, "mr_grpo")
    assert {(group.task, len(group.references) > 0) for group in groups} == {("image_edit", True), ("text_to_image", False)}
    assert all(group.part in params["mixture"]["sft"]["parts"] for group in groups)
    assert all(row["ratio_error"] < 1e-5 for row in history(project))


def test_a_probe_that_falls_surely_ends_the_stage_and_names_its_limit(project: Path, monkeypatch: pytest.MonkeyPatch):
    looks = iter([[True] * 8, [True] * 8, [False] * 8])
    monkeypatch.setattr("training.probe.Probe.strict", lambda self: {"image_edit": next(looks)})
    change(project, probe={"every": 1, "samples": 8, "max_edit_fall": 0.5, "max_strict_fall": None})
    with pytest.raises(RewardHacked, match=r"step 2: image_edit is right for 0.00 of 8 samples, 1.00 \+- 0.00 .*max_edit_fall is 0.5"):
        run_stage(project, "mr_grpo")


def test_a_probe_leaves_no_trace_in_the_training(project: Path, undisturbed: Path):
    change(project, probe={"every": 2, "samples": 4})
    run_stage(project, "mr_grpo")
    assert weights(project) == weights(undisturbed)
    assert [row["probe/image_edit"] is not None for row in history(project)] == [False, True, False]


def test_a_fall_is_paired_by_sample():
    fall, error = paired([True, True, False, True], [True, False, True, False])
    assert fall == pytest.approx(0.25) and error == pytest.approx((11 / 12) ** 0.5 / 2)


def test_two_ranks_roll_out_and_learn_what_one_does(project: Path, undisturbed: Path):
    """Each rolls out its own prompts; advantages are those of the whole batch."""
    params = yaml.safe_load((project / "params.yaml").read_text())
    params["launch"]["processes"] = 2
    for stage in ("alignment", "sft"):
        params[stage]["micro_batch_size"] = 1
    (project / "params.yaml").write_text(yaml.safe_dump(params))
    ended = subprocess.run([sys.executable, "-m", "training", "mr_grpo"], cwd=project, capture_output=True, text=True, timeout=400)
    assert ended.returncode == 0, ended.stderr[-3000:]
    for ours, theirs in zip(history(project), history(undisturbed), strict=True):
        for name in ("reward", "reward_clip", "grad_norm", "auxiliary_loss", "policy_grad_norm", "zero_variance_share", "spread_clip"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-6), name
    one, two = (load_model(root / "outputs" / "mr_grpo" / "model").state_dict() for root in (undisturbed, project))
    torch.testing.assert_close(two, one, rtol=0, atol=2e-3)  # AdamW's first steps are signs: where a gradient is nought they may differ


def test_evaluation_items_that_it_was_trained_on_mark_its_scores(project: Path):
    mixture = project / "outputs" / "mixture" / "mr_grpo.json"
    write_json(mixture, read_json(mixture) | {"contamination": {"corebench": {"items": 3, "of": 90}}})
    run_stage(project, "mr_grpo")
    with begin(project, "evaluation@mr_grpo") as run:
        run_evaluation(run, "mr_grpo")
    gates = read_json(project / "outputs" / "evaluation" / "mr_grpo" / "gates.json")
    assert spell_marks(gates["contamination"]) == "trained on 3 of 90 items of corebench"
    assert "contamination" not in read_json(project / "outputs" / "sft" / "metrics.json")


def test_prompts_without_pictures_are_drawn_at_the_recipes_size(project: Path, monkeypatch: pytest.MonkeyPatch):
    groups = rewarded_by(monkeypatch, Brightness()).groups
    (project / "rl.txt").write_text("\n".join(f"a red circle and {i} blue crosses" for i in range(9)))
    params = yaml.safe_load((project / "params.yaml").read_text())
    params["data"]["parts"]["rl"] = {"source": "prompts", "task": "text_to_image", "split": "train", "path": "rl.txt", "licence": "CC0-1.0"}
    part = PartConfig.model_validate(params["data"]["parts"]["rl"])
    params["data"]["parts"]["rl"]["content"] = content_digest(part, project)
    params["mixture"]["mr_grpo"]["parts"] = {"rl": 1.0}
    (project / "params.yaml").write_text(yaml.safe_dump(params))
    change(project, rewards={"count": 1.0})
    for name, work in (("shards@rl", run_shards), ("mixture@mr_grpo", run_mixture)):
        with begin(project, name) as run:
            work(run)
    run_stage(project, "mr_grpo")
    assert {(group.part, group.images[0].shape) for group in groups} == {("rl", (64, 64, 3))} and not any(group.scene for group in groups)


@pytest.mark.parametrize("where", ["mixture.sft.parts", "mixture.mr_grpo.auxiliary.parts", "latents.parts"])
def test_prompts_without_pictures_are_refused_where_pictures_are_needed(start: Path, where: str):
    params = yaml.safe_load((start / "params.yaml").read_text())
    params["data"]["parts"]["rl"] = {"source": "prompts", "task": "text_to_image", "split": "train", "path": "rl.txt", "licence": "CC0-1.0"}
    *sections, key = where.split(".")
    place = params
    for section in sections:
        place = place[section]
    place[key] = [*place[key], "rl"] if isinstance(place[key], list) else place[key] | {"rl": 1.0}
    with pytest.raises(ParamsError, match=f"{where}: names 'rl', which has prompts and no pictures; only mixture.mr_grpo.parts may"):
        check_params(params)


def test_a_strip_shows_the_best_and_the_worst_of_one_prompt(project: Path, monkeypatch: pytest.MonkeyPatch):
    strips: list[list[Shown]] = []

    class Loud(Brightness):
        def __call__(self, group: Group) -> Scores:
            scores = super().__call__(group)
            if group.name.startswith("1:"):
                scores.values.copy_(torch.tensor([[0.4], [0.9], [0.1], [0.5]]))
            return scores

    rewarded_by(monkeypatch, Loud())
    monkeypatch.setattr(mr_grpo, "save_strips", lambda shown, path: strips.append(shown))
    monkeypatch.setattr("training.tracking.Tracker.picture", lambda *_: None)
    change(project, rewards={"count": 1.0}, steps=1, strips_every=1)
    run_stage(project, "mr_grpo")
    ((best, worst),) = strips
    assert (best.reward, best.prompt, best.value) == ("count", worst.prompt, pytest.approx(0.9)) and worst.value == pytest.approx(0.1)


def test_where_no_update_is_ever_scored_the_stage_ends_and_says_why(project: Path, monkeypatch: pytest.MonkeyPatch):
    rewarded_by(monkeypatch, Brightness(silent=lambda group, image: True))
    change(project, rewards={"count": 1.0}, on_low_coverage="skip", guard={"stop_after": 2})
    with pytest.raises(StepsRefused, match=r"2 steps refused in all.*stop_after is 2; the last was step 1: 0% of the reward values"):
        run_stage(project, "mr_grpo")
