"""The arithmetic of stage 3 on tensors that the reference implementation computed: `python -m training check-reference FILE...`.

A file holds cases of three kinds, with their settings in its metadata: stochastic steps, advantages, the clipped loss.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.reference import Agreement, Golden, compare
from runtime.exits import Plain
from training.advantages import advantages
from training.losses import clipped_ratio_loss
from training.rewards.scores import Scores
from training.sde import log_prob, sde_step

SAMPLERS = {"cps_sde": "cps_sde", "flowgrpo_sde": "flow_sde"}  # the reference's name: ours
Outputs = Iterator[tuple[str, Tensor, Tensor]]  # name, ours, theirs
NO_LIMIT = 1e30  # the reference has neither a noise floor nor a cap on the gain, and its clip comes later


@torch.no_grad()
def check_file(path: Path) -> Iterator[Agreement]:
    """Agreements of every output of every case in `path`.

    Raises:
        Plain: it holds no such cases, or some of a kind that is not known.
    """
    golden = Golden(path)
    checks: dict[str, Callable[[dict[str, Tensor], dict[str, Any]], Outputs]]
    checks = {"sde": _check_step, "advantages": _check_advantages, "policy": _check_policy}
    listed = {kind: rows for kind, rows in golden.facts.items() if isinstance(rows, list) and rows}
    if not listed or not listed.keys() <= checks.keys():
        raise Plain(f"{path}: holds {sorted(listed) or 'no'} cases; known are {', '.join(checks)}.")
    for kind, rows in listed.items():
        for number, settings in enumerate(rows):
            for output, ours, theirs in checks[kind](golden.under(f"{kind}{number}."), settings):
                yield compare(f"{kind}{number}", output, ours, theirs)


def _check_step(case: dict[str, Tensor], settings: dict[str, Any]) -> Outputs:
    """Each row is a step of its own along the grid."""
    if settings["kind"] not in SAMPLERS:
        raise Plain(f"a sampler {settings['kind']!r}; known are {', '.join(SAMPLERS)}.")
    sampler, eta = SAMPLERS[str(settings["kind"])], float(settings["eta"])
    means, stds, log_probs = [], [], []
    for row, index in enumerate(case["step_index"].tolist()):
        latents, velocity, following = (case[name][row : row + 1] for name in ("latents", "velocity", "next_latents"))
        step = sde_step(sampler, latents, velocity, case["sigmas"], int(index), eta)
        means.append(step.mean)
        moved = case["sigmas"][index] - case["sigmas"][index + 1]
        # Of the SDE the reference gives the noise scale g, of CPS the step's own deviation.
        stds.append(torch.as_tensor(step.std / moved.sqrt() if sampler == "flow_sde" else step.std).reshape(1))
        log_probs.append(log_prob(sampler, step, following))
    for name, ours in (("mean", means), ("std", stds), ("log_prob", log_probs)):
        yield name, torch.cat(ours), case[name]


def _check_advantages(case: dict[str, Tensor], settings: dict[str, Any]) -> Outputs:
    values, weights = case["rewards"], case["weights"]
    there = torch.ones_like(values, dtype=torch.bool)
    scores = Scores(tuple(f"reward{k}" for k in range(values.shape[1])), values, there, there)
    ours = advantages(scores, weights[:, None, :], settings["group_size"], noise_floor=-1.0, clip=NO_LIMIT, max_gain=NO_LIMIT)
    yield "advantages", ours, case["advantages"]


def _check_policy(case: dict[str, Tensor], settings: dict[str, Any]) -> Outputs:
    loss = clipped_ratio_loss(case["new_log_prob"], case["old_log_prob"], case["advantages"], settings["clip_range"]).mean()
    yield "loss", loss.reshape(case["loss"].shape), case["loss"]
