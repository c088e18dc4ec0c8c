"""The one place where published names meet ours: the released checkpoint of DeepGen 1.0, in each layout that is found.

A state dict (`.pt` or safetensors) with meta_queries, connector.*, projector_1..3, transformer.* and the language model under lmm.*, its
LoRA merged or apart; or a folder in diffusers' layout. Published weights were trained with padding read as prompt, and are marked so.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer

from model.connector import StackedChannelBridging
from model.deepgen import DeepGen
from model.weights import WeightsMismatch, load_dit, load_model, load_vae, load_vlm, refuse_differences

RELEASED_LORA_SCALE = 128 / 64  # alpha / rank
RELEASED_LAYERS = (35, 29, 23, 17, 11, 5)
HEAD_DIM = 64
PREFIXES = (  # theirs, ours; the first that fits
    ("meta_queries", "connector.think_tokens"),
    ("connector.", "connector.connector."),
    ("projector_", "connector.projector_"),
    ("transformer.", "dit."),
    ("vae.", "vae."),
    ("lmm.", "vlm."),
)
OLD_VLM_NAMES = ((r"^visual\.", "model.visual."), (r"^model\.(layers|embed_tokens|norm)\b", r"model.language_model.\1"))


def our_name(theirs: str) -> str:
    """The name of a published tensor in `DeepGen`.

    Raises:
        WeightsMismatch: the name belongs to no part.
    """
    for prefix, ours in PREFIXES:
        if theirs.startswith(prefix):
            name = ours + theirs.removeprefix(prefix)
            break
    else:
        raise WeightsMismatch(f"tensor {theirs!r} belongs to no part; expected names that begin with {[p for p, _ in PREFIXES]}.")
    if name.startswith("vlm."):
        inner = name.removeprefix("vlm.").removeprefix("base_model.model.").replace(".base_layer.", ".")
        for old, new in OLD_VLM_NAMES:
            inner = re.sub(old, new, inner)
        name = f"vlm.{inner}"
    return name


def their_name(ours: str) -> str:
    """The published name of a tensor of `DeepGen` without adapters."""
    for theirs, prefix in PREFIXES:
        if ours.startswith(prefix):
            return theirs + ours.removeprefix(prefix)
    raise WeightsMismatch(f"tensor {ours!r} has no published name.")


def from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors in our names; LoRA, where it is apart, keeps peft's own endings."""
    return {our_name(name): tensor for name, tensor in state.items()}


def to_published(model: DeepGen) -> dict[str, Tensor]:
    """Every tensor of a model without adapters, in published names."""
    return {their_name(name): tensor for name, tensor in model.state_dict().items()}


def read_state(path: Path) -> dict[str, Tensor]:
    """A state dict from a `.safetensors`, or a `.pt` that holds tensors and nothing else.

    Raises:
        pickle.UnpicklingError: the `.pt` holds other objects.
    """
    if path.suffix == ".safetensors":
        return load_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return state.get("state_dict", state)


def adopt(model: DeepGen, published: Mapping[str, Tensor], lora_scale: float = RELEASED_LORA_SCALE) -> None:
    """Put published weights into a model of the same shapes. The language model and the autoencoder may be absent: their bases stay.

    Raises:
        WeightsMismatch: a tensor is missing, surplus or misshapen; nothing was changed.
    """
    state = from_published(published)
    adapters = {name: state.pop(name) for name in list(state) if ".lora_" in name}
    own = model.state_dict()
    given = {name.split(".")[0] for name in state}
    expected = {name for name in own if name.split(".")[0] in given | {"connector", "dit"}}
    deltas = _lora_deltas(adapters, lora_scale)
    refuse_differences(
        "published weights",
        missing=expected - state.keys(),
        surplus=(state.keys() - own.keys()) | (deltas.keys() - own.keys()),
        misshapen={n for n, t in {**state, **deltas}.items() if n in own and own[n].shape != t.shape},
    )
    with torch.no_grad():
        for name, tensor in state.items():
            own[name].copy_(tensor)
        for name, delta in deltas.items():
            own[name].add_(delta.to(own[name].dtype))
    model.connector.register_to_config(padding="reference")


