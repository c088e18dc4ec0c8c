"""Small stand-ins for the capable parts that the paper starts from: a linear autoencoder, a VLM and a DiT, trained on the drawn world.

Prototype findings built in: a causal language model drops attributes that the next word does not need, so the VLM repeats and answers;
what tells a useful VLM from a collapsed one is the relative amplitude of attribute differences, not a linear probe.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data.drawn import COLORS, NUMBERS, SHAPES, VOCABULARY, DrawnSample, draw_image_edit, draw_text_to_image
from data.verifier import verify
from model.config import ModelConfig
from model.deepgen import Condition, DeepGen, build_deepgen
from model.flow import interpolate, sigmas_at, velocity_target
from model.prompts import FOOTER, GENERATE, HEADER, IMAGE_PAD, VISION_END, VISION_START, prompt_tokens
from model.sampler import initial_noise, sample_euler
from model.vae import decode_latents, encode_images, to_uint8
from model.vlm import embed_prompts, encode_references, image_token_count, prepare_prompts, stacked_hidden_states
from model.weights import load_foundation, save_model
from runtime.files import folder_files, read_json, sha256_file, sha256_json, sha256_path, write_atomic, write_json
from runtime.keys import seed_from
from runtime.params import load_params, parse_params
from runtime.progress import Progress
from runtime.stage import find_root
from training.batching import batched, reference_pixels, stack_pixels
from training.config import DiTTrainingConfig, FoundationTraining, VLMTrainingConfig
from training.losses import flow_matching_loss
from training.optim import EMA
from training.randomness import generator, quantiles, sample_noise
from training.tokenizer import build_tokenizer

MAX_WORDS = 16
AMPLITUDE_GATE = 0.2


class PlainTextEncoder(nn.Module):
    """Words to a condition for the DiT: stands where SD3's own text encoders stood, and is thrown away after the DiT has learned."""

    def __init__(self, vocab_size: int, joint_attention_dim: int, pooled_projection_dim: int, layers: int = 2) -> None:
        super().__init__()
        self.words = nn.Embedding(vocab_size, joint_attention_dim)
        self.positions = nn.Parameter(torch.randn(MAX_WORDS, joint_attention_dim) * 0.1)
        layer = nn.TransformerEncoderLayer(joint_attention_dim, 4, joint_attention_dim * 4, 0.0, F.gelu, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(joint_attention_dim)
        self.pool = nn.Linear(joint_attention_dim, pooled_projection_dim)
        nn.init.normal_(self.words.weight, std=0.5)

    def forward(self, ids_BL: Tensor, lengths_B: Tensor) -> Condition:
        mask = torch.arange(ids_BL.shape[1]) < lengths_B[:, None]
        x = self.norm(self.encoder(self.words(ids_BL) + self.positions[: ids_BL.shape[1]], src_key_padding_mask=~mask))
        real = mask[..., None].to(x.dtype)
        return Condition(x * real, self.pool((x * real).sum(1) / real.sum(1)), lengths_B)


def train_foundation(config: FoundationTraining, shapes: ModelConfig, out: Path) -> dict[str, Any]:
    """Train all parts into `out`/model and return what was measured. The autoencoder and the VLM, once done, are not trained again."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(generator("foundation", config.seed).initial_seed())
    measured: dict[str, Any] = {}
    if (out / "vlm.json").exists():
        measured["vlm"] = read_json(out / "vlm.json")
        model = load_foundation(out / "model", shapes)
    else:
        model = build_deepgen(shapes, build_tokenizer(VOCABULARY, shapes.vlm.vocab_size))
        fit_autoencoder(model, config)
        standardise_vision(model, config)
        measured["vlm"] = train_vlm(model, config.vlm, config.seed, out)
        measured["vlm"]["amplitude"] = amplitude = attribute_amplitude(model)
        save_model(model, out / "model")
        write_json(out / "vlm.json", measured["vlm"])
        if min(amplitude) < AMPLITUDE_GATE:
            print(f"vlm: WARNING: amplitude {amplitude} by stacked layer; {AMPLITUDE_GATE} is wanted in each", flush=True)
    torch.manual_seed(generator("text encoder", config.seed).initial_seed())
    encoder = PlainTextEncoder(shapes.vlm.vocab_size, shapes.dit.joint_attention_dim, shapes.dit.pooled_projection_dim)
    measured["dit"] = train_dit(model, encoder, config, out)
    save_model(model, out / "model")
    save_file(encoder.state_dict(), out / "model" / "text_encoder.safetensors")
    write_json(out / "measured.json", measured)
    return measured


def draw(split: str, seed: int, index: int, task: str, kinds: dict[str, float] | None = None) -> DrawnSample:
    if task == "image_edit":
        return draw_image_edit(split, seed, index)
    return draw_text_to_image(split, seed, index, kinds) if kinds else draw_text_to_image(split, seed, index)


def fit_autoencoder(model: DeepGen, config: FoundationTraining) -> None:
    images = [draw("train", seed_from("autoencoder", config.seed), i, "text_to_image").target for i in range(config.autoencoder_images)]
    model.vae.fit(stack_pixels(images), config.whitening)


@torch.no_grad()
def standardise_vision(model: DeepGen, config: FoundationTraining) -> None:
    """Fold the mean and spread of the random vision tower's output into its last layer, so that image tokens are of unit scale."""
    images = [draw("train", seed_from("vision", config.seed), i, "image_edit").references[0] for i in range(400)]
    tokens = torch.cat(encode_references(model.vlm, list(stack_pixels(images))))
    last: Any = model.vlm.model.visual.merger.mlp[-1]
    mean, spread = tokens.mean(0), tokens.std(0) + 1e-6
    last.weight.div_(spread[:, None])
    last.bias.sub_(mean).div_(spread)


def question(sample: DrawnSample, objects: list[dict[str, Any]], rng: np.random.Generator) -> tuple[str, str] | None:
    """A question about the objects of a scene, and its one-word answer; None where the question drawn has no single answer."""
    if not objects:
        return None
    one = objects[int(rng.integers(len(objects)))]
    kind = int(rng.integers(3))
    if kind == 0 and len({o["color"] for o in objects if o["shape"] == one["shape"]}) == 1:
        return f"? what color is the {one['shape']}", one["color"]
    if kind == 1 and len({o["shape"] for o in objects if o["color"] == one["color"]}) == 1:
        return f"? what is {one['color']}", one["shape"]
    if kind == 2:
        return "? how many", NUMBERS[len(objects)]
    return None


def train_vlm(model: DeepGen, config: VLMTrainingConfig, seed: int, out: Path) -> dict[str, Any]:
    """Echo of the prompt through the chat template, questions about it, and questions about images."""
    vlm = model.vlm
    nn.init.normal_(vlm.get_input_embeddings().weight, std=config.embedding_std, generator=generator("embedding", seed))
    vlm.model.visual.requires_grad_(False)
    trained = [p for p in vlm.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    recent: dict[str, list[float]] = {"echo": [], "question": [], "image": []}
    with Progress(config.steps, "step", "vlm", out / "vlm.jsonl") as progress:
        for step in range(config.steps):
            rng = np.random.default_rng(seed_from("vlm", seed, step))
            kind = "image" if rng.random() < config.image_share else ("echo" if rng.random() < 0.5 else "question")
            loss, accuracy = answer_loss(model, kind, config.batch_size, rng, "train", seed_from("vlm", seed, step))
            rate = min(1.0, (step + 1) / 100) * (
                1.0 if step < 0.6 * config.steps else max(0.03, (config.steps - step) / (0.4 * config.steps))
            )
            optimizer.param_groups[0]["lr"] = config.lr * rate
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            recent[kind].append(accuracy)
            progress.update(loss=loss.item(), **{name: float(np.mean(values[-20:])) for name, values in recent.items() if values})
    with torch.no_grad():
        held_out = {
            kind: round(answer_loss(model, kind, 256, np.random.default_rng(seed_from("vlm test", kind)), "evaluation", 99)[1], 4)
            for kind in recent
        }
    return {"answer_accuracy": held_out}


def answer_loss(model: DeepGen, kind: str, count: int, rng: np.random.Generator, split: str, seed: int) -> tuple[Tensor, float]:
    """Cross entropy on the assistant's words, and the share of them that is right."""
    encode = model.tokenizer.encode
    rows: list[list[int]] = []
    starts: list[int] = []
    images: list[np.ndarray] = []
    index = 0
    while len(rows) < count:
        edit = kind == "image" or (kind == "echo" and rng.random() < 0.3)
        sample = draw(split, seed, index, "image_edit" if edit else "text_to_image")
        index += 1
        header = HEADER + GENERATE + sample.prompt
        if edit:
            header = HEADER + sample.prompt
        words, answer = "", sample.prompt
        if kind != "echo":
            objects = sample.scene["source"] if edit else sample.scene["objects"]
            asked = question(sample, [o for o in objects if "shape" in o], rng)
            if asked is None:
                continue
            words, answer = asked
            header = f"{header} {words}"
        if kind == "image":
            height, width = sample.references[0].shape[:2]
            pads = IMAGE_PAD * image_token_count(model.vlm, height, width)
            header = f"{HEADER}{VISION_START}{pads}{VISION_END}\n{words}"
            images.append(sample.references[0])
        before = encode(header + FOOTER, add_special_tokens=False)
        rows.append(before + encode(answer + "<|im_end|>", add_special_tokens=False))
        starts.append(len(before))
    references = [[image] for image in stack_pixels(images)] if images else [[]] * len(rows)
    batch = prepare_prompts(model.vlm, rows, references, 0, pad_id=model.tokenizer.pad_token_id)
    states = model.vlm.model.language_model(inputs_embeds=embed_prompts(model.vlm, batch), position_ids=batch.position_ids, use_cache=False)
    places = torch.arange(batch.ids.shape[1])
    answers = (places >= torch.tensor(starts)[:, None]) & (places < batch.lengths[:, None])
    logits = model.vlm.lm_head(states.last_hidden_state[:, :-1][answers[:, 1:]])
    wanted = batch.ids[:, 1:][answers[:, 1:]]
    return F.cross_entropy(logits, wanted), (logits.argmax(-1) == wanted).float().mean().item()


@torch.no_grad()
def attribute_amplitude(model: DeepGen) -> list[float]:
    """By stacked layer: how far colours move the last think token, relative to its normalised scale (rms over channels of the
    spread between colours of "a COLOR circle"). A linear probe reads colours even from a collapsed model; this does not."""
    prompts = [f"a {color} {SHAPES[0]}" for color in COLORS]
    think = torch.randn(16, model.vlm.config.text_config.hidden_size, generator=generator("amplitude"))
    rows = [prompt_tokens(model.tokenizer, prompt, (), 64) for prompt in prompts]
    batch = prepare_prompts(model.vlm, rows, [[]] * len(rows), len(think), pad_id=model.tokenizer.pad_token_id)
    layers = tuple(model.connector.config.stacked_layers)
    states, _ = stacked_hidden_states(model.vlm, batch, think, layers, train_vlm=False)
    last = states[torch.arange(len(rows)), batch.lengths + len(think) - 1].unflatten(-1, (len(layers), -1))
    normal = F.layer_norm(last, last.shape[-1:])
    return [round(value, 3) for value in normal.std(0).pow(2).mean(-1).sqrt().tolist()]


def word_ids(model: DeepGen, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Plain word ids for the text encoder, with an end mark; "" is the end mark alone."""
    rows = [model.tokenizer.encode(prompt + "<|im_end|>", add_special_tokens=False) for prompt in prompts]
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    return ids, lengths


def train_dit(model: DeepGen, encoder: PlainTextEncoder, config: FoundationTraining, out: Path) -> dict[str, Any]:
    """Generation and editing by turns, from words, with flow matching."""
    settings: DiTTrainingConfig = config.dit
    named = {f"dit.{n}": p for n, p in model.dit.named_parameters()} | {f"text.{n}": p for n, p in encoder.named_parameters()}
    optimizer = torch.optim.AdamW(named.values(), lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    ema = EMA(named, settings.ema_decay)
    losses: dict[str, list[float]] = {"text_to_image": [], "image_edit": []}
    B = settings.batch_size
    with Progress(settings.steps, "step", "dit", out / "dit.jsonl") as progress:
        for step in range(settings.steps):
            task = "image_edit" if step % 2 else "text_to_image"
            samples = [draw("train", seed_from("dit", config.seed), step * B + i, task, settings.kinds) for i in range(B)]
            loss = foundation_loss(model, encoder, samples, settings, config.seed, step)
            rate = min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / settings.steps)))
            optimizer.param_groups[0]["lr"] = settings.lr * rate
            loss.backward()
            nn.utils.clip_grad_norm_(named.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            ema.update()
            losses[task].append(loss.item())
            progress.update(**{name: float(np.mean(values[-100:])) for name, values in losses.items() if values})
            if (step + 1) % 1000 == 0 and step + 1 < settings.steps:
                ema_scores(model, encoder, ema, config, out, step + 1)
    ema.copy_to_parameters()
    return {
        "samples_seen": settings.steps * B,
        "loss": {name: round(float(np.mean(values[-100:])), 4) for name, values in losses.items()},
        "strict": evaluate_foundation(model, encoder, config.evaluation_samples),
    }


def ema_scores(model: DeepGen, encoder: PlainTextEncoder, ema: EMA, config: FoundationTraining, out: Path, step: int) -> None:
    """Score the average so far on a quarter of the evaluation samples, and put the weights back."""
    held = {name: p.detach().clone() for name, p in ema.parameters.items()}
    ema.copy_to_parameters()
    scores = evaluate_foundation(model, encoder, config.evaluation_samples // 4)
    with torch.no_grad():
        for name, parameter in ema.parameters.items():
            parameter.copy_(held[name])
    line = "  ".join(f"{task} {value['strict']:.3f}" for task, value in scores.items())
    print(f"dit step {step}: {line}", flush=True)


def foundation_loss(
    model: DeepGen, encoder: PlainTextEncoder, samples: list[DrawnSample], settings: DiTTrainingConfig, seed: int, step: int
) -> Tensor:
    positions = [step * len(samples) + i for i in range(len(samples))]
    flips = torch.rand(len(samples), generator=generator("foundation dropout", seed, step))
    prompts = ["" if flip < settings.text_dropout else sample.prompt for flip, sample in zip(flips, samples, strict=True)]
    target = encode_images(model.vae, stack_pixels([sample.target for sample in samples]))
    references = tuple(encode_images(model.vae, pixels) for pixels in reference_pixels(samples))
    noise = sample_noise(target, seed, "foundation", positions)
    sigmas = sigmas_at(quantiles(seed, "foundation", positions), "logit_normal", model.shift_for(target.shape[-2:]))
    velocity = model.predict_velocity(interpolate(target, noise, sigmas), sigmas, encoder(*word_ids(model, prompts)), references)
    return flow_matching_loss(velocity, velocity_target(target, noise)).mean()


@torch.no_grad()
def evaluate_foundation(model: DeepGen, encoder: PlainTextEncoder, count: int) -> dict[str, Any]:
    """Strict accuracy of the DiT from the plain text encoder, without guidance, by task and kind."""
    model.eval()
    result: dict[str, Any] = {}
    for task in ("text_to_image", "image_edit"):
        samples = [draw("evaluation", seed_from("foundation evaluation"), i, task) for i in range(count)]
        kinds: dict[str, list[bool]] = {}
        for batch in batched(samples, 128):
            condition = encoder(*word_ids(model, [sample.prompt for sample in batch]))
            references = tuple(encode_images(model.vae, pixels) for pixels in reference_pixels(batch))
            noise = initial_noise(
                (model.vae.config.latent_channels, 4, 4), [seed_from("foundation evaluation", i) for i in range(len(batch))]
            )
            shift = model.shift_for(noise.shape[-2:])
            latents = sample_euler(lambda x, s: model.predict_velocity(x, s, condition, references), noise, 12, shift)  # noqa: B023
            for sample, image in zip(batch, to_uint8(decode_latents(model.vae, latents)).numpy(), strict=True):
                kinds.setdefault(sample.kind, []).append(verify(sample.scene, image, task).strict)
        every = [strict for values in kinds.values() for strict in values]
        result[task] = {
            "n": count,
            "strict": round(sum(every) / count, 4),
            "kinds": {kind: round(sum(values) / len(values), 4) for kind, values in sorted(kinds.items())},
        }
    model.train()
    return result


SHIPPED = ("vlm", "transformer", "vae", "tokenizer", "text_encoder.safetensors")


def run_train_foundation() -> None:
    """The command of foundation/dvc.yaml: train in `outputs/foundation_training/`, then put parts and provenance into `foundation/`."""
    root = find_root()
    config = FoundationTraining.model_validate(parse_params((root / "foundation" / "params.yaml").read_text()))
    shapes = load_params(root / config.preset).model
    out = root / "outputs" / "foundation_training"
    out.mkdir(parents=True, exist_ok=True)
    measured = train_foundation(config, shapes, out)
    ship(out / "model", root / "foundation", config, measured, code_digest(root))


def code_digest(root: Path) -> str:
    return sha256_json({path: sha256_path(root / path) for path in ("data", "model", "training", "runtime")})


def ship(trained: Path, foundation: Path, config: FoundationTraining, measured: dict[str, Any], code: str) -> None:
    """Copy the shipped parts and write `provenance.json`: how they were made, what they reached, and a sha256 a file.

    The VLM, which nothing is measured from but its hidden states, is stored in bfloat16: the repository holds at most 15 MB of weights.
    """
    for name in SHIPPED:
        for file in _files_of(trained / name):
            write_atomic(foundation / file.relative_to(trained), file.read_bytes())
    vlm = foundation / "vlm" / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(vlm).items()}, vlm, metadata={"format": "pt"})
    files = {str(f.relative_to(foundation)): sha256_file(f) for name in SHIPPED for f in _files_of(foundation / name)}
    facts = {"command": "python -m training train_foundation", "code": code, "params": config.model_dump(mode="json"), "measured": measured}
    write_json(foundation / "provenance.json", facts | {"files": files})


def _files_of(path: Path) -> list[Path]:
    return [path] if path.is_file() else folder_files(path)
