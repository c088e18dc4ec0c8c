"""The small CLIP whose similarity rewards MR-GRPO, trained on drawn captions and pictures.

A reward compares pictures of one prompt, so that what it must tell apart are near misses: a batch holds captions of one kind, and beside
each caption's picture one in which a single thing is wrong.
"""

# B captions of a batch, with 2 B pictures: those that were asked for, then the spoiled ones

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPModel, PreTrainedTokenizerBase

from data.config import KINDS
from data.drawn import COLORS, LETTERS, POSITIONS, SHAPES, SIDE, draw_text_to_image, relation_holds, render
from data.verifier import IN_POSITION, RELATED_BY
from model.clip import build_clip, embed_pictures, embed_prompts
from runtime.keys import seed_from
from training.batching import stack_pixels
from training.config import CLIPTrainingConfig
from training.randomness import generator
from training.steps import train_steps
from training.vlm_training import learning_rate

RETRIEVED_FROM, TEST_GROUPS = 64, 3
MAX_LOGIT_SCALE = 4.6  # a temperature of 0.01, as in CLIP


@dataclass(frozen=True)
class Pairs:
    """Captions with the pictures that they ask for and spoiled ones; fits (B, 2 B): which caption is true of which picture."""

    prompts: list[str]
    pixels: Tensor
    fits: Tensor


def train_clip(
    config: CLIPTrainingConfig, tokenizer: PreTrainedTokenizerBase, seed: int, folder: Path, stop: Callable[[], bool]
) -> dict[str, Any]:
    """Train a CLIP into `folder`/clip, stored in float16, and return what was measured of it. The same call goes on where an interrupted
    one stopped.

    Args:
        folder: of checkpoints.
        stop: asked before each step; where true, the state is saved and the training ends with `runtime.exits.Interrupted`.
    """
    torch.manual_seed(generator("clip", seed).initial_seed())
    clip = build_clip(config.width, config.layers, SIDE, tokenizer)
    optimizer = torch.optim.AdamW(clip.parameters(), lr=config.lr, betas=(0.9, 0.98), weight_decay=0.05, fused=True)

    def step(index: int) -> dict[str, float]:
        kind = list(KINDS)[index % len(KINDS)]
        pairs = draw_pairs(kind, config.batch_size, "train", seed_from("clip", seed, index))
        loss, right = contrastive_loss(clip, tokenizer, pairs)
        optimizer.param_groups[0]["lr"] = config.lr * learning_rate(index, config.steps)
        loss.backward()
        nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            clip.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        return {"loss": loss.item(), "retrieved": right}

    train_steps("clip", config.steps, step, {"clip": clip, "optimizer": optimizer}, folder, config.save_every, stop)
    clip.half().save_pretrained(folder / "clip", safe_serialization=True)
    return measure_clip(CLIPModel.from_pretrained(folder / "clip", dtype=torch.float32), tokenizer)


def contrastive_loss(clip: CLIPModel, tokenizer: PreTrainedTokenizerBase, pairs: Pairs) -> tuple[Tensor, float]:
    """Cross entropy of captions among pictures and of pictures among captions, where several may be right, and the share of captions
    whose nearest picture is."""
    logits = clip.logit_scale.exp() * embed_prompts(clip, tokenizer, pairs.prompts) @ embed_pictures(clip, pairs.pixels).T
    fits = pairs.fits.to(logits.dtype)
    wanted = fits.any(0)  # of a picture that nobody asked for there is no right caption
    by_caption = F.cross_entropy(logits, fits / fits.sum(1, keepdim=True))
    by_picture = F.cross_entropy(logits.T[wanted], (fits / fits.sum(0).clamp_min(1)).T[wanted])
    nearest = logits.argmax(1)
    return (by_caption + by_picture) / 2, pairs.fits[torch.arange(len(nearest)), nearest].float().mean().item()


# ---------------------------------------------------------------- captions, pictures, near misses


