"""Published names and ours: there and back, and what does not fit is named."""

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from model.deepgen import DeepGen
from model.published import adopt, load_release, read_state, to_published
from model.weights import WeightsMismatch, save_model

PROMPTS = ["red circle", "make square green"]


def scrambled(model: DeepGen) -> DeepGen:
    """The same shapes with other weights, and the released padding."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    other.connector.register_to_config(padding="reference")
    return other


def same_conditions(a: DeepGen, b: DeepGen) -> None:
    torch.testing.assert_close(a.encode_condition(PROMPTS).prompt_embeds, b.encode_condition(PROMPTS).prompt_embeds, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_a_published_state_dict_goes_there_and_back(model: DeepGen, tmp_path: Path, ending: str):
    published = scrambled(model)
    file = tmp_path / f"model.{ending}"
    state = {name: tensor.contiguous() for name, tensor in to_published(published).items()}
    torch.save(state, file) if ending == "pt" else save_file(state, file)
    assert {"meta_queries", "projector_1.weight", "transformer.proj_out.weight", "lmm.lm_head.weight"} <= state.keys()
    adopt(model, read_state(file))
    assert all(torch.equal(tensor, published.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert model.connector.config.padding == "reference"


def test_adapters_that_lie_apart_are_merged(model: DeepGen):
    published = scrambled(model)
    wrapped = get_peft_model(
        published.vlm, LoraConfig(r=4, lora_alpha=8, init_lora_weights="gaussian", target_modules=["q_proj", "down_proj", "embed_tokens"])
    )
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name or "lora_embedding_B" in name:
                parameter.normal_(std=0.05)
    state = {f"lmm.{name}": tensor for name, tensor in wrapped.state_dict().items()}
    rest = {name: tensor for name, tensor in to_published(scrambled(model)).items() if not name.startswith("lmm.")}
    published_rest = dict(rest)
    adopt(model, state | published_rest, lora_scale=8 / 4)
    reference = model.encode_condition(PROMPTS).prompt_embeds
    model.vlm = wrapped.base_model.model
    torch.testing.assert_close(model.encode_condition(PROMPTS).prompt_embeds, reference, rtol=1e-4, atol=1e-5)


def test_old_names_of_the_language_model_are_understood(model: DeepGen):
    published = scrambled(model)
    old = {
        name.replace("lmm.model.language_model.", "lmm.model.").replace("lmm.model.visual.", "lmm.visual."): tensor
        for name, tensor in to_published(published).items()
    }
    adopt(model, old)
    same_conditions(model, published)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("projector_2.bias"), r"1 missing: connector\.projector_2\.bias"),
        (lambda state: state.update({"connector.layers.9.mlp.fc1.bias": torch.zeros(1)}), r"1 surplus: connector\.connector\.layers\.9"),
        (lambda state: state.update({"meta_queries": torch.zeros(3, 3)}), r"1 misshapen: connector\.think_tokens"),
        (lambda state: state.update({"siglip.weight": torch.zeros(1)}), "'siglip.weight' belongs to no part"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_changes(model: DeepGen, change, said: str):
    before = copy.deepcopy(model.state_dict())
    state = to_published(scrambled(model))
    change(state)
    with pytest.raises(WeightsMismatch, match=said):
        adopt(model, state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_state_dict_that_holds_code_is_not_run(tmp_path: Path):
    torch.save({"x": Path}, tmp_path / "bad.pt")
    with pytest.raises(Exception, match="[Ww]eights.only"):
        read_state(tmp_path / "bad.pt")


def test_a_published_folder_in_diffusers_layout_is_read(model: DeepGen, tmp_path: Path):
    published = scrambled(model)
    save_model(published, tmp_path)
    theirs = {n: t.contiguous() for n, t in to_published(published).items() if n.startswith(("meta", "connector", "projector"))}
    for file in (tmp_path / "connector").iterdir():
        file.unlink()
    save_file(theirs, tmp_path / "connector" / "model.safetensors")
    (tmp_path / "connector" / "config.json").write_text('{"num_attention_heads": 4, "stacked_layers": [6, 5, 4, 3, 2, 1]}')
    same_conditions(load_release(tmp_path).eval(), published)
