"""The rewards that a recipe names, ready to be asked."""

from pathlib import Path

import torch

from training.config import MRGRPOConfig
from training.rewards.clip import CLIPSimilarity
from training.rewards.ocr import OCR
from training.rewards.preference import Preference
from training.rewards.scene import PARTS, SceneParts
from training.rewards.scores import Reward


def build_rewards(config: MRGRPOConfig, root: Path, folder: Path, device: torch.device) -> list[Reward]:
    """All that are trained on, and the one held out.

    Args:
        root: the project's folder, whose `foundation/clip` scores similarity.
        folder: the run's, where answers of a judge are kept.
    """
    names = [*config.trained_rewards, *([config.held_out_reward] if config.held_out_reward else [])]
    built: list[Reward] = []
    if parts := [name for name in names if name in PARTS]:
        built.append(SceneParts(parts))
    if "clip" in names:
        built.append(CLIPSimilarity(root / "foundation" / "clip", root / "foundation" / "tokenizer", device))
    if texts := [name for name in names if name.startswith("ocr")]:
        built.append(OCR(texts))
    if "preference" in names:
        assert config.preference is not None, "refused with params.yaml"
        built.append(Preference(config.preference, folder / "judge.jsonl"))
    return built
