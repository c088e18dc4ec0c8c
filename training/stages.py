"""What trains in each stage: one table; nothing else freezes (paper sections 3.1-3.3)."""

from collections.abc import Callable

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from model.deepgen import DeepGen
from training.config import LoRAConfig

TRAINED: dict[str, tuple[str, ...]] = {
    "alignment": ("think_tokens", "connector"),
    "sft": ("think_tokens", "connector", "dit", "vlm_lora"),
    "mr_grpo": ("dit",),
}
PARENT = {"alignment": "foundation", "sft": "alignment", "mr_grpo": "sft"}

BELONGS: dict[str, Callable[[str], bool]] = {
    "think_tokens": lambda name: name == "connector.think_tokens",
    "connector": lambda name: name.startswith("connector.") and name != "connector.think_tokens",
    "dit": lambda name: name.startswith("dit."),
    "vlm_lora": lambda name: name.startswith("vlm.") and ".lora_" in name,
}


def freeze_for(model: DeepGen, stage: str, lora: LoRAConfig | None = None) -> dict[str, nn.Parameter]:
    """Attach LoRA where the stage has it, freeze all but what the table names, and return the trained parameters by name.

    Raises:
        ValueError: the stage trains `vlm_lora` and no `lora` settings are given, or the other way round.
    """
    wants_lora = "vlm_lora" in TRAINED[stage]
    if lora is not None and not wants_lora:
        raise ValueError(f"{stage}.lora: set, but this stage trains {TRAINED[stage]}; set it to null")
    if wants_lora and lora is not None:
        add_lora(model, lora)
    model.train_vlm = wants_lora and lora is not None
    trained = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(BELONGS[part](name) for part in TRAINED[stage]))
        if parameter.requires_grad:
            trained[name] = parameter
    return trained


def add_lora(model: DeepGen, lora: LoRAConfig) -> None:
    """LoRA on the linears of the language model layers below the deepest stacked one: later layers could not learn."""
    depth = max(model.connector.config.stacked_layers)
    layers = "|".join(str(layer) for layer in range(depth))
    target = rf".*language_model\.layers\.({layers})\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    inject_adapter_in_model(LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=target), model.vlm)


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


def parameter_report(model: DeepGen) -> list[dict[str, str | int]]:
    """Rows of part, trained and frozen parameter counts and dtypes."""
    rows: list[dict[str, str | int]] = []
    parts: dict[str, list[nn.Parameter]] = {"vlm": [], "vlm_lora": [], "think_tokens": [], "connector": [], "dit": [], "vae": []}
    for name, parameter in model.named_parameters():
        part = next((part for part, belongs in BELONGS.items() if belongs(name)), name.split(".")[0])
        parts[part].append(parameter)
    for part, parameters in parts.items():
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        total = sum(p.numel() for p in parameters)
        dtypes = "/".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters})) or "-"
        rows.append({"part": part, "trained": trained, "frozen": total - trained, "dtype": dtypes})
    return rows
