"""What trains in each stage, and when it counts."""

import math

import pytest
import torch

from model.lora import lora_targets
from model.parts import TRAINED, parameter_report
from model.weights import WeightsMismatch
from training.config import LoRAConfig, OptimizerConfig
from training.optim import EMA, build_optimizer, learning_rate_factor
from training.randomness import quantiles, sample_noise
from training.stages import freeze_for
from training.supervised import refuse_other_settings, without

from ..model.conftest import model, tiny_config  # noqa: F401


@pytest.mark.parametrize(
    ("stage", "prefixes"),
    [("alignment", ("connector.",)), ("sft", ("connector.", "dit.", "vlm.")), ("mr_grpo", ("dit.",))],
)
def test_the_table_decides_what_trains(model, stage: str, prefixes: tuple[str, ...]):  # noqa: F811
    trained = freeze_for(model, stage, LoRAConfig(rank=2, alpha=4.0) if stage == "sft" else None)
    assert {name.split(".")[0] + "." for name in trained} == set(prefixes)
    assert set(trained) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any(name.startswith("vlm.") and ".lora_" not in name for name in trained)
    assert not any("visual" in name for name in trained)
    rows = {row["part"]: row for row in parameter_report(model.named_parameters())}
    assert {part for part, row in rows.items() if row["trained"]} == set(TRAINED[stage])


def test_lora_is_not_put_where_it_could_not_learn(model):  # noqa: F811
    trained = freeze_for(model, "sft", LoRAConfig(rank=2, alpha=4.0))
    layers = {int(name.split("layers.")[1].split(".")[0]) for name in trained if ".lora_" in name}
    assert layers == set(range(max(model.connector.config.stacked_layers)))
    linears = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    assert lora_targets(model) == f"rank 2, alpha 4, on {linears} of language layers 0 to {max(layers)}"
    assert not any("lm_head" in name or "embed_tokens" in name for name in trained)


def test_lora_in_a_stage_that_trains_none_is_refused(model):  # noqa: F811
    with pytest.raises(ValueError, match=r"alignment\.lora: set, but this stage trains"):
        freeze_for(model, "alignment", LoRAConfig(rank=2, alpha=4.0))


def test_the_rate_warms_up_then_falls_to_nothing():
    config = OptimizerConfig(lr=1.0, warmup_ratio=0.1)
    factors = [learning_rate_factor(step, 100, config) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == 1.0
    assert factors[55] == pytest.approx(0.5 * (1 + math.cos(math.pi * 45 / 90)))
    assert factors[99] < 0.001 and all(a >= b for a, b in zip(factors[10:], factors[11:], strict=False))


def test_decay_is_for_matrices_only():
    layer = torch.nn.Linear(3, 3)
    groups = build_optimizer(layer.parameters(), OptimizerConfig(lr=1.0, weight_decay=0.05)).param_groups
    assert [(group["weight_decay"], group["params"][0].ndim) for group in groups] == [(0.05, 2), (0.0, 1)]


def test_the_average_of_constant_weights_is_those_weights():
    weight = torch.nn.Parameter(torch.ones(3))
    ema = EMA({"w": weight}, 0.9)
    for _ in range(5):
        ema.update()
    torch.testing.assert_close(ema.average["w"], weight.detach())


def test_a_samples_noise_and_sigma_do_not_depend_on_its_batch():
    like = torch.zeros(4, 2, 3, 3)
    together = sample_noise(like, 0, "sft", [10, 11, 12, 13])
    torch.testing.assert_close(together[2:3], sample_noise(like[:1], 0, "sft", [12]), rtol=0, atol=0)
    torch.testing.assert_close(quantiles(0, "sft", [10, 11, 12])[2:], quantiles(0, "sft", [12]), rtol=0, atol=0)
    assert not torch.equal(together, sample_noise(like, 0, "alignment", [10, 11, 12, 13]))


def test_quantiles_of_neighbours_cover_the_interval():
    values = quantiles(3, "sft", list(range(1000, 1064)))
    counts = torch.histc(values, bins=8, min=0, max=1)
    assert counts.min() >= 7 and counts.max() <= 9


def test_dropped_references_are_gone_for_their_rows_alone():
    references = (torch.randn(3, 3, 32, 32), torch.randn(3, 3, 32, 64))
    assert without(references, [False] * 3) is references
    kept = without(references, [False, True, False])
    assert [len(row) for row in kept] == [2, 0, 2]
    assert torch.equal(kept[2][1], references[1][2])
    assert without(references, [True] * 3) == ()


@pytest.mark.parametrize(
    ("part", "change", "key"),
    [
        ("connector", {"padding": "reference"}, "model.connector.padding: reference in params.yaml, masked in the weights"),
        ("vlm", {"stacked_layers": (5, 4, 3, 2, 1, 0)}, r"model.vlm.stacked_layers: \(5, 4"),
        ("dit", {"reference_offset": False}, "model.dit.reference_offset: False in params.yaml, True in the weights"),
    ],
)
def test_weights_of_another_setting_are_refused_by_key(model, tmp_path, part: str, change: dict, key: str):  # noqa: F811
    config = tiny_config()
    refuse_other_settings(model, config, tmp_path)
    other = config.model_copy(update={part: getattr(config, part).model_copy(update=change)})
    with pytest.raises(WeightsMismatch, match=key):
        refuse_other_settings(model, other, tmp_path)
