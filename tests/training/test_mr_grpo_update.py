"""The update of MR-GRPO on a policy so small that closed forms and many updates are cheap: a velocity field on two numbers."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from model.deepgen import Condition
from model.flow import sampling_sigmas
from training import update as module
from training.advantages import advantages
from training.config import MRGRPOConfig, OptimizerConfig
from training.losses import clipped_ratio_loss
from training.optim import build_optimizer
from training.rewards.scores import Scores
from training.rollout import Rollout, Told, trained_steps
from training.sde import log_prob, sde_step
from training.update import OffPolicy, norm_of, update

SETTINGS: dict[str, Any] = {
    "steps": 1,
    "prompts_per_step": 8,
    "group_size": 8,
    "micro_batch_size": 64,
    "rollout_steps": 6,
    "stochastic_steps": 3,
    "eta": 0.7,
    "clip_range": 0.2,
    "rewards": {"count": 1.0},
    "optimizer": OptimizerConfig(lr=0.05, weight_decay=0.0),
    "checkpoint_every": 1,
}


def settings(**changes: Any) -> MRGRPOConfig:
    return MRGRPOConfig.model_validate(SETTINGS | changes)


class Toy(nn.Module):
    """Latents (N, 2, 1, 1); the prompt is a number that shifts the velocity."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
        self.device = torch.device("cpu")

    def shift_for(self, size: Any) -> float:
        return 3.0

    def forward(self, latents: Tensor, sigmas: Tensor, references: Any = (), condition: Condition | None = None) -> Tensor:
        assert condition is not None
        inputs = torch.cat([latents.flatten(1), sigmas[:, None], condition.pooled_prompt_embeds], 1)
        return self.net(inputs).view(latents.shape)


@pytest.fixture
def toy() -> Toy:
    torch.manual_seed(0)
    return Toy()


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def roll(toy: Toy, config: MRGRPOConfig, seed: int = 0, groups: int | None = None) -> tuple[Rollout, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    groups = config.prompts_per_step if groups is None else groups
    n = groups * config.group_size
    prompts = torch.linspace(-1, 1, groups).repeat_interleave(config.group_size)[:, None]
    condition = Condition(torch.zeros(n, 1, 1), prompts, torch.ones(n, dtype=torch.long))
    sigmas, steps = sampling_sigmas(config.rollout_steps, 3.0), trained_steps(config, seed)
    latents = torch.randn(n, 2, 1, 1, generator=draw)
    kept = []
    with torch.no_grad():
        for index in range(config.rollout_steps):
            velocity = toy(latents, sigmas[index].expand(n), condition=condition)
            if index in steps:
                gaussian = sde_step(config.sampler, latents, velocity, sigmas, index, config.eta)
                following = gaussian.mean + gaussian.std * torch.randn(latents.shape, generator=draw)
                kept.append((latents, following, log_prob(config.sampler, gaussian, following)))
                latents = following
            else:
                latents = latents + (sigmas[index + 1] - sigmas[index]) * velocity
    befores, afters, log_probs = zip(*kept, strict=True)
    return Rollout((None,) * groups, Told(condition, None, ()), steps, befores, afters, log_probs), latents.flatten(1)  # type: ignore[arg-type]


def scores_of(values: Tensor) -> Scores:
    there = torch.ones(len(values), 1, dtype=torch.bool)
    return Scores(("count",), values[:, None], there, there)


def advantage_of(ends: Tensor, config: MRGRPOConfig, sign: float = 1.0) -> Tensor:
    return advantages(scores_of(sign * ends[:, 0]), torch.ones(1), config.group_size, 0.01, config.advantage_clip, config.max_gain)


def gradient(toy: Toy, accelerator: Accelerator, rollouts: list[Rollout], advantage: Tensor, config: MRGRPOConfig, **more: Any) -> Any:
    """Gradients of an update, flat, and its numbers."""
    trained = list(toy.parameters())
    toy.zero_grad(set_to_none=True)
    reference, auxiliary = more.get("reference"), more.get("auxiliary")
    row = update(accelerator, toy, toy, reference, rollouts, advantage, trained, config, auxiliary)  # type: ignore[arg-type]
    return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in trained]), row


