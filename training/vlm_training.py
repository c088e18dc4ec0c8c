"""The small stand-in for Qwen2.5-VL, trained so that the states that SCB stacks carry what prompts and pictures say.

A causal language model keeps of a prompt what the next word needs, and the think tokens after it need none: their states differ by a
hundredth of their scale between a red circle and a blue one. So beside repeating prompts and answering questions, a linear head reads the
prompt back from the last think token of every stacked layer. What tells a useful VLM from a collapsed one is the relative amplitude
of attribute differences (`attribute_amplitude`), not a linear probe, which reads a collapsed one as well.
"""

# B batch, T think tokens, L length of prompt, answer and think tokens, N stacked layers, V width of the VLM, W words read back

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.config import EDITS, KINDS
from data.drawn import COLORS, LETTERS, NUMBERS, POSITIONS, SHAPES, draw_image_edit, draw_text_to_image
from model.deepgen import DeepGen
from model.prompts import prompt_tokens
from model.vlm import append_think_tokens, embed_prompts, image_token_count, prepare_prompts, stacked_hidden_states
from runtime.exits import Plain
from runtime.keys import seed_from
from training.batching import stack_pixels
from training.config import VLMTrainingConfig
from training.randomness import generator
from training.steps import train_steps

THINK_TOKENS = 4
HEAD_RATE = 10.0  # of the VLM's learning rate: at the same one, half a training goes by before the head knows how often words occur
READ_WORDS = 12  # W: as many of a prompt's last words are read back
ONE_PICTURE = {kind: share for kind, share in EDITS.items() if kind != "combine"}
TWO_PICTURES = {"combine": 1.0, "pick": 1.0}
CAPTIONS = KINDS | {"word": 0.2}  # letters are many, and each is seen seldom
TEST_TURNS = 256
AMPLITUDE_GATE = 0.2
GATED = ("color", "shape", "number")  # the other attributes are measured alone
END = "<|im_end|>"
VARIED = {  # prompts that differ in one attribute alone
    "color": [f"a {color} {SHAPES[0]}" for color in COLORS],
    "shape": [f"a red {shape}" for shape in SHAPES],
    "number": [f"{number} red circles" for number in list(NUMBERS.values())[1:]],
    "position": [f"a red circle in the {position}" for position in POSITIONS],
    "letter": [f"the word {letter}A in red" for letter in LETTERS],
}


class CollapsedVLM(Plain, RuntimeError):
    """A stacked layer's think tokens hardly differ between prompts: nothing could be learned from them."""


@dataclass(frozen=True)
class Turn:
    """What the user says, with which pictures (uint8 H, W, 3), and what the assistant answers."""

    says: str
    answer: str
    pictures: tuple[np.ndarray, ...] = ()


def train_vlm(model: DeepGen, config: VLMTrainingConfig, seed: int, folder: Path, stop: Callable[[], bool]) -> dict[str, Any]:
    """Train `model.vlm` in place and return what was measured. The same call goes on where an interrupted one stopped.

    Args:
        model: its vision tower stays as it is; the rest of its VLM begins with fresh weights, named by `seed`.
        folder: of checkpoints; the weights are left in its `vlm`, those that the gate refuses too.
        stop: asked after each step; where true, the state is saved and the training ends with `runtime.exits.Interrupted`.

    Raises:
        CollapsedVLM: the amplitude of an attribute is below the gate in a stacked layer.
    """
    initialise(model, config, seed)
    model.vlm.model.visual.requires_grad_(False)
    head = ReadOut(model, seed)
    trained = [p for p in model.vlm.parameters() if p.requires_grad]
    groups = [{"params": trained, "share": 1.0}, {"params": list(head.parameters()), "share": HEAD_RATE}]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)

    def step(index: int) -> dict[str, float]:
        kind, turns = draw_turns(config, seed, index)
        answering, right, reading = losses(model, head, turns, *draw_think_tokens(model, len(turns), seed, index))
        for group in optimizer.param_groups:
            group["lr"] = config.lr * group["share"] * learning_rate(index, config.steps)
        (answering + config.read_out * reading).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return {f"{kind}_right": right.float().mean().item(), "answering": answering.item(), "reading": reading.item()}

    train_steps("vlm", config.steps, step, {"vlm": model.vlm, "head": head, "optimizer": optimizer}, folder, config.save_every, stop)
    model.vlm.save_pretrained(folder / "vlm")
    accuracy, amplitude = answer_accuracy(model), attribute_amplitude(model)
    check_amplitude(amplitude, model.connector.config.stacked_layers, folder / "vlm")
    return {"answer_accuracy": accuracy, "amplitude": amplitude}


