"""A stage's parent, and what trains in it, made so on the model (paper sections 3.1-3.3)."""

from torch import nn

from model.deepgen import DeepGen
from model.lora import add_lora
from model.parts import TRAINED, part_of
from runtime.params import Params
from training.config import LoRAConfig

PARENT = {"alignment": "foundation", "sft": "alignment", "mr_grpo": "sft"}  # sft.start may name another


def parent_of(stage: str, params: Params) -> str | None:
    """The folder of outputs/ whose weights `stage` starts from; None for what is no training stage."""
    return params.sft.start if stage == "sft" else PARENT.get(stage)


def freeze_for(model: DeepGen, stage: str, lora: LoRAConfig | None = None) -> dict[str, nn.Parameter]:
    """Attach LoRA where the stage has it, freeze all but what the table names, and return the trained parameters by name.

    Raises:
        ValueError: LoRA is set for a stage that does not train it.
    """
    wants_lora = "vlm_lora" in TRAINED[stage]
    if lora is not None and not wants_lora:
        raise ValueError(f"{stage}.lora: set, but this stage trains {TRAINED[stage]}; set it to null")
    if lora is not None:
        add_lora(model, lora.rank, lora.alpha, lora.dropout)
    model.train_vlm = wants_lora and lora is not None
    trained = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in TRAINED[stage])
        if parameter.requires_grad:
            trained[name] = parameter
    return trained