@pytest.mark.parametrize("sampler", ["flow_sde", "cps_sde"])
def test_on_policy_the_ratio_is_one_to_the_bit_and_the_gradient_is_that_of_the_log_probability(toy, accelerator, sampler):
    config = settings(sampler=sampler)
    rollout, ends = roll(toy, config)
    advantage = advantage_of(ends, config)
    found, row = gradient(toy, accelerator, [rollout], advantage, config)
    assert row["ratio_error"] == 0.0 and row["clip_share"] == 0.0
    toy.zero_grad(set_to_none=True)
    sigmas, total = sampling_sigmas(config.rollout_steps, 3.0), torch.zeros(())
    for index, before, after in zip(rollout.steps, rollout.latents, rollout.next_latents, strict=True):
        velocity = toy(before, sigmas[index].expand(len(before)), condition=rollout.told.condition)
        total = total - (advantage * log_prob(sampler, sde_step(sampler, before, velocity, sigmas, index, config.eta), after)).mean()
    (total / config.stochastic_steps).backward()
    torch.testing.assert_close(found, torch.cat([p.grad.flatten() for p in toy.parameters()]), rtol=1e-5, atol=1e-7)


def test_log_probabilities_rounded_to_bfloat16_are_refused_before_any_step(toy, accelerator):
    config = settings(clip_range=1e-3)
    rollout, ends = roll(toy, config)
    rounded = replace(rollout, log_probs=tuple(values.bfloat16().float() for values in rollout.log_probs))
    before = [p.detach().clone() for p in toy.parameters()]
    with pytest.raises(OffPolicy, match="before any step.*a tenth of"):
        gradient(toy, accelerator, [rounded], advantage_of(ends, config), config)
    assert all(torch.equal(p, was) for p, was in zip(toy.parameters(), before, strict=True))


def test_a_ratio_that_is_no_number_is_refused(toy, accelerator):
    config = settings()
    rollout, ends = roll(toy, config)
    broken = replace(rollout, log_probs=(rollout.log_probs[0] * torch.nan, *rollout.log_probs[1:]))
    with pytest.raises(OffPolicy):
        gradient(toy, accelerator, [broken], advantage_of(ends, config), config)


@pytest.mark.parametrize("size", [1, 2, 7, 8, 64])
def test_the_gradient_is_that_of_the_whole_batch_whatever_the_micro_batch(toy, accelerator, size):
    config = settings()
    rollout, ends = roll(toy, config)
    advantage = advantage_of(ends, config)
    whole, _ = gradient(toy, accelerator, [rollout], advantage, config)
    reference = copy.deepcopy(toy)
    with torch.no_grad():
        reference.net[2].bias.add_(0.1)
    settled = settings(micro_batch_size=size, kl_weight=0.3)
    with_kl, _ = gradient(toy, accelerator, [rollout], advantage, settings(kl_weight=0.3), reference=reference)
    parts, _ = gradient(toy, accelerator, [rollout], advantage, settled, reference=reference)
    torch.testing.assert_close(parts, with_kl, rtol=1e-5, atol=1e-7)
    split, _ = gradient(toy, accelerator, [rollout.only([0, 1, 2]), rollout.only([3, 4, 5, 6, 7])], advantage, config)
    torch.testing.assert_close(split, whole, rtol=1e-5, atol=1e-7)


def test_the_gradient_does_not_depend_on_the_order_of_the_groups(toy, accelerator):
    config = settings()
    rollout, ends = roll(toy, config)
    advantage, order = advantage_of(ends, config), [5, 2, 7, 0, 1, 6, 4, 3]
    whole, _ = gradient(toy, accelerator, [rollout], advantage, config)
    moved = advantage.view(8, 8)[order].flatten()
    other, _ = gradient(toy, accelerator, [rollout.only(order)], moved, config)
    torch.testing.assert_close(other, whole, rtol=1e-5, atol=1e-7)