@torch.no_grad()
def initialise(model: DeepGen, config: VLMTrainingConfig, seed: int) -> None:
    """Fresh weights for the language model, of a scale that keeps an attribute's share of a state from layer to layer."""
    rng = generator("vlm", seed)
    for module in [*model.vlm.model.language_model.modules(), model.vlm.lm_head]:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5, generator=rng)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.normal_(model.vlm.get_input_embeddings().weight, std=config.embedding_std, generator=rng)


def learning_rate(step: int, steps: int) -> float:
    """As a share of the highest: a warm-up, a plateau, and a line down over the last 40 %."""
    return min(1.0, (step + 1) / 50, max(0.03, (steps - step) / (0.4 * steps)))


# ---------------------------------------------------------------- what is said


def draw_turns(config: VLMTrainingConfig, seed: int, step: int) -> tuple[str, list[Turn]]:
    """The batch of a step, about pictures or about words alone, and which of them: half ask, the others repeat what was said."""
    rng = np.random.default_rng(seed_from("vlm", seed, step))
    pictures = rng.random() < config.image_share
    edits = TWO_PICTURES if rng.random() < 0.2 else ONE_PICTURE  # a batch of one number of pictures is padded least
    first, second = ("image", "instruction") if pictures else ("question", "echo")
    asked = round(config.batch_size * (0.75 if pictures else 0.5))
    stream = seed_from("vlm turns", seed, step)
    turns = turns_of(first, asked, "train", stream, rng, edits)
    turns += turns_of(second, config.batch_size - asked, "train", stream + 1, rng, edits)
    return "image" if pictures else "words", turns


def turns_of(kind: str, count: int, split: str, seed: int, rng: np.random.Generator, edits: Mapping[str, float] = EDITS) -> list[Turn]:
    """`echo` repeats a caption, `instruction` an edit's instruction under its pictures; `question` and `image` ask about these.

    In everything but `image` the user's words are what the model reads when it generates and edits.
    """
    turns: list[Turn] = []
    index = 0
    while len(turns) < count:
        pictured = kind in ("image", "instruction")
        sample = draw_image_edit(split, seed, index, edits) if pictured else draw_text_to_image(split, seed, index, CAPTIONS)
        index += 1
        if kind in ("echo", "instruction"):
            turns.append(Turn(sample.prompt, sample.prompt, sample.references))
        elif kind == "question":
            if asked := question(sample.scene["objects"], rng):
                turns.append(Turn(f"{sample.prompt} {asked[0]}", asked[1]))
        else:
            which = int(rng.integers(len(sample.references)))
            if asked := question(sample.scene["second" if which else "source"], rng):
                place = f" in the {('first', 'second')[which]} picture" if len(sample.references) > 1 else ""
                turns.append(Turn(asked[0] + place, asked[1], sample.references))
    return turns


def question(objects: list[dict[str, Any]], rng: np.random.Generator) -> tuple[str, str] | None:
    """A question about the objects of a picture, and its answer of one word; None where the question drawn has no single answer."""
    one = objects[int(rng.integers(len(objects)))]
    kind = int(rng.integers(3))
    if kind == 0 and len({o["color"] for o in objects if _thing(o) == _thing(one)}) == 1:
        return f"? what color is the {_thing(one)}", one["color"]
    if kind == 1 and len({o.get("word", o.get("shape")) for o in objects if o["color"] == one["color"]}) == 1:
        return f"? what is {one['color']}", str(one.get("word", one.get("shape")))
    if kind == 2:
        return "? how many", NUMBERS[len(objects)]
    return None


def _thing(o: dict[str, Any]) -> str:
    return "word" if "word" in o else o["shape"]


# ---------------------------------------------------------------- what is learned


