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
    torch.testing.assert_close(both, alone, rtol=1e-3, atol=1e-3)


def test_coverage_counts_what_applies_alone():
    scores = Scores(
        ("a", "b"), torch.zeros(2, 2), torch.tensor([[True, False], [False, False]]), torch.tensor([[True, False], [True, False]])
    )
    assert scores.coverage == 0.5


def test_the_kl_is_zero_at_the_reference_and_scales_with_the_variance():
    v, w = torch.randn(2, 2, 4, 6, 6)
    assert velocity_kl(v, v, 0.5).abs().max() == 0
    torch.testing.assert_close(velocity_kl(v, w, 0.5) / velocity_kl(v, w, 1.0), torch.full((2,), 4.0), rtol=1e-4, atol=1e-4)


def masked(values: torch.Tensor, *missing: tuple[int, int]) -> Scores:
    valid = torch.ones_like(values, dtype=torch.bool)
    for row, column in missing:
        valid[row, column] = False
    return scores_of(values, valid)


@pytest.mark.parametrize("norm", ["per_reward", "summed"])
def test_an_image_without_a_valid_score_has_no_advantage_and_a_group_sums_to_nought(norm: str):
    values = torch.rand(16, 1)
    made = advantages(masked(values, (3, 0), (9, 0)), torch.ones(1), 8, noise_floor=0.0, clip=50.0, norm=norm)
    assert made[3] == made[9] == 0.0 and (made != 0).sum() == 14
    torch.testing.assert_close(made.view(2, 8).sum(1), torch.zeros(2), rtol=0, atol=1e-5)


def test_one_scored_image_of_a_group_teaches_nothing():
    values = torch.rand(8, 1)
    made = advantages(masked(values, *((i, 0) for i in range(1, 8))), torch.ones(1), 8, noise_floor=0.0, clip=5.0)
    assert made.abs().max() == 0.0


@pytest.mark.parametrize("norm", ["per_reward", "summed"])
def test_a_weight_of_nought_is_as_if_the_reward_were_not_there_be_it_missing_or_not(norm: str):
    values = torch.rand(16, 2)
    both = advantages(masked(values, (5, 1)), torch.tensor([1.0, 0.0]), 8, noise_floor=0.0, clip=5.0, norm=norm)
    torch.testing.assert_close(both, advantages(scores_of(values[:, :1]), torch.ones(1), 8, noise_floor=0.0, clip=5.0, norm=norm))


def test_a_batch_sums_to_nought_where_a_missing_term_has_moved_its_group():
    values = torch.rand(16, 2)
    made = advantages(masked(values, (0, 1)), torch.ones(2), 8, noise_floor=0.0, clip=50.0)
    assert abs(made.sum()) < 1e-5 < abs(made.view(2, 8).sum(1)).min()


def test_what_is_missing_leaves_its_weight_to_the_rest():
    """Image 0's second reward is missing and its first stands for both; with the batch's gain capped at 1, nothing else moves it."""
    values = torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    settings = {"group_size": 4, "noise_floor": 0.0, "clip": 50.0, "max_gain": 1e-3}
    whole = advantages(scores_of(values[:, :1]), torch.tensor([3.0]), **settings)
    lacking = advantages(masked(values, (0, 1)), torch.tensor([1.0, 2.0]), **settings)
    centred = lacking - lacking.mean() + whole.mean()
    assert centred[0] == pytest.approx(whole[0].item(), rel=0.25)
    assert lacking[0] < 2 * advantages(masked(values, (0, 1)), torch.tensor([1.0, 1e-6]), **settings)[0]


def test_a_batch_with_one_live_group_is_not_blown_up_beyond_the_gain():
    values = torch.full((32, 1), 0.5)
    values[:8, 0] = 0.5 + 0.02 * torch.linspace(-1, 1, 8)
    free, capped = (advantages(scores_of(values), torch.ones(1), 8, noise_floor=1e-3, clip=50.0, max_gain=g) for g in (1e9, 1.0))
    assert free.std() == pytest.approx(1.0, rel=1e-3) and capped.std() < 0.6


def test_each_reward_has_its_own_floor():
    values = torch.rand(8, 2) * 0.01
    first = advantages(scores_of(values), torch.ones(2), 8, noise_floor=torch.tensor([1e-5, 1.0]), clip=5.0)
    torch.testing.assert_close(first, advantages(scores_of(values[:, :1]), torch.ones(1), 8, noise_floor=1e-5, clip=5.0))


def test_plain_grpo_normalises_the_weighted_sum_in_its_group_alone():
    values, weights = torch.rand(16, 2), torch.tensor([0.3, 0.7])
    made = advantages(scores_of(values), weights, 8, noise_floor=0.0, clip=50.0, norm="summed").view(2, 8)
    sums = (values * weights).sum(1).view(2, 8)
    torch.testing.assert_close(made, (sums - sums.mean(1, keepdim=True)) / (sums.std(1, keepdim=True) + 1e-4))


def test_a_sum_that_lacks_a_term_is_left_out_of_plain_grpo():
    values = torch.rand(8, 2)
    made = advantages(masked(values, (2, 1)), torch.ones(2), 8, noise_floor=0.0, clip=50.0, norm="summed")
    rest = [i for i in range(8) if i != 2]
    sums = values[rest].sum(1)
    assert made[2] == 0.0
    torch.testing.assert_close(made[rest], (sums - sums.mean()) / (sums.std() + 1e-4))


def test_prompts_may_weigh_rewards_differently():
    values = torch.rand(16, 2)
    weights = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    made = advantages(scores_of(values), weights, 8, noise_floor=0.0, clip=50.0)
    one = torch.cat([values[:8, :1], values[8:, 1:]])
    torch.testing.assert_close(made, advantages(scores_of(one), torch.ones(1), 8, noise_floor=0.0, clip=50.0))
