"""Parts that live on the CPU until they are used (`DeepGenPipeline.enable_model_cpu_offload`)."""

import torch
from torch import nn


def bring(part: nn.Module) -> None:
    """Move a part to its device where offloading is on. accelerate's hook does so for `part(...)` only, not for what is called inside."""
    hook = getattr(part, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(part)


def device_of(part: nn.Module) -> torch.device:
    """Where the part computes, which is not where its weights lie while it is offloaded."""
    hook = getattr(part, "_hf_hook", None)
    return next(part.parameters()).device if hook is None else torch.device(hook.execution_device)