class ReadOut(nn.Module):
    """From normalised states of each stacked layer, less their mean over the batch, to the last words of the prompt. Thrown away."""

    def __init__(self, model: DeepGen, seed: int) -> None:
        super().__init__()
        config = model.vlm.config.text_config
        layers = len(model.connector.config.stacked_layers)
        weight = torch.randn(layers, config.hidden_size, READ_WORDS * config.vocab_size, generator=generator("read-out", seed))
        self.weight = nn.Parameter(weight * config.hidden_size**-0.5)
        self.bias = nn.Parameter(torch.zeros(layers, 1, READ_WORDS * config.vocab_size))

    def forward(self, states_BNV: Tensor) -> Tensor:
        """(B, N, V) -> logits (B, N, W, words of the vocabulary)."""
        normal = F.layer_norm(states_BNV, states_BNV.shape[-1:])
        centred = (normal - normal.mean(0)).transpose(0, 1)
        return (torch.bmm(centred, self.weight) + self.bias).transpose(0, 1).unflatten(-1, (READ_WORDS, -1))


def draw_think_tokens(model: DeepGen, rows: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """(B, T, V): random, so that states are good for whatever think tokens are learned; of scales from these' first one to 1. And their
    places (T,) after the prompt: a few of those in use, which costs less than all of them."""
    places, V = model.connector.think_tokens.shape
    rng = generator("vlm think tokens", seed, step)
    scale = V ** (-0.5 * torch.rand(rows, 1, 1, generator=rng))
    scale[: rows // 2] = 1
    chosen = torch.randperm(places, generator=rng)[:THINK_TOKENS].sort().values
    return torch.randn(rows, len(chosen), V, generator=rng) * scale, chosen


def losses(
    model: DeepGen, head: ReadOut, turns: Sequence[Turn], think_BTV: Tensor, think_places_T: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross entropy of the answers, which of their tokens are right, and cross entropy of the prompts that `head` reads back."""
    vlm = model.vlm
    said = [_said(model, turn) for turn in turns]
    answers = [model.tokenizer.encode(turn.answer + END, add_special_tokens=False) for turn in turns]
    states, answering, ids, last = _run(model, turns, said, answers, think_BTV, think_places_T)
    logits = vlm.lm_head(states[-1][:, : ids.shape[1] - 1][answering[:, 1:]])
    wanted = ids[:, 1:][answering[:, 1:]]
    rows = torch.arange(len(turns))
    stacked = torch.stack([states[layer][rows, last] for layer in model.connector.config.stacked_layers], dim=1)
    read = torch.full((len(turns), READ_WORDS), -100)
    for row, turn in enumerate(turns):
        words = model.tokenizer.encode(turn.says, add_special_tokens=False)[-READ_WORDS:]
        read[row, -len(words) :] = torch.tensor(words)
    N = stacked.shape[1]
    by_word = F.cross_entropy(head(stacked).flatten(0, 2), read[:, None].expand(-1, N, -1).flatten(), reduction="none").view(
        -1, N, READ_WORDS
    )
    weights = (
        torch.arange(1, N + 1) * 2 / (N + 1)
    )  # layers come from the top down; low ones have had least to gather words with, and count more
    reading = (by_word.sum((0, 2)) / (read >= 0).sum() * weights).mean()
    return F.cross_entropy(logits, wanted), logits.argmax(-1) == wanted, reading


def _said(model: DeepGen, turn: Turn) -> list[int]:
    tokens = [image_token_count(model.vlm, *picture.shape[:2]) for picture in turn.pictures]
    return prompt_tokens(model.tokenizer, turn.says, tokens, model.max_prompt_tokens)


def _run(
    model: DeepGen, turns: Sequence[Turn], said: list[list[int]], answers: list[list[int]], think_BTV: Tensor, think_places_T: Tensor
) -> tuple[Sequence[Tensor], Tensor, Tensor, Tensor]:
    """One pass over prompt, answer and think tokens, where the think tokens see the prompt alone and stand right after it, as in use.

    Returns:
        hidden states (B, L, V) by layer, places of the answers (B, L - T), token ids (B, L - T), the place of each last think token (B,).
    """
    B, T = think_BTV.shape[:2]
    references = [list(stack_pixels(turn.pictures)) if turn.pictures else [] for turn in turns]
    rows = [prompt + answer for prompt, answer in zip(said, answers, strict=True)]
    batch = prepare_prompts(model.vlm, rows, references, T, pad_id=model.tokenizer.pad_token_id)
    starts = torch.tensor([len(prompt) for prompt in said])[:, None]
    ends = batch.lengths[:, None]
    places = torch.arange(batch.ids.shape[1] + T)
    answering = (places >= starts) & (places < ends)
    thinking = (places >= ends) & (places < ends + T)
    after = batch.position_ids[0].gather(1, starts - 1) + 1 + think_places_T[(places - ends).clamp(0, T - 1)]
    visible = (places[:, None] >= places) & (places < ends + T)[:, None] & ~(thinking[:, :, None] & answering[:, None, :])
    states = model.vlm.model.language_model(
        inputs_embeds=append_think_tokens(embed_prompts(model.vlm, batch), think_BTV, batch),
        position_ids=torch.where(thinking, after, batch.position_ids),
        attention_mask={"full_attention": visible[:, None]},
        output_hidden_states=True,
        use_cache=False,
    ).hidden_states
    return states, answering[:, : batch.ids.shape[1]], batch.ids, batch.lengths + T - 1


# ---------------------------------------------------------------- what came of it


@torch.no_grad()
def answer_accuracy(model: DeepGen) -> dict[str, float]:
    """Share of the answers' tokens, their end included, that are right on evaluation scenes, by kind; `word`
    is the echo of captions with a word."""
    shares = {}
    for kind in ("echo", "question", "image", "instruction"):
        turns = turns_of(kind, TEST_TURNS, "evaluation", seed_from("vlm test"), np.random.default_rng(seed_from("vlm test", kind)))
        shares[kind] = _share_right(model, turns)
    words = [draw_text_to_image("evaluation", seed_from("vlm test"), i, {"word": 1.0}).prompt for i in range(TEST_TURNS)]
    shares["word"] = _share_right(model, [Turn(prompt, prompt) for prompt in words])
    return shares


def _share_right(model: DeepGen, turns: Sequence[Turn]) -> float:
    head = ReadOut(model, 0)
    return round(losses(model, head, turns, *draw_think_tokens(model, len(turns), 0, 0))[1].float().mean().item(), 4)


def check_amplitude(amplitude: Mapping[str, Sequence[float]], layers: Sequence[int], weights: Path) -> None:
    """Raises CollapsedVLM, with all figures, if one of a gated attribute is below the gate."""
    if min(min(amplitude[attribute]) for attribute in GATED) >= AMPLITUDE_GATE:
        return
    figures = "; ".join(
        f"{attribute} " + ", ".join(f"layer {layer} {value}" for layer, value in zip(layers, by_layer, strict=True))
        for attribute, by_layer in amplitude.items()
    )
    raise CollapsedVLM(
        f"vlm: attributes move the last think token by {figures}; at least {AMPLITUDE_GATE} of its scale is wanted in "
        f"each of {', '.join(GATED)}. "
        f"Raise vlm.steps, or vlm.read_out, in foundation/params.yaml and train it again. The weights that were measured are in {weights}."
    )


@torch.no_grad()
def attribute_amplitude(model: DeepGen) -> dict[str, list[float]]:
    """By attribute and stacked layer: how far it moves the last think token, relative to its normalised scale (rms over channels of the
    spread between prompts that differ in it alone). A linear probe reads attributes even from a collapsed model; this does not."""
    think = torch.randn(16, model.vlm.config.text_config.hidden_size, generator=generator("amplitude"))
    layers = tuple(model.connector.config.stacked_layers)
    amplitudes = {}
    for attribute, prompts in VARIED.items():
        rows = [prompt_tokens(model.tokenizer, prompt, (), 64) for prompt in prompts]
        batch = prepare_prompts(model.vlm, rows, [[]] * len(rows), len(think), pad_id=model.tokenizer.pad_token_id)
        states, _ = stacked_hidden_states(model.vlm, batch, think, layers, train_vlm=False)
        last = states[torch.arange(len(rows)), batch.lengths + len(think) - 1].unflatten(-1, (len(layers), -1))
        normal = F.layer_norm(last, last.shape[-1:])
        amplitudes[attribute] = [round(value, 3) for value in normal.std(0).pow(2).mean(-1).sqrt().tolist()]
    return amplitudes
