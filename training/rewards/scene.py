"""Rewards that the drawn world's verifier reads from an image: nothing is judged, all is measured."""

from collections.abc import Sequence

from data.verifier import verify
from training.rewards.scores import Group, Scores

PARTS = ("count", "shape", "color", "binding", "relation", "position", "word", "edited", "kept")


class SceneParts:
    """Parts of the scene that are right, each in [0, 1]; word by its letters, edited and kept of an edit.

    They apply to prompts of the drawn world only, and of those to the ones that ask for them.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)

    def __call__(self, group: Group) -> Scores:
        scores = Scores.unasked(self.names, len(group.images))
        if not group.scene:
            return scores
        for i, image in enumerate(group.images):
            parts = verify(group.scene, image, group.task).parts
            for k, name in enumerate(self.names):
                if name in parts:
                    scores.values[i, k], scores.valid[i, k], scores.applies[i, k] = parts[name], True, True
        return scores

    def facts(self) -> dict[str, float]:
        return {}