def test_outside_of_the_clip_range_only_what_leads_back_has_a_gradient():
    old, advantage = torch.zeros(4), torch.tensor([1.0, 1.0, -1.0, -1.0])
    new = torch.log(torch.tensor([1.5, 0.5, 1.5, 0.5])).requires_grad_()
    clipped_ratio_loss(new, old, advantage, 0.2).sum().backward()
    torch.testing.assert_close(new.grad, torch.tensor([0.0, -0.5, 1.5, 0.0]))


@pytest.mark.parametrize("kl", ["velocity", "kernel"])
def test_the_kl_to_oneself_is_nought_and_so_is_its_gradient(toy, accelerator, kl):
    config = settings(kl_weight=10.0, kl=kl)
    rollout, ends = roll(toy, config)
    found, row = gradient(toy, accelerator, [rollout], torch.zeros(64), config, reference=copy.deepcopy(toy))
    assert row["kl"] == 0.0 and found.abs().max() == 0.0


@pytest.mark.parametrize("kl", ["velocity", "kernel"])
def test_the_kl_leads_back_to_the_reference(toy, accelerator, kl):
    config = settings(kl_weight=1.0, kl=kl)
    reference = copy.deepcopy(toy)
    with torch.no_grad():
        toy.net[2].bias.add_(0.5)
    optimizer, seen = torch.optim.Adam(toy.parameters(), lr=0.02), []
    for _ in range(30):
        _, row = gradient(toy, accelerator, [roll(toy, config)[0]], torch.zeros(64), config, reference=reference)
        optimizer.step()
        seen.append(row["kl"])
    assert seen[-1] < 0.2 * seen[0]


def real_loss(toy: Toy) -> Any:
    def auxiliary() -> Tensor:
        inputs = torch.randn(16, 2, 1, 1, generator=torch.Generator().manual_seed(5))
        condition = Condition(torch.zeros(16, 1, 1), torch.zeros(16, 1), torch.ones(16, dtype=torch.long))
        loss = toy(inputs, torch.full((16,), 0.5), condition=condition).pow(2).mean()
        loss.backward()
        return loss.detach()

    return auxiliary


def test_lambda_mixes_the_two_gradients_and_its_ends_are_each_alone(toy, accelerator):
    config = settings()
    rollout, ends = roll(toy, config)
    advantage = advantage_of(ends, config)
    policy, _ = gradient(toy, accelerator, [rollout], advantage, config)
    toy.zero_grad(set_to_none=True)
    real_loss(toy)()
    real = torch.cat([p.grad.flatten() for p in toy.parameters()])
    for weight in (1e-9, 0.25, 0.5, 1 - 1e-9):
        mixed = settings(auxiliary={"batch_size": 16, "weight": weight})
        found, _ = gradient(toy, accelerator, [rollout], advantage, mixed, auxiliary=real_loss(toy))
        torch.testing.assert_close(found, (1 - weight) * policy + weight * real, rtol=1e-4, atol=1e-6)


def test_a_share_makes_the_auxiliary_gradient_that_part_of_the_policys(toy, accelerator):
    config = settings(auxiliary={"batch_size": 16, "share": 0.1})
    rollout, ends = roll(toy, config)
    advantage = advantage_of(ends, config)
    policy, _ = gradient(toy, accelerator, [rollout], advantage, settings())
    found, row = gradient(toy, accelerator, [rollout], advantage, config, auxiliary=real_loss(toy))
    assert (found - policy).norm() == pytest.approx(0.1 * policy.norm().item(), rel=1e-4)
    assert row["auxiliary_factor"] * row["auxiliary_grad_norm"] == pytest.approx(0.1 * row["policy_grad_norm"])


