"""Muon (Keller Jordan, 2024) for the matrices of transformer blocks, in float32, its work shared among ranks."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, distributed, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal by Newton-Schulz steps and scaled to the root mean square of AdamW's updates (arXiv 2502.16982).

    torch.optim.Muon iterates in bfloat16, which CPUs emulate (a step of the small DiT took 1.5 s). Here matrices of one shape run as a
    batch in float32, and each rank does its share.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        shared = distributed.is_initialized()
        rank, size = (distributed.get_rank(), distributed.get_world_size()) if shared else (0, 1)
        for group in self.param_groups:
            parameters: list[nn.Parameter] = group["params"]
            updates = [self._momentum(parameter, group) for parameter in parameters]
            flat = torch.zeros(sum(parameter.numel() for parameter in parameters))
            places = [view.view_as(p) for view, p in zip(flat.split([p.numel() for p in parameters]), parameters, strict=True)]
            by_shape: dict[tuple[int, ...], list[int]] = defaultdict(list)
            for i in range(rank, len(parameters), size):
                by_shape[tuple(parameters[i].shape)].append(i)
            for rows in by_shape.values():
                for i, whole in zip(rows, orthogonal(torch.stack([updates[i] for i in rows])), strict=True):
                    places[i].copy_(whole)
            if shared:
                distributed.all_reduce(flat)
            for parameter, update in zip(parameters, places, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * 0.2 * max(parameter.shape) ** 0.5)

    def _momentum(self, parameter: nn.Parameter, group: dict[str, Any]) -> Tensor:
        """Nesterov's, of the gradient."""
        assert parameter.grad is not None, "every matrix has a gradient"
        average = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
        average.lerp_(parameter.grad, 1 - group["momentum"])
        return parameter.grad.lerp(average, group["momentum"])


def orthogonal(matrices_BMN: Tensor, steps: int = 5) -> Tensor:
    """Each matrix with its singular values brought near 1."""
    a, b, c = COEFFICIENTS
    wide = matrices_BMN.shape[-2] <= matrices_BMN.shape[-1]
    X = matrices_BMN if wide else matrices_BMN.mT
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X if wide else X.mT
