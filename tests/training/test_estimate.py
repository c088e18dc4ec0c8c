"""What is counted from the configuration is what torch counts on the model itself; figures follow from it by their formulas."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.flops import Flops, decode_forward, dit_forward, encode_forward, image_tokens, mfu, total, vision_forward
from model.vlm import encode_references
from runtime.params import Params, check_params, load_params
from training import measure
from training.estimate import (
    GPUS,
    SHARDINGS,
    EstimateRefused,
    activation_elements,
    estimate_stage,
    memory_of,
    read_rates,
    references_of,
    run_estimate,
    stage_flops,
    task_flops,
    weights_of,
)
from training.measure import build_fresh, dit_pass, measure_stages, supervised_pass
from training.stages import freeze_for

from .conftest import REPO, nano_params

CPU = torch.device("cpu")
TOKENS = 20


@pytest.fixture(scope="module")
def nano() -> Params:
    return check_params(nano_params())


def counted(step) -> int:
    """By torch, which knows attention on a CPU only as the products it is made of."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step()
    return counter.get_total_flops()


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("task", ["text_to_image", "image_edit"])
@pytest.mark.parametrize("stage", ["alignment", "sft"])
def test_forward_and_backward_of_a_supervised_step_are_what_torch_counts(nano: Params, stage: str, task: str, cached: bool):
    parts = tuple(nano.mixture[stage].parts) if cached else ()  # type: ignore[index]
    params = nano.model_copy(update={"latents": nano.latents.model_copy(update={"parts": parts})})
    model = build_fresh(params, CPU)
    freeze_for(model, stage, getattr(params, stage).lora)
    model.train()
    expected = total(task_flops(params, stage, task, TOKENS)).model
    assert counted(supervised_pass(params, model, stage, task, TOKENS, 2)) / 2 == pytest.approx(expected, rel=0.03)


def test_an_update_and_a_rollout_step_of_mr_grpo_are_what_torch_counts(nano: Params):
    model = build_fresh(nano, CPU)
    freeze_for(model, "mr_grpo")
    M = TOKENS + nano.model.connector.num_think_tokens
    once = dit_forward(nano.model.dit, nano.model.vae.latent_channels, image_tokens(nano.model, nano.data.image_size), 0, M)
    assert counted(dit_pass(nano, model, TOKENS, 1, train=False)) == once.forward
    both = once.forward + once.backward(trained=True)
    assert counted(dit_pass(nano, model, TOKENS, 1, train=True)) == pytest.approx(both, rel=0.02)  # its inputs get none


def test_checkpointing_costs_the_forward_of_the_dit_once_more(nano: Params):
    params = nano.model_copy(update={"launch": nano.launch.model_copy(update={"gradient_checkpointing": True})})
    model = build_fresh(params, CPU)
    freeze_for(model, "alignment")
    model.train()
    step = supervised_pass(params, model, "alignment", "text_to_image", TOKENS, 1)
    before = counted(step)
    model.dit.enable_gradient_checkpointing()
    recomputed = total(task_flops(params, "alignment", "text_to_image", TOKENS)).recomputed
    assert counted(step) - before == pytest.approx(recomputed, rel=0.1)  # blocks alone, not the embedders


@pytest.mark.parametrize("preset", ["smoke", "tiny"])
def test_the_autoencoder_is_what_torch_counts(preset: str):
    params = load_params(REPO / "presets" / f"{preset}.yaml")
    vae, side = build_fresh(params, CPU).vae, params.data.image_size
    pixels, inner = torch.zeros(1, 3, side, side), side // params.model.vae.downscale
    latents = torch.zeros(1, params.model.vae.latent_channels, inner, inner)
    with torch.no_grad():
        assert counted(lambda: vae.encode(pixels)) == encode_forward(params.model.vae, side)
        assert counted(lambda: vae.decode(latents)) == decode_forward(params.model.vae, side)


@pytest.mark.parametrize("side", [64, 256, 320])
def test_the_vision_tower_in_whole_and_cut_windows_is_what_torch_counts(nano: Params, side: int):
    vlm, image = build_fresh(nano, CPU).vlm, torch.zeros(3, side, side)
    expected = vision_forward(nano.model.vlm.vision, nano.model.vlm.hidden_size, side)
    assert counted(lambda: encode_references(vlm, [image])) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("stage", ["alignment", "sft"])
def test_what_is_kept_for_the_backward_pass_is_what_the_rule_says_within_a_quarter(nano: Params, stage: str):
    model = build_fresh(nano, CPU)
    freeze_for(model, stage, getattr(nano, stage).lora)
    model.train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for task in ("text_to_image", "image_edit"):
        kept: list[torch.Tensor] = []

        def keep(tensor: torch.Tensor, kept: list[torch.Tensor] = kept) -> torch.Tensor:
            kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            supervised_pass(nano, model, stage, task, TOKENS, 1)()
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
        found = sum(size for place, size in storages.items() if place not in weights)
        said = 4 * activation_elements(nano.model, stage, nano.data.image_size, TOKENS, references_of(task), False)
        assert said == pytest.approx(found, rel=0.25), task


