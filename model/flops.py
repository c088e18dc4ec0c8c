"""How many floating-point operations the parts take, counted from the configuration alone: a multiplication and an addition are two.

Counted are matrix products, convolutions and attention (causal attention in full, as torch's own counter does). Not counted: norms,
activations, softmax, rotary and position embeddings, sampling noise, the optimizer.
"""

# N image tokens, M prompt tokens of the DiT (think tokens included), P prompt tokens, T think tokens, D width

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from model.config import ConnectorConfig, DiTConfig, ModelConfig, VAEConfig, VisionConfig, VLMConfig
from model.parts import TRAINED

TIME_CHANNELS = 256  # sinusoids that the time embedding reads
CHANNELS = 3


@dataclass(frozen=True)
class Count:
    """Of a forward pass: products with weights, and attention, whose two operands both come from the input."""

    weights: float
    attention: float = 0.0

    @property
    def forward(self) -> float:
        return self.weights + self.attention

    def backward(self, trained: bool) -> float:
        """A product has two gradients, of its input and of its weights; a frozen part needs the first alone. Attention needs both."""
        return (2 if trained else 1) * self.weights + 2 * self.attention


@dataclass(frozen=True)
class Flops:
    """Of one sample in one part. backward is 0 where no gradient passes."""

    part: str
    forward: float
    backward: float
    recomputed: float = 0.0

    @property
    def model(self) -> float:
        """What the model itself needs: the numerator of model FLOPs utilisation."""
        return self.forward + self.backward

    @property
    def done(self) -> float:
        """With the forward passes that gradient checkpointing repeats."""
        return self.model + self.recomputed


def mfu(flops_per_step: float, seconds: float, peak: float) -> float:
    """Model FLOPs utilisation, of 1.

    Args:
        flops_per_step: model FLOPs of a step on one device, recomputation left out.
        seconds: that a step takes.
        peak: FLOP/s of the device in the precision used, dense.

    Raises:
        ValueError: a time or peak that is not above 0.
    """
    if seconds <= 0 or peak <= 0:
        raise ValueError(f"seconds {seconds}, peak {peak} FLOP/s given; both must be above 0.")
    return flops_per_step / (seconds * peak)


def linear(tokens: float, *widths: int) -> float:
    """Layers one after another: linear(n, a, b, c) is a -> b -> c."""
    return 2 * tokens * sum(a * b for a, b in pairwise(widths))


def attention(queries: float, keys: float, width: int) -> float:
    """Scores and weighted values."""
    return 4 * queries * keys * width


