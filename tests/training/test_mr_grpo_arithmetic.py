"""The arithmetic of stage 3 against the reference's numbers and against closed forms."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from training.advantages import advantages
from training.losses import clipped_ratio_loss, velocity_kl
from training.rewards.scores import Scores
from training.sde import cps_step, flow_sde_step, log_prob, sde_step

GOLDEN = Path(__file__).parents[1] / "golden" / "mr_grpo_reference.safetensors"
with safe_open(GOLDEN, "pt") as file:
    FACTS = json.loads(file.metadata()["json"])
    TENSORS = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def assert_agrees(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours - theirs).abs().max() <= 1e-5 * max(1.0, theirs.abs().max().item())


def scores_of(values: torch.Tensor, valid: torch.Tensor | None = None) -> Scores:
    there = torch.ones_like(values, dtype=torch.bool)
    return Scores(tuple(f"r{k}" for k in range(values.shape[1])), values, there if valid is None else valid, there)


@pytest.mark.parametrize("case", range(len(FACTS["sde"])))
def test_stochastic_steps_and_log_probabilities_are_the_references(case: int):
    get = {
        name: TENSORS[f"sde{case}.{name}"]
        for name in ("sigmas", "velocity", "latents", "next_latents", "mean", "std", "log_prob", "step_index")
    }
    entry = FACTS["sde"][case]
    sampler = {"cps_sde": "cps_sde", "flowgrpo_sde": "flow_sde"}[entry["kind"]]
    for row, index in enumerate(get["step_index"].tolist()):
        step = sde_step(sampler, get["latents"][row : row + 1], get["velocity"][row : row + 1], get["sigmas"], int(index), entry["eta"])
        assert_agrees(step.mean, get["mean"][row : row + 1])
        assert_agrees(log_prob(sampler, step, get["next_latents"][row : row + 1]), get["log_prob"][row : row + 1])


@pytest.mark.parametrize("case", range(len(FACTS["advantages"])))
def test_advantages_are_the_references_without_floor_and_cap(case: int):
    weights = TENSORS[f"advantages{case}.weights"][:, None, :]
    scores = scores_of(TENSORS[f"advantages{case}.rewards"])
    ours = advantages(scores, weights, FACTS["advantages"][case]["group_size"], noise_floor=-1.0, clip=1e9, max_gain=1e9)
    assert_agrees(ours, TENSORS[f"advantages{case}.advantages"])


@pytest.mark.parametrize("case", range(len(FACTS["policy"])))
def test_the_clipped_loss_is_the_references(case: int):
    names = ("new_log_prob", "old_log_prob", "advantages")
    loss = clipped_ratio_loss(*(TENSORS[f"policy{case}.{name}"] for name in names), FACTS["policy"][case]["clip_range"]).mean()
    assert_agrees(loss, TENSORS[f"policy{case}.loss"][0])


def test_without_noise_both_samplers_take_the_euler_step():
    x, v = torch.randn(2, 3, 4, 6, 6)
    sigma, following = torch.tensor(0.8), torch.tensor(0.6)
    euler = x + (following - sigma) * v
    torch.testing.assert_close(cps_step(x, v, sigma, following, 0.0).mean, euler, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(flow_sde_step(x, v, sigma, following, 0.0, torch.tensor(0.9)).mean, euler, rtol=1e-6, atol=1e-6)


def test_the_flow_sde_log_probability_is_the_gaussian_density():
    x, v, y = torch.randn(3, 2, 4, 6, 6)
    step = flow_sde_step(x, v, torch.tensor(0.8), torch.tensor(0.6), 0.7, torch.tensor(0.9))
    exact = torch.distributions.Normal(step.mean, step.std).log_prob(y).flatten(1).mean(1)
    torch.testing.assert_close(log_prob("flow_sde", step, y), exact, rtol=1e-5, atol=1e-5)


def test_a_group_of_equal_rewards_learns_nothing():
    values = torch.tensor([[0.7]] * 4 + [[0.0], [1.0], [0.0], [1.0]])
    made = advantages(scores_of(values), torch.ones(1), 4, noise_floor=0.01, clip=5.0)
    assert made[:4].abs().max() < 1e-6 and made[4:].abs().min() > 0.5


def test_noise_below_the_floor_is_no_signal():
    values = 0.5 + 1e-5 * torch.randn(8, 1)
    assert advantages(scores_of(values), torch.ones(1), 4, noise_floor=0.01, clip=5.0).abs().max() < 1e-6


def test_advantages_do_not_depend_on_a_rewards_scale_or_offset():
    values = torch.rand(16, 2)
    moved = values * torch.tensor([3.0, 0.5]) + torch.tensor([1.0, -2.0])
    first, second = (advantages(scores_of(v), torch.ones(2), 8, noise_floor=0.0, clip=5.0) for v in (values, moved))
    torch.testing.assert_close(first, second, rtol=1e-3, atol=2e-3)


def test_a_reward_without_valid_values_is_as_if_it_were_not_there():
    values = torch.rand(16, 2)
    valid = torch.ones(16, 2, dtype=torch.bool)
    valid[:, 1] = False
    both = advantages(scores_of(values, valid), torch.ones(2), 8, noise_floor=0.0, clip=5.0)
    alone = advantages(scores_of(values[:, :1]), torch.ones(1), 8, noise_floor=0.0, clip=5.0)
    torch.testing.assert_close(both, alone, rtol=1e-6, atol=1e-6)


def test_coverage_counts_what_applies_alone():
    scores = Scores(
        ("a", "b"), torch.zeros(2, 2), torch.tensor([[True, False], [False, False]]), torch.tensor([[True, False], [True, False]])
    )
    assert scores.coverage == 0.5


def test_the_kl_is_zero_at_the_reference_and_scales_with_the_variance():
    v, w = torch.randn(2, 2, 4, 6, 6)
    assert velocity_kl(v, v, 0.5).abs().max() == 0
    torch.testing.assert_close(velocity_kl(v, w, 0.5) / velocity_kl(v, w, 1.0), torch.full((2,), 4.0), rtol=1e-4, atol=1e-4)