def draw_pairs(kind: str, count: int, split: str, seed: int) -> Pairs:
    samples = [draw_text_to_image(split, seed, i, {kind: 1.0}) for i in range(count)]
    rng = np.random.default_rng(seed_from("spoil", split, seed))
    pictures = [sample.scene["objects"] for sample in samples] + [spoil(sample.scene, rng) for sample in samples]
    fits = torch.tensor([[holds(sample.scene, objects) for objects in pictures] for sample in samples])
    return Pairs([sample.prompt for sample in samples], stack_pixels([render(objects) for objects in pictures]), fits)


def holds(scene: Mapping[str, Any], objects: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a picture of these objects is what the scene's caption asks for: the verifier's rules, read from objects, not pixels."""
    asked = [_name(o) for o in scene["objects"]]
    seen = {_name(o): o for o in objects}
    if sorted(asked) != sorted(_name(o) for o in objects):
        return False
    if "relation" in scene:
        return relation_holds(seen[asked[0]], seen[asked[1]], scene["relation"], RELATED_BY)
    if "position" in scene:
        x, y = POSITIONS[scene["position"]]
        return max(abs(seen[asked[0]]["x"] - x), abs(seen[asked[0]]["y"] - y)) < IN_POSITION
    return True


def spoil(scene: Mapping[str, Any], rng: np.random.Generator) -> list[dict[str, Any]]:
    """The scene's objects with one thing changed, so that its caption is no longer true."""
    while True:
        objects = [dict(o) for o in scene["objects"]]
        one = objects[int(rng.integers(len(objects)))]
        way = str(rng.choice(["color", "thing", "mirror", "remove", "double"]))
        if way == "color":
            one["color"] = str(rng.choice(list(COLORS)))
        elif way == "thing" and "word" in one:
            place = int(rng.integers(len(one["word"])))
            one["word"] = one["word"][:place] + str(rng.choice(list(LETTERS))) + one["word"][place + 1 :]
        elif way == "thing":
            one["shape"] = str(rng.choice(SHAPES))
        elif "word" in one:
            continue
        elif way == "mirror":
            axis = str(rng.choice(["x", "y"]))
            for o in objects:
                o[axis] = SIDE - o[axis]
        elif way == "remove":
            objects.remove(one)
        else:
            twin = one | {"x": SIDE - one["x"]}
            if any(max(abs(o["x"] - twin["x"]), abs(o["y"] - twin["y"])) <= 12 for o in objects):
                continue
            objects.append(twin)
        if objects and not holds(scene, objects):
            return objects


def _name(o: Mapping[str, Any]) -> tuple[str, str]:
    return o["color"], o.get("word", o.get("shape"))


# ---------------------------------------------------------------- what came of it


@torch.no_grad()
def measure_clip(clip: CLIPModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """On evaluation scenes, by kind. retrieved: share of captions whose nearest picture, of 64 of their kind, is true to them.
    ranked: share whose picture lies nearer than its spoiled copy."""
    clip.eval()
    measured: dict[str, dict[str, float]] = {"retrieved": {}, "ranked": {}}
    for kind in KINDS:
        retrieved, ranked = [], []
        for group in range(TEST_GROUPS):
            pairs = draw_pairs(kind, RETRIEVED_FROM, "evaluation", seed_from("clip test", group))
            near = embed_prompts(clip, tokenizer, pairs.prompts) @ embed_pictures(clip, pairs.pixels).T
            right, spoiled = near.split(RETRIEVED_FROM, dim=1)
            rows = torch.arange(RETRIEVED_FROM)
            retrieved.append(pairs.fits[rows, right.argmax(1)].float().mean())
            ranked.append((right.diagonal() > spoiled.diagonal()).float().mean())
        measured["retrieved"][kind] = round(torch.stack(retrieved).mean().item(), 4)
        measured["ranked"][kind] = round(torch.stack(ranked).mean().item(), 4)
    clip.train()
    return measured
