"""Validation asks the same questions each time, and the training does not notice."""

import json
import math
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from data.loader import Loader
from model.flops import total
from model.parts import part_of
from model.prompts import prompt_tokens
from runtime.exits import Interrupted, StopRequest
from runtime.files import read_json, tensors_digest
from training.config import EarlyStopConfig, SupervisedConfig
from training.curves import Curves, gradient_norms, loss_by_sigma
from training.estimate import task_flops
from training.optim import EMA
from training.stages import freeze_for
from training.supervised import batch_loss, load_parent
from training.validation import SIGMAS, Patience, Validation, aside, held_out

from .conftest import begin
from .test_resume import StopAt, run_stage

TRACELESS = {"validate_every": 1, "board_every": 2}


@pytest.fixture(scope="module")
def aligned(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with stage 1 trained."""
    root = tmp_path_factory.mktemp("aligned") / "project"
    shutil.copytree(built, root, symlinks=True, ignore=shutil.ignore_patterns("runs"))
    run_stage(root, "alignment")
    return root


def sft(aligned: Path, root: Path, edit_params, settings: dict, stop: StopRequest | None = None) -> Path:
    if not root.exists():
        shutil.copytree(aligned, root, symlinks=True, ignore=shutil.ignore_patterns("runs"))
        edit_params(root, lambda params: params["sft"].update(settings))
    return run_stage(root, "sft", stop)


def losses(root: Path) -> list[float]:
    return [row["loss"] for row in read_json(root / "outputs" / "sft" / "history.json")]


def test_weights_are_the_same_bytes_with_and_without_validation(aligned: Path, tmp_path: Path, edit_params):
    """SFT draws LoRA's dropout from torch's global generator, and keeps an average that validation swaps in."""
    plain = {"validate_every": 0, "board_every": 0, "ema_decay": 0.5}
    sft(aligned, tmp_path / "plain", edit_params, plain)
    folder = sft(aligned, tmp_path / "watched", edit_params, plain | TRACELESS)
    digests = [tensors_digest(tmp_path / name / "outputs" / "sft" / "model") for name in ("plain", "watched")]
    assert digests[0] == digests[1]
    assert losses(tmp_path / "plain") == losses(tmp_path / "watched")
    assert sorted(path.name for path in (folder / "boards").iterdir()) == ["step-000002.png", "step-000004.png"]
    history = read_json(tmp_path / "watched" / "outputs" / "sft" / "history.json")
    assert all("held_out/loss" in row for row in history)
    last = json.loads((folder / "progress.jsonl").read_text().splitlines()[-1])
    assert {"loss", "lr", "samples_per_s"} <= last.keys()


def test_an_early_stop_ends_the_stage_properly_and_a_resumed_one_stops_at_the_same_step(aligned: Path, tmp_path: Path, edit_params):
    hopeless = {"validate_every": 1, "early_stop": {"patience": 2, "min_delta": 1000.0}}
    sft(aligned, tmp_path / "whole", edit_params, hopeless)
    history = read_json(tmp_path / "whole" / "outputs" / "sft" / "history.json")
    assert [row.get("stopped_early") for row in history] == [None, None, 1.0], "the first is a best, two more are the patience"
    assert read_json(tmp_path / "whole" / "outputs" / "sft" / "metrics.json")["stopped_early_at"] == 3
    with pytest.raises(Interrupted):
        sft(aligned, tmp_path / "stopped", edit_params, hopeless, StopAt(2))
    sft(aligned, tmp_path / "stopped", edit_params, hopeless)
    first, second = (tmp_path / name / "outputs" / "sft" for name in ("whole", "stopped"))
    assert (first / "history.json").read_bytes() == (second / "history.json").read_bytes()
    assert tensors_digest(first / "model") == tensors_digest(second / "model")
    shutil.rmtree(second)  # killed after the last save, before the stage was published
    sft(aligned, tmp_path / "stopped", edit_params, hopeless)
    assert (first / "history.json").read_bytes() == (second / "history.json").read_bytes()


def test_held_out_numbers_that_are_none_are_told_and_left_out_and_the_stage_goes_on(
    aligned: Path, tmp_path: Path, edit_params, monkeypatch: pytest.MonkeyPatch, capsys
):
    real = Validation.measure
    monkeypatch.setattr(Validation, "measure", lambda self: real(self) | {"held_out/loss": math.nan})
    sft(aligned, tmp_path / "project", edit_params, {"validate_every": 4})
    last = read_json(tmp_path / "project" / "outputs" / "sft" / "history.json")[-1]
    assert "held_out/loss" not in last and "held_out/text_to_image" in last
    assert "sft: step 4: no finite number: held_out/loss" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("series", "patience", "min_delta", "ends"),
    [
        ([3, 2, 1, 0], 1, 0.0, None),
        ([3, 2, 2, 2], 2, 0.0, 3),
        ([3, 2.9, 2.8, 2.7], 3, 0.5, 3),
        ([3, math.nan, math.nan], 2, 0.0, 2),
        ([1, 2, 0, 2, 2], 2, 0.0, 4),
    ],
)
def test_patience_ends_after_so_many_validations_without_a_new_best(series: list, patience: int, min_delta: float, ends: int | None):
    watch = Patience(EarlyStopConfig(patience=patience, min_delta=min_delta))
    over = []
    for loss in series:
        watch.see(loss)
        over.append(watch.over)
    assert (over.index(True) if True in over else None) == ends


def test_an_early_stop_without_validation_is_refused():
    wrong = {"steps": 1, "batch_size": 1, "micro_batch_size": 1, "optimizer": {"lr": 1e-3}, "checkpoint_every": 1}
    with pytest.raises(ValidationError, match="validate_every is 0"):
        SupervisedConfig.model_validate(wrong | {"early_stop": {"patience": 1}})


def test_aside_leaves_modes_weights_and_every_global_generator_as_they_were(built: Path):
    with begin(built, "alignment") as run:
        model = load_parent(run, "alignment")
        trained = freeze_for(model, "alignment")
        ema = EMA(trained, 0.5)
        for average in ema.average.values():
            average.zero_()
        model.train()
        model.vae.eval()
        before = {name: parameter.detach().clone() for name, parameter in trained.items()}
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
        with aside(model, ema):
            assert not model.training and not torch.is_grad_enabled()
            assert all(not parameter.any() for parameter in trained.values())
            torch.rand(3), random.random(), np.random.rand()
        assert model.training and not model.vae.training
        assert all(torch.equal(before[name], parameter) for name, parameter in trained.items())
        assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
        assert (states[2] == np.random.get_state()[1]).all()


class Rank:
    """What `Validation` and `Curves` use of an accelerator; sums are kept, not exchanged."""

    def __init__(self, index: int, count: int) -> None:
        self.process_index, self.num_processes, self.device = index, count, torch.device("cpu")
        self.given = torch.zeros(())

    def reduce(self, tensor: torch.Tensor, how: str) -> torch.Tensor:
        assert how == "sum"
        self.given = tensor
        return tensor


def test_ranks_share_the_held_out_samples_and_groups_are_means_of_them(built: Path):
    with begin(built, "alignment") as run:
        model = load_parent(run, "alignment")
        config = run.params.alignment.model_copy(update={"validate_every": 1})
        state = SimpleNamespace(history=[], ema=None)
        tables = {}
        for count, index in ((1, 0), (3, 0), (3, 1), (3, 2)):
            rank = Rank(index, count)
            validation = Validation(run, config, rank, model, state, None)  # type: ignore[arg-type]
            with aside(model):
                validation.measure()
            tables[count, index] = rank.given
        torch.testing.assert_close(tables[1, 0], sum(tables[3, index] for index in range(3)), rtol=1e-5, atol=0)
        assert all(((tables[3, 0] != 0) != (tables[3, index] != 0)).all(0).any() for index in (1, 2)), "each rank has rows of its own"
        with aside(model):
            validation = Validation(run, config, Rank(0, 1), model, state, None)  # type: ignore[arg-type]
            row = validation.measure()
        assert row == validation.measure(), "fixed noise and sigmas: the same question twice"
        samples = [sample for batch in held_out(run) for sample in batch.samples]
        assert {f"held_out/{sample.task}.{sample.kind}" for sample in samples} <= row.keys()
        assert row["held_out/loss"] == pytest.approx(sum(row[f"held_out/sigma_{sigma}"] for sigma in SIGMAS) / len(SIGMAS))
        for task in ("text_to_image", "image_edit"):
            mine = [sample for sample in samples if sample.task == task]
            mean = sum(row[f"held_out/{task}.{sample.kind}"] for sample in mine) / len(mine)
            assert row[f"held_out/{task}"] == pytest.approx(mean)


def test_loss_by_sigma_is_the_mean_of_what_fell_in_each_bin_and_was_a_number():
    pairs = [(torch.tensor([1.0, 3.0]), torch.tensor([0.1, 0.2])), (torch.tensor([5.0, 7.0]), torch.tensor([0.5, 1.0]))]
    pairs.append((torch.tensor([torch.nan, torch.inf]), torch.tensor([0.1, 0.3])))
    row = loss_by_sigma(Rank(0, 1), pairs)  # type: ignore[arg-type]
    assert row == {"loss_by_sigma/0.00-0.25": 2.0, "loss_by_sigma/0.50-0.75": 5.0, "loss_by_sigma/0.75-1.00": 7.0}


def test_curves_know_the_sigmas_that_the_model_was_asked_at_and_norms_by_part_make_the_whole(built: Path):
    with begin(built, "alignment") as run:
        model, config = load_parent(run, "alignment"), run.params.alignment
        trained = freeze_for(model, "alignment")
        asked = []
        model.register_forward_pre_hook(lambda _, arguments: asked.append(arguments[1]))
        curves = Curves(Rank(0, 1), model, run.params, "alignment")  # type: ignore[arg-type]
        mixture = read_json(built / "outputs" / "mixture" / "alignment.json")
        for latents in (None, built / "outputs" / "latents"):
            for batch, _ in zip(Loader(mixture, built / "outputs" / "shards", 4, latents=latents), range(4), strict=False):
                loss = batch_loss(model, model, batch, config, "alignment")
                loss.mean().backward()
                curves.add(batch, loss)
        assert torch.equal(torch.cat(asked), torch.cat([sigmas for _, sigmas in curves.losses]))
        norms = gradient_norms(trained)
        assert norms.keys() == {f"grad_norm/{part_of(name)}" for name in trained}
        whole = torch.nn.utils.get_total_norm([parameter.grad for parameter in trained.values()])
        assert math.sqrt(sum(norm**2 for norm in norms.values())) == pytest.approx(float(whole))


def test_model_flops_are_those_of_the_samples_seen_and_utilisation_is_their_rate_over_the_peak(built: Path, monkeypatch):
    with begin(built, "alignment") as run:
        model, config = load_parent(run, "alignment"), run.params.alignment
        rank = Rank(0, 1)
        curves = Curves(rank, model, run.params, "alignment")  # type: ignore[arg-type]
        mixture = read_json(built / "outputs" / "mixture" / "alignment.json")
        expected = 0.0
        latents = built / "outputs" / "latents"
        for batch, _ in zip(Loader(mixture, built / "outputs" / "shards", 4, latents=latents), range(4), strict=False):
            curves.add(batch, torch.zeros(4))
            tokens = round(sum(len(prompt_tokens(model.tokenizer, prompt, [], 999)) for prompt in batch.prompts) / 4 - 0.5)
            expected += 4 * total(task_flops(run.params, "alignment", batch.task, tokens)).model
        monkeypatch.setattr("training.curves.time.monotonic", lambda: curves.since + 0.5)
        row = curves.row(config.steps, {})
        assert curves.peak > 1e9
        assert row["mfu"] == pytest.approx(expected / (0.5 * curves.peak), rel=1e-3)
        assert row["samples_per_s"] == pytest.approx(32)
