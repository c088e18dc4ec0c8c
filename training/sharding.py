"""How a model lies on several ranks: a copy on each (ddp), or in shards, as the file of its strategy in `training/accelerate/` says.

accelerate's plugins read the files. Its own FSDP2 starts on a GPU only, so torch's `fully_shard` is called here, on a CPU and a GPU alike.
"""

import copy
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin, convert_outputs_to_fp32
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from model.deepgen import DeepGen
from training.checkpoint import TrainState
from training.config import LaunchConfig
from training.ranks import shard, whole

FOLDER = Path(__file__).parent / "accelerate"
PLUGINS = {"fsdp2": FullyShardedDataParallelPlugin, "zero2": DeepSpeedPlugin}


def read_plugin(strategy: str) -> Any:
    """accelerate's plugin with the settings of `training/accelerate/<strategy>.yaml`."""
    return PLUGINS[strategy](**yaml.safe_load((FOLDER / f"{strategy}.yaml").read_text()))


def spread(accelerator: Accelerator, config: LaunchConfig, model: DeepGen, state: TrainState) -> nn.Module:
    """The module whose forward pass trains. With fsdp2 that is `model` itself: its parameters, and all that `state` holds of them, are
    shards from here on. The autoencoder, which is used outside of the forward pass, stays whole on every rank."""
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    if config.compile:
        compile_blocks(model)
    if config.strategy != "fsdp2":
        return accelerator.prepare_model(model)
    plugin = read_plugin("fsdp2")
    settings = {
        "mesh": init_device_mesh(accelerator.device.type, (accelerator.num_processes,)),
        "reshard_after_forward": plugin.reshard_after_forward,
        "offload_policy": plugin.cpu_offload,
        "ignored_params": set(model.vae.parameters()),
    }
    before = dict(state.trained)
    if config.precision == "bf16":  # as accelerate does: autocast, so that sigmas and sums stay float32
        computed = torch.autocast(accelerator.device.type, torch.bfloat16)(model.forward)
        model.forward = convert_outputs_to_fp32(computed)  # type: ignore[method-assign]
    for module in reversed(list(model.modules())):
        if type(module).__name__ in plugin.transformer_cls_names_to_wrap:
            fully_shard(module, **settings)
    fully_shard(model, **settings)
    for method in ("encode_condition", "predict_velocity"):  # as validation and boards call them, beside the forward pass
        register_fsdp_forward_method(model, method)
    after = dict(model.named_parameters())
    state.trained = {name: after[name] for name in before}
    _move_optimizer(state.optimizer, {old: after[name] for name, old in before.items()})
    if state.ema is not None:
        state.ema.parameters = state.trained
        state.ema.average = {name: shard(value, after[name]) for name, value in state.ema.average.items()}
    return model


def checkpoint_activations(model: DeepGen) -> None:
    """Keep of the DiT's blocks, and of the language model's layers where LoRA trains them, their inputs alone, and run them once more in
    the backward pass. A frozen language model reads its prompt without gradients, into a cache that no layer may drop."""
    model.dit.enable_gradient_checkpointing()
    if model.train_vlm:
        model.vlm.model.language_model.gradient_checkpointing_enable({"use_reentrant": False})


def compile_blocks(model: DeepGen, backend: str = "inductor") -> None:
    """Let torch.compile have the blocks that train, each by itself: blocks of one kind are compiled once, and names stay."""
    for block in (*model.dit.transformer_blocks, *model.connector.connector.layers):
        block.compile(backend=backend)


def _move_optimizer(optimizer: torch.optim.Optimizer, shards: dict[Any, nn.Parameter]) -> None:
    """Let an optimizer step the shards of its parameters, with shards of their moments."""
    moments: dict[Tensor, Any] = {
        shards[old]: {slot: shard(value, shards[old]) for slot, value in slots.items()} for old, slots in optimizer.state.items()
    }
    for group in optimizer.param_groups:
        group["params"] = [shards[old] for old in group["params"]]
    optimizer.state = defaultdict(dict, moments)


def gathered(state: TrainState) -> TrainState:
    """`state` with whole tensors, on the CPU; all ranks must ask. Without shards it is `state` itself, so that a checkpoint is the same for
    any strategy and number of ranks."""
    if not any(isinstance(parameter, DTensor) for parameter in state.trained.values()):
        return state
    result = copy.copy(state)
    result.trained = {name: nn.Parameter(whole(p.detach()).cpu()) for name, p in state.trained.items()}
    result.optimizer = copy.copy(state.optimizer)
    moments = {p: {slot: whole(value).cpu() for slot, value in slots.items()} for p, slots in state.optimizer.state.items()}
    result.optimizer.state = defaultdict(dict, moments)
    if state.ema is not None:
        result.ema = copy.copy(state.ema)
        result.ema.average = {name: whole(value).cpu() for name, value in state.ema.average.items()}
    return result