def vision_tokens(vlm: VLMConfig, side: int) -> int:
    """Image tokens that the language model reads of a square image."""
    return (side * 28 // 32 // vlm.vision.patch_size // vlm.vision.spatial_merge_size) ** 2


def image_tokens(config: ModelConfig, side: int) -> int:
    """Image tokens that the DiT reads of a square image."""
    return (side // (config.vae.downscale * config.dit.patch_size)) ** 2


def vision_forward(vision: VisionConfig, out: int, side: int) -> float:
    """The vision tower on one square image: windows in most blocks, the whole image in a few."""
    grid, D, merge = side * 28 // 32 // vision.patch_size, vision.hidden_size, vision.spatial_merge_size
    N, window = grid**2, vision.window_size // vision.patch_size
    sides = [min(window, grid - start) for start in range(0, grid, window)]
    in_windows = sum((a * b) ** 2 for a in sides for b in sides)
    full = len(set(vision.full_attention_blocks) & set(range(vision.depth)))
    blocks = vision.depth * (linear(N, D, 4 * D) + 3 * linear(N, D, vision.intermediate_size))
    scores = 4 * D * (full * N**2 + (vision.depth - full) * in_windows)
    embed = linear(N, 2 * CHANNELS * vision.patch_size**2, D)
    return embed + blocks + scores + linear(N / merge**2, merge**2 * D, merge**2 * D, out)


def language_forward(vlm: VLMConfig, tokens: float, keys: float, layers: int) -> Count:
    """The language model's `layers` on so many tokens that see so many keys."""
    D, kv = vlm.hidden_size, vlm.hidden_size // vlm.heads * vlm.kv_heads
    each = linear(tokens, D, 2 * D + 2 * kv) + 3 * linear(tokens, D, vlm.intermediate_size)
    return Count(layers * each, layers * attention(tokens, keys, D))


def lora_forward(vlm: VLMConfig, tokens: float, rank: int) -> float:
    """Adapters on the linears of the layers below the deepest stacked one."""
    D, inner, kv = vlm.hidden_size, vlm.intermediate_size, vlm.hidden_size // vlm.heads * vlm.kv_heads
    pairs = [(D, D), (D, kv), (D, kv), (D, D), (D, inner), (D, inner), (inner, D)]
    return max(vlm.stacked_layers) * sum(linear(tokens, a, rank, b) for a, b in pairs)


def connector_forward(config: ModelConfig, tokens: float) -> Count:
    """Stacked channel bridging on the whole prompt."""
    scb: ConnectorConfig = config.connector
    D, V = scb.hidden_size, len(config.vlm.stacked_layers) * config.vlm.hidden_size
    into = linear(tokens, V, D) + (linear(tokens, D, D) if scb.projector == "mlp" else 0)
    layers = scb.layers * (linear(tokens, D, 4 * D) + linear(tokens, D, scb.intermediate_size, D))
    out = linear(tokens, D, config.dit.joint_attention_dim) + linear(1, D, config.dit.pooled_projection_dim)
    return Count(into + layers + out, scb.layers * attention(tokens, tokens, D))


def dit_forward(dit: DiTConfig, channels: int, target: float, references: float, M: float) -> Count:
    """One velocity: target and reference tokens, and M prompt tokens."""
    D, N, patch = dit.heads * dit.head_dim, target + references, dit.patch_size**2 * channels
    weights = linear(N, patch, D) + linear(M, dit.joint_attention_dim, D)
    weights += linear(1, TIME_CHANNELS, D, D) + linear(1, dit.pooled_projection_dim, D, D)
    for block in range(dit.layers):
        dual, last = block < dit.dual_attention_layers, block == dit.layers - 1
        weights += linear(N, D, 4 * D) + linear(N, D, 4 * D, D) + linear(M, D, 3 * D)
        weights += linear(1, D, (9 if dual else 6) * D) + linear(1, D, (2 if last else 6) * D)
        if dual:
            weights += linear(N, D, 4 * D)
        if not last:  # the last block's prompt goes nowhere
            weights += linear(M, D, D) + linear(M, D, 4 * D, D)
    scores = dit.layers * attention(N + M, N + M, D) + dit.dual_attention_layers * attention(N, N, D)
    return Count(weights + linear(1, D, 2 * D) + linear(N, D, patch), scores)


def encode_forward(vae: VAEConfig, side: int) -> float:
    """The autoencoder's way in, of one square image."""
    if vae.kind == "linear":
        return linear((side // vae.downscale) ** 2, CHANNELS * vae.downscale**2, vae.latent_channels)
    widths = vae.block_out_channels
    pixels = float(side**2)
    total = _conv(pixels, CHANNELS, widths[0])
    for i, (before, width) in enumerate(pairwise((widths[0], *widths))):
        total += _resnets(pixels, before, width, 2)
        if i < len(widths) - 1:
            pixels /= 4
            total += _conv(pixels, width, width)
    return total + _middle(pixels, widths[-1]) + _conv(pixels, widths[-1], 2 * vae.latent_channels)


def decode_forward(vae: VAEConfig, side: int) -> float:
    """The autoencoder's way out, of one square image."""
    if vae.kind == "linear":
        return linear((side // vae.downscale) ** 2, vae.latent_channels, CHANNELS * vae.downscale**2)
    widths = vae.block_out_channels[::-1]
    pixels = (side / vae.downscale) ** 2
    total = _conv(pixels, vae.latent_channels, widths[0]) + _middle(pixels, widths[0])
    for i, (before, width) in enumerate(pairwise((widths[0], *widths))):
        total += _resnets(pixels, before, width, 3)
        if i < len(widths) - 1:
            pixels *= 4
            total += _conv(pixels, width, width)
    return total + _conv(pixels, widths[-1], CHANNELS)


def _conv(pixels: float, before: int, after: int, kernel: int = 3) -> float:
    return 2 * pixels * before * after * kernel**2


def _resnets(pixels: float, before: int, width: int, count: int) -> float:
    shortcut = _conv(pixels, before, width, 1) if before != width else 0
    return shortcut + _conv(pixels, before, width) + (2 * count - 1) * _conv(pixels, width, width)


def _middle(pixels: float, width: int) -> float:
    return _resnets(pixels, width, width, 2) + linear(pixels, width, 4 * width) + attention(pixels, pixels, width)


def supervised_flops(
    config: ModelConfig,
    stage: str,
    side: int,
    prompt_tokens: int,
    references: int = 0,
    lora_rank: int | None = None,
    cached_latents: bool = False,
    cached_vision: bool = False,
    checkpointing: bool = False,
) -> list[Flops]:
    """One sample of alignment or sft, by part.

    Args:
        side: pixels a side of target and references, which are square.
        prompt_tokens: text tokens of the prompt with its template; image and think tokens are added here.
        lora_rank: of sft's adapters; None trains none, and the prompt then runs without a gradient.
        checkpointing: language model (where a gradient passes through all of it) and DiT run their forward once more.
    """
    vlm, trained = config.vlm, TRAINED[stage]
    P, T = prompt_tokens + references * vision_tokens(vlm, side), config.connector.num_think_tokens
    depth = max(vlm.stacked_layers)  # later layers run, but no gradient reaches them
    rows = [] if cached_latents else [Flops("vae", (1 + references) * encode_forward(config.vae, side), 0.0)]
    if references and not cached_vision:
        rows.append(Flops("vision tower", references * vision_forward(vlm.vision, vlm.hidden_size, side), 0.0))

    def language(part: str, tokens: int, keys: int, passed: bool, again: bool = False) -> None:
        forward = language_forward(vlm, tokens, keys, vlm.layers).forward
        backward = language_forward(vlm, tokens, keys, depth).backward(trained=False) if passed else 0.0
        rows.append(Flops(part, forward, backward, forward if again else 0.0))

    if lora_rank is not None and "vlm_lora" in trained:
        adapters = lora_forward(vlm, P + T, lora_rank)
        language("language model", P + T, P + T, passed=True, again=checkpointing)
        rows.append(Flops("LoRA", adapters, 2 * adapters, adapters if checkpointing else 0.0))
    elif config.connector.padding == "reference" and T:  # in one pass, because the prompt's padding is read as prompt
        language("language model", P + T, P + T, passed=True)
    else:
        language("language model, prompt", P, P, passed=False)
        if T:
            language("language model, think tokens", T, P + T, passed=True)
    connector = connector_forward(config, P + T)
    rows.append(Flops("connector", connector.forward, connector.backward(trained=True)))
    N = image_tokens(config, side)
    dit = dit_forward(config.dit, config.vae.latent_channels, N, references * N, P + T)
    rows.append(Flops("dit", dit.forward, dit.backward("dit" in trained), dit.forward if checkpointing else 0.0))
    return rows


def rollout_flops(
    config: ModelConfig,
    side: int,
    prompt_tokens: int,
    group_size: int,
    rollout_steps: int,
    stochastic_steps: int,
    with_reference: bool,
    auxiliary: float,
    checkpointing: bool = False,
) -> list[Flops]:
    """One image of mr_grpo, by part: what its prompt shares with its group is divided by the group's size.

    auxiliary: real samples of the auxiliary loss, an image.
    """
    vlm, T = config.vlm, config.connector.num_think_tokens
    M, share = prompt_tokens + T, 1 / group_size + auxiliary
    dit = dit_forward(config.dit, config.vae.latent_channels, image_tokens(config, side), 0, M)
    once = dit.forward
    updates = stochastic_steps + auxiliary
    prompt, think = language_forward(vlm, prompt_tokens, prompt_tokens, vlm.layers), language_forward(vlm, T, M, vlm.layers)
    rows = [
        Flops("language model", share * (prompt.forward + think.forward), 0.0),
        Flops("connector", share * connector_forward(config, M).forward, 0.0),
        Flops("dit, rollout", rollout_steps * once, 0.0),
        Flops("vae, decoder", decode_forward(config.vae, side), 0.0),
        Flops("dit, update", updates * once, updates * dit.backward(trained=True), updates * once if checkpointing else 0.0),
    ]
    if with_reference:
        rows.append(Flops("dit, reference", stochastic_steps * once, 0.0))
    if auxiliary:
        rows.append(Flops("vae, encoder", auxiliary * encode_forward(config.vae, side), 0.0))
    return rows


def total(rows: Iterable[Flops]) -> Flops:
    """All parts as one."""
    rows = list(rows)
    return Flops("total", sum(r.forward for r in rows), sum(r.backward for r in rows), sum(r.recomputed for r in rows))