def test_the_control_trains_the_auxiliary_loss_with_the_same_factor_and_nothing_else(toy, accelerator):
    rollout, ends = roll(toy, settings())
    advantage, share = advantage_of(ends, settings()), {"batch_size": 16, "share": 0.1}
    _, row = gradient(toy, accelerator, [rollout], advantage, settings(auxiliary=share), auxiliary=real_loss(toy))
    found, control = gradient(toy, accelerator, [rollout], advantage, settings(auxiliary=share, control=True), auxiliary=real_loss(toy))
    assert control["auxiliary_factor"] == row["auxiliary_factor"]
    toy.zero_grad(set_to_none=True)
    real_loss(toy)()
    torch.testing.assert_close(found, row["auxiliary_factor"] * torch.cat([p.grad.flatten() for p in toy.parameters()]))
    alone, _ = gradient(toy, accelerator, [rollout], advantage, settings(control=True))
    assert alone.abs().max() == 0.0


def test_what_is_measured_changes_no_gradient(toy, accelerator, monkeypatch):
    config = settings()
    rollout, ends = roll(toy, config)
    advantage = advantage_of(ends, config)
    with_norms, _ = gradient(toy, accelerator, [rollout], advantage, config)
    monkeypatch.setattr(module, "norm_of", lambda trained: 1.0)
    without, _ = gradient(toy, accelerator, [rollout], advantage, config)
    assert torch.equal(with_norms, without)


def test_the_norm_is_over_all_parameters(toy):
    for number, parameter in enumerate(toy.parameters()):
        parameter.grad = torch.full_like(parameter, 0.0 if number else 3.0)
    assert norm_of(list(toy.parameters())) == pytest.approx(3.0 * toy.net[0].weight.numel() ** 0.5)


def train(accelerator: Accelerator, seed: int, sign: float = 1.0, updates: int = 40, **changes: Any) -> tuple[Tensor, Tensor]:
    """Ends of 2,048 images before and after so many updates, with the same draws."""
    torch.manual_seed(seed)
    toy, config = Toy(), settings(**changes)
    optimizer = build_optimizer(toy.parameters(), config.optimizer)
    before = roll(toy, config, 10_000, groups=256)[1]
    for number in range(updates):
        rollout, ends = roll(toy, config, seed * 1000 + number)
        gradient(toy, accelerator, [rollout], advantage_of(ends, config, sign), config)
        optimizer.step()
    return before[:, 0], roll(toy, config, 10_000, groups=256)[1][:, 0]


@pytest.mark.parametrize(("sampler", "window"), [("flow_sde", "first"), ("cps_sde", "spread"), ("flow_sde", "neighbours")])
def test_a_bandit_whose_reward_is_the_first_coordinate_moves_there_in_each_of_three_seeds(accelerator, sampler, window):
    for seed in range(3):
        before, after = train(accelerator, seed, sampler=sampler, window=window)
        change = after - before
        assert change.mean() >= 5 * change.std() / len(change) ** 0.5, (seed, change.mean())


def test_the_other_way_round_it_moves_the_other_way(accelerator):
    before, after = train(accelerator, 0, sign=-1.0)
    assert (after - before).mean() < -5 * (after - before).std() / len(after) ** 0.5


def test_without_advantages_no_weight_moves(accelerator):
    before, after = train(accelerator, 0, sign=0.0, updates=5)
    assert torch.equal(before, after)


@pytest.mark.parametrize("window", ["first", "neighbours", "spread"])
def test_the_last_step_never_trains_and_the_window_is_drawn_once_an_update(window):
    config = settings(window=window, rollout_steps=8)
    drawn = [trained_steps(config, update) for update in range(60)]
    assert drawn == [trained_steps(config, update) for update in range(60)]
    assert all(len(set(steps)) == 3 and max(steps) < 7 and list(steps) == sorted(steps) for steps in drawn)
    assert {max(steps) for steps in drawn} == ({2} if window == "first" else {2, 3, 4, 5, 6})
    if window == "neighbours":
        assert all(steps[-1] - steps[0] == 2 for steps in drawn)
