"""A model folder: diffusers' layout, safetensors only, read strictly.

vlm/ connector/ transformer/ vae/ tokenizer/ scheduler/ model_index.json; every stage ends in one, and exports are one.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.utils.logging import disable_progress_bar

from model.config import ModelConfig, ResolutionShift
from model.connector import StackedChannelBridging
from model.deepgen import DeepGen, build_connector
from model.dit import DeepGenTransformer
from model.vae import AnyAutoencoder, LinearAutoencoder
from runtime.exits import Plain
from runtime.files import write_json

disable_progress_bar()  # a bar a part says nothing to anyone, and floods logs
LOADED_FROM = ("_name_or_path", "is_local", "local_files_only")  # how a part was read is no property of it, and differs between clones
PARTS = ("vlm", "connector", "transformer", "vae")
VAE_CLASSES = {"AutoencoderKL": AutoencoderKL, "LinearAutoencoder": LinearAutoencoder}
CLASSES: dict[str, tuple[str, str]] = {
    "vlm": ("transformers", "Qwen2_5_VLForConditionalGeneration"),
    "connector": ("model.connector", "StackedChannelBridging"),
    "transformer": ("model.dit", "DeepGenTransformer"),
    "tokenizer": ("transformers", "PreTrainedTokenizerFast"),
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
}


class WeightsMismatch(Plain, ValueError):
    """Stored tensors do not fit the model: which are missing, surplus or of another shape."""


def save_model(model: DeepGen, folder: Path) -> None:
    """Write every part of `model` under `folder`. Equal weights give equal bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, Any] = {"vlm": model.vlm, "connector": model.connector, "transformer": model.dit, "vae": model.vae}
    for config in (model.vlm.config, model.vlm.config.text_config, model.vlm.config.vision_config):
        config.dtype = model.vlm.dtype
    for name, part in parts.items():
        part.save_pretrained(folder / name, safe_serialization=True)
    model.tokenizer.save_pretrained(folder / "tokenizer")
    scheduler_of(model).save_pretrained(folder / "scheduler")
    index = {name: list(place) for name, place in CLASSES.items()}
    vae = type(model.vae).__name__
    index["vae"] = ["diffusers" if vae == "AutoencoderKL" else "model.vae", vae]
    write_json(folder / "model_index.json", index | {"_class_name": "DeepGenPipeline", "max_prompt_tokens": model.max_prompt_tokens})
    for config in sorted(folder.rglob("*config.json")):
        write_json(config, {key: value for key, value in json.loads(config.read_text()).items() if key not in LOADED_FROM})


def load_model(folder: Path, dtype: torch.dtype = torch.float32) -> DeepGen:
    """The model in `folder`, offline and strict.

    Raises:
        FileNotFoundError: no model_index.json there.
        WeightsMismatch: a tensor is missing, surplus or misshapen.
    """
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"{folder} holds no model_index.json; expected a model folder with {', '.join(PARTS)}.")
    index = json.loads((folder / "model_index.json").read_text())
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    return DeepGen(
        vlm=load_vlm(folder / "vlm", dtype),
        connector=_load_part(StackedChannelBridging, folder / "connector", dtype),
        dit=load_dit(folder / "transformer", dtype),
        vae=load_vae(folder / "vae", dtype),
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True),
        timestep_shift=scheduler["shift"],
        max_prompt_tokens=index["max_prompt_tokens"],
        resolution_shift=resolution_shift_of(scheduler),
    )


def scheduler_of(model: DeepGen) -> FlowMatchEulerDiscreteScheduler:
    """The model's shift in diffusers' terms."""
    by_size = model.resolution_shift
    if by_size is None:
        return FlowMatchEulerDiscreteScheduler(shift=model.timestep_shift)
    return FlowMatchEulerDiscreteScheduler(
        shift=model.timestep_shift,
        use_dynamic_shifting=True,
        base_image_seq_len=by_size.base_tokens,
        max_image_seq_len=by_size.max_tokens,
        base_shift=by_size.base_shift,
        max_shift=by_size.max_shift,
    )


def resolution_shift_of(scheduler: Mapping[str, Any]) -> ResolutionShift | None:
    """The other way round, from a scheduler's config."""
    if not scheduler.get("use_dynamic_shifting"):
        return None
    return ResolutionShift(
        base_tokens=scheduler["base_image_seq_len"],
        max_tokens=scheduler["max_image_seq_len"],
        base_shift=scheduler["base_shift"],
        max_shift=scheduler["max_shift"],
    )


def load_foundation(folder: Path, config: ModelConfig) -> DeepGen:
    """The capable parts in `folder` (vlm, transformer, vae, tokenizer) with a fresh connector; seed torch before calling."""
    return DeepGen(
        vlm=load_vlm(folder / "vlm", torch.float32),
        connector=build_connector(config),
        dit=load_dit(folder / "transformer", torch.float32, reference_offset=config.dit.reference_offset),
        vae=load_vae(folder / "vae", torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True),
        timestep_shift=config.timestep_shift,
        max_prompt_tokens=config.vlm.max_prompt_tokens,
        resolution_shift=config.resolution_shift,
    )


def load_vlm(folder: Path, dtype: torch.dtype) -> Qwen2_5_VLForConditionalGeneration:
    """Qwen2.5-VL from its published layout or ours."""
    model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    refuse_differences(folder, info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])
    return model


def load_dit(folder: Path, dtype: torch.dtype, **settings: Any) -> DeepGenTransformer:
    """The transformer of an SD3 or UniPic2 folder, or ours; `settings` replace those of its config."""
    return _load_part(DeepGenTransformer, folder, dtype, **settings)


def load_vae(folder: Path, dtype: torch.dtype) -> AnyAutoencoder:
    """The autoencoder that the folder's config names."""
    return _load_part(VAE_CLASSES[json.loads((folder / "config.json").read_text())["_class_name"]], folder, dtype)


def _load_part(kind: Any, folder: Path, dtype: torch.dtype, **settings: Any) -> Any:
    part, info = kind.from_pretrained(
        folder, torch_dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True, **settings
    )
    refuse_differences(folder, info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])
    return part


def refuse_differences(where: Path | str, missing: Iterable[Any], surplus: Iterable[Any], misshapen: Iterable[Any]) -> None:
    """Raise WeightsMismatch, naming tensors, unless nothing differs."""
    problems = {
        kind: sorted(map(str, names)) for kind, names in (("missing", missing), ("surplus", surplus), ("misshapen", misshapen)) if names
    }
    if problems:
        said = "; ".join(f"{len(names)} {kind}: {', '.join(names[:8])}" for kind, names in problems.items())
        raise WeightsMismatch(f"{where}: tensors do not fit the model. {said}. Publish or fetch the weights again.")