def test_mfu_is_work_over_time_and_peak():
    assert mfu(3e14, 2.0, 1e15) == pytest.approx(0.15)
    with pytest.raises(ValueError, match="must be above 0"):
        mfu(1.0, 0.0, 1e15)


def test_a_mixture_costs_the_mean_of_its_tasks_by_their_ratio(nano: Params):
    edit, text = (total(task_flops(nano, "sft", task, TOKENS)).model for task in ("image_edit", "text_to_image"))
    assert total(stage_flops(nano, "sft", TOKENS)).model == pytest.approx((edit + 2 * text) / 3)


def test_thrice_the_gpus_take_a_third_of_the_time_and_cost_the_same_and_sharding_divides_memory(nano: Params):
    few, many = ({row.name + row.unit: row for row in estimate_stage(nano, "sft", GPUS["h200"], n, {}, TOKENS, "ddp")} for n in (1, 3))
    assert few["sft: computings"].value == pytest.approx(3 * many["sft: computings"].value)
    assert "assumed" in few["sft: timeh"].basis and few["sft: forwardTFLOP"].basis == "counted"
    for rows, gpus in ((few, 1), (many, 3)):
        seconds = max(rows["sft: computings"].value, rows["sft: movings"].value)
        assert rows["sft: timeh"].value == pytest.approx(nano.sft.steps * seconds / 3600)
        assert rows["sft: costUSD"].value == pytest.approx(rows["sft: timeh"].value * gpus * 3.0)
    weights = weights_of(nano, "sft")
    ddp, zero2, fsdp2 = (memory_of(nano, "sft", weights, 64, sharding, TOKENS) for sharding in SHARDINGS)
    assert ddp.moments == 8 * weights.trained == 64 * zero2.moments == 64 * fsdp2.moments
    assert ddp.total > zero2.total > fsdp2.total
    assert ddp.weights == 4 * (weights.frozen + weights.trained), "float32, frozen ones too, as stages load them"
    alone = [memory_of(nano, "sft", weights, 1, sharding, TOKENS).total for sharding in ("ddp", "zero2")]
    assert alone[0] == alone[1], "one rank has nobody to share with"


def test_measured_rates_are_used_and_said_to_be(tmp_path: Path, nano: Params):
    file = tmp_path / "rates.json"
    file.write_text(json.dumps({"rates": {"utilisation_sft": 0.5, "bandwidth_share": 0.9}, "device": "here"}))
    rates = read_rates(file)
    rows = {row.name: row for row in estimate_stage(nano, "sft", GPUS["a100"], 1, rates, TOKENS)}
    assert rows["sft: time"].basis == "measured" and rows["sft: cost"].basis == "assumed price_per_gpu_hour"


@pytest.mark.parametrize(
    "text", ["[", "[]", '{"rates": {"speed": 1}}', '{"rates": {"utilisation_sft": 0}}', '{"rates": {"utilisation_sft": true}}']
)
def test_rates_that_are_none_of_ours_or_no_numbers_are_refused_naming_the_file(tmp_path: Path, text: str):
    (tmp_path / "rates.json").write_text(text)
    with pytest.raises(EstimateRefused, match=r"rates\.json"):
        read_rates(tmp_path / "rates.json")


def test_gpus_that_do_not_divide_the_batch_and_unknown_gpus_are_refused(nano: Params):
    with pytest.raises(EstimateRefused, match=r"--gpus 4: sft has \d micro-batches a step; expected a divisor of that number"):
        estimate_stage(nano, "sft", GPUS["h100"], 4, {}, TOKENS)
    arguments = argparse.Namespace(prompt_tokens=TOKENS, image_size=None, rates=None, measure=False, gpu="tpu", gpus=1)
    with pytest.raises(EstimateRefused, match="allowed: a100, h100, h200"):
        run_estimate(nano, arguments)


def test_a_measured_step_gives_a_utilisation_that_predicts_it(nano: Params):
    found = measure_stages(nano, TOKENS)
    for stage, row in found["stages"].items():
        batch = {"alignment": 8, "sft": 6, "mr_grpo": 8}[stage]
        assert row["flops_a_step"] / (found["peak_flops"] * row["utilisation"]) == pytest.approx(row["seconds_a_step"])
        assert 0 < row["utilisation"] < 1 and row["flops_a_step"] <= batch * total(stage_flops(nano, stage, TOKENS)).done


def test_a_utilisation_is_measured_against_the_peak_that_the_estimate_multiplies_it_with(nano: Params, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measure, "peak_of", lambda device, precision: GPUS["h200"].peak)
    monkeypatch.setattr(measure, "_measure_stage", lambda *_: (2.0, GPUS["h200"].peak))
    found = measure_stages(nano, TOKENS)
    assert (found["peak_flops"], found["peak_by"]) == (GPUS["h200"].peak, "as published")
    assert {row["utilisation"] for row in found["stages"].values()} == {0.5}


def test_parts_add_up():
    assert total([Flops("a", 1, 2, 3), Flops("b", 10, 20)]) == Flops("total", 11, 22, 3)