def _lora_deltas(adapters: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """What adapters add to the weights they sit on: scale B A for a linear, its transpose for an embedding."""
    deltas = {}
    for name, down in adapters.items():
        found = re.fullmatch(r"(.*)\.(lora_(?:embedding_)?)A(\..*)?", name)
        if found is None:
            continue
        module, kind, ending = found.groups()
        up = adapters[f"{module}.{kind}B{ending or ''}"]
        delta = scale * (up.float() @ down.float())
        deltas[f"{module}.weight"] = delta.T if kind == "lora_embedding_" else delta
    unpaired = [name for name in adapters if ".lora_A" not in name and ".lora_B" not in name and ".lora_embedding_" not in name]
    if unpaired or 2 * len(deltas) != len(adapters):
        raise WeightsMismatch(f"{len(adapters)} LoRA tensors make {len(deltas)} pairs; not understood: {unpaired[:3]}.")
    return deltas


def load_release(folder: Path, dtype: torch.dtype = torch.float32) -> DeepGen:
    """A folder in diffusers' layout: one of ours, or the published one, whose connector has published names.

    Raises:
        WeightsMismatch: a tensor is missing, surplus or misshapen.
    """
    facts = json.loads((folder / "connector" / "config.json").read_text())
    if facts.get("_class_name") == StackedChannelBridging.__name__:
        return load_model(folder, dtype)
    files = sorted((folder / "connector").glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder / 'connector'} holds no .safetensors; expected the published connector.")
    state = {name: tensor for file in files for name, tensor in load_file(file).items()}
    vlm = load_vlm(folder / "vlm", dtype)
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    return DeepGen(
        vlm=vlm,
        connector=connector_from(state, facts, vlm.config.text_config.hidden_size).to(dtype),
        dit=load_dit(folder / "transformer", dtype),
        vae=load_vae(folder / "vae", dtype),
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True),
        timestep_shift=scheduler["shift"],
        max_prompt_tokens=1024,
    )


def connector_from(state: Mapping[str, Tensor], facts: Mapping[str, Any], vlm_hidden_size: int) -> StackedChannelBridging:
    """SCB of the shapes of published tensors. `facts` may name num_attention_heads and stacked_layers; else the released ones hold."""
    parts = {our_name(name).removeprefix("connector."): tensor for name, tensor in state.items()}
    into = parts["projector_1.weight"]
    layers = 1 + max(int(name.split(".")[2]) for name in parts if name.startswith("connector.layers."))
    connector = StackedChannelBridging(
        vlm_hidden_size=vlm_hidden_size,
        stacked_layers=tuple(facts.get("stacked_layers", RELEASED_LAYERS[: into.shape[1] // vlm_hidden_size])),
        num_think_tokens=len(parts["think_tokens"]) if "think_tokens" in parts else 0,
        hidden_size=into.shape[0],
        intermediate_size=parts["connector.layers.0.mlp.fc1.weight"].shape[0],
        layers=layers,
        heads=facts.get("num_attention_heads", into.shape[0] // HEAD_DIM),
        joint_attention_dim=parts["projector_3.weight"].shape[0],
        pooled_projection_dim=parts["projector_2.weight"].shape[0],
        padding="reference",
    )
    load_strictly(connector, parts, "connector")
    return connector


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Every tensor of `state` into `module`, or an error that names what differs."""
    own = module.state_dict()
    empty = {name: tensor for name, tensor in own.items() if tensor.numel() == 0}  # no think tokens
    refuse_differences(
        what,
        missing=own.keys() - state.keys() - empty.keys(),
        surplus=state.keys() - own.keys(),
        misshapen={name for name in own.keys() & state.keys() if own[name].shape != state[name].shape},
    )
    module.load_state_dict({**empty, **state})
