"""Groups are scored in the background, each as soon as its images are there, while the next are rolled out."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch

from training.rewards.scores import Group, Reward, Scores, beside

GROUPS_AHEAD = 8  # scored at a time; a remote judge bounds its own requests


@dataclass(frozen=True)
class Pending:
    """A group that is being scored, by each reward."""

    parts: "list[Future[Scores]]"

    def result(self) -> Scores:
        """(G, K), once all have answered; a reward that nobody asks about this prompt applies to none of its images."""
        return beside([part.result() for part in self.parts])


class Scoring:
    """Asks every reward about every group that weighs it.

    Args:
        weights_of: part -> reward -> weight. A reward of weight 0 for a part is not asked about its prompts.
        held_out: asked about all groups.
    """

    def __init__(self, rewards: Sequence[Reward], weights_of: Callable[[str], dict[str, float]], held_out: str | None = None) -> None:
        self.rewards, self.weights_of, self.held_out = rewards, weights_of, held_out
        self.names = tuple(name for reward in rewards for name in reward.names)
        self.pools = [ThreadPoolExecutor(GROUPS_AHEAD, f"reward {reward.names[0]}") for reward in rewards]

    def begin(self, group: Group) -> "Pending":
        return Pending([pool.submit(self._ask, reward, group) for pool, reward in zip(self.pools, self.rewards, strict=True)])

    def _ask(self, reward: Reward, group: Group) -> Scores:
        asked = [name for name in reward.names if self.weights_of(group.part).get(name) or name == self.held_out]
        if not asked:
            return Scores.unasked(reward.names, len(group.images))
        scores = reward(group)
        # What is no number was not scored, whoever says so.
        finite = torch.isfinite(scores.values)
        mask = torch.tensor([name in asked for name in reward.names])
        return replace(scores, values=torch.where(finite, scores.values, 0.0), valid=scores.valid & finite, applies=scores.applies & mask)

    def weights(self, groups: Sequence[Group]) -> torch.Tensor:
        """(groups, 1, K)."""
        return torch.tensor([[[self.weights_of(group.part).get(name, 0.0) for name in self.names]] for group in groups])

    def facts(self) -> dict[str, float]:
        return {name: value for reward in self.rewards for name, value in reward.facts().items()}

    def close(self) -> None:
        for pool in self.pools:
            pool.shutdown(wait=True, cancel_futures=True)
