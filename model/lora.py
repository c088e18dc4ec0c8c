"""Low-rank adapters on the language model, through peft (paper section 3.2)."""

from pathlib import Path

from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file

from model.deepgen import DeepGen
from runtime.files import read_json, write_json

LINEARS = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_settings.json"


def add_lora(model: DeepGen, rank: int, alpha: float, dropout: float = 0.0) -> None:
    """LoRA on the linears of the language model layers below the deepest stacked one.

    The released code adapts every linear and embedding of the VLM; later layers, the head and the vision tower never get a gradient.
    """
    depth = max(model.connector.config.stacked_layers)
    layers = "|".join(str(layer) for layer in range(depth))
    target = rf".*language_model\.layers\.({layers})\..*\.({LINEARS})"
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=target), model.vlm)


def lora_targets(model: DeepGen) -> str:
    """What is adapted, in words; "none" without adapters."""
    names = [name.split(".") for name, module in model.vlm.named_modules() if isinstance(module, BaseTunerLayer)]
    if not names:
        return "none"
    config = model.vlm.peft_config["default"]
    layers = sorted({int(name[name.index("layers") + 1]) for name in names})
    linears = ", ".join(sorted({name[-1] for name in names}))
    return f"rank {config.r}, alpha {config.lora_alpha:g}, on {linears} of language layers {layers[0]} to {layers[-1]}"


def save_lora(model: DeepGen, folder: Path) -> None:
    """The adapters alone, in peft's names, with rank and alpha beside them."""
    config = model.vlm.peft_config["default"]
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in get_peft_model_state_dict(model.vlm).items()}, folder / WEIGHTS)
    write_json(folder / SETTINGS, {"rank": config.r, "alpha": config.lora_alpha, "dropout": config.lora_dropout})


def load_lora(model: DeepGen, folder: Path) -> None:
    """Attach saved adapters to a model without.

    Raises:
        ValueError: a tensor is missing or surplus, because they were trained on another model.
    """
    add_lora(model, **read_json(folder / SETTINGS))
    stored = load_file(folder / WEIGHTS)
    wanted = get_peft_model_state_dict(model.vlm)
    if wrong := sorted(wanted.keys() ^ stored.keys()):
        raise ValueError(f"{folder / WEIGHTS}: {len(wrong)} tensors do not match this VLM, among them {wrong[:3]}.")
    set_peft_model_state_dict(model.vlm, stored)


def merge_lora(model: DeepGen) -> None:
    """Fold LoRA into the weights it adapts and take the adapters out, so that the VLM has its published names again."""
    for name, module in list(model.vlm.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent = model.vlm.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], module.get_base_layer())
    if hasattr(model.vlm, "peft_config"):
        del model.vlm.peft_config
    model.train_vlm = False
