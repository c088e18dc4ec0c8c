"""Shape of the model, as written under `model:` and `foundation:` in params.yaml."""

from typing import Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from runtime.settings import Settings


class VisionConfig(Settings):
    """Qwen2.5-VL's vision tower. It never trains (paper section 3.2)."""

    depth: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    heads: PositiveInt
    patch_size: PositiveInt = 14
    spatial_merge_size: PositiveInt = 2
    window_size: PositiveInt = 112
    full_attention_blocks: tuple[NonNegativeInt, ...] = ()


class VLMConfig(Settings):
    """Qwen2.5-VL: language model and vision tower.

    stacked_layers are indices into transformers' `hidden_states` (0 = embeddings, `layers` = after the last block and the final
    norm), in the order in which SCB concatenates them.
    """

    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    layers: PositiveInt
    heads: PositiveInt
    kv_heads: PositiveInt
    rope_theta: PositiveFloat = 1_000_000.0
    rms_norm_eps: PositiveFloat = Field(1e-6, description="as published; the configuration class of transformers would take 1e-5")
    mrope_section: tuple[PositiveInt, PositiveInt, PositiveInt]
    vocab_size: PositiveInt
    vision: VisionConfig
    stacked_layers: tuple[NonNegativeInt, ...] = Field(min_length=1)
    max_prompt_tokens: PositiveInt = 1024

    @model_validator(mode="after")
    def _layers_exist(self) -> Self:
        too_deep = [layer for layer in self.stacked_layers if layer > self.layers]
        if too_deep:
            raise ValueError(
                f"stacked_layers: {too_deep} lie beyond this VLM of {self.layers} layers; allowed: 0..{self.layers} "
                f"(0 = embeddings, {self.layers} = after the final norm)"
            )
        if self.hidden_size % self.heads or self.heads % self.kv_heads:
            raise ValueError(
                f"heads: {self.heads} must divide hidden_size {self.hidden_size} and be a multiple of kv_heads {self.kv_heads}"
            )
        half = self.hidden_size // self.heads // 2
        if sum(self.mrope_section) != half:
            raise ValueError(f"mrope_section: sums to {sum(self.mrope_section)}, must be half of the head dimension, {half}")
        return self


class ConnectorConfig(Settings):
    """Stacked Channel Bridging (paper section 3.1): width and depth of the encoder, number of think tokens (0 allowed)."""

    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    layers: PositiveInt
    heads: PositiveInt
    num_think_tokens: NonNegativeInt = 128
    projector: Literal["linear", "mlp"] = Field("linear", description="the way in: one layer as released, or the paper's two")
    padding: Literal["masked", "reference"] = Field(
        "masked", description="reference: padding is read as prompt, as the published weights were trained"
    )

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % self.heads:
            raise ValueError(f"heads: {self.heads} must divide hidden_size {self.hidden_size}")
        return self


class DiTConfig(Settings):
    """SD3's MMDiT-X, in diffusers' terms."""

    layers: PositiveInt
    heads: PositiveInt
    head_dim: PositiveInt
    patch_size: PositiveInt = 2
    sample_size: PositiveInt = 128
    pos_embed_max_size: PositiveInt = 384
    dual_attention_layers: NonNegativeInt = 0
    joint_attention_dim: PositiveInt
    pooled_projection_dim: PositiveInt
    reference_offset: bool = Field(False, description="positions tell references from the target (paper figure 3); off as released")

    @model_validator(mode="after")
    def _dual_blocks_exist(self) -> Self:
        if self.dual_attention_layers > self.layers:
            raise ValueError(f"dual_attention_layers: {self.dual_attention_layers} of {self.layers} layers; allowed: 0..{self.layers}")
        return self


class VAEConfig(Settings):
    """`kl`: diffusers' AutoencoderKL. `linear`: a fixed linear map on patches with the same interface, for the tiny recipe."""

    kind: Literal["kl", "linear"]
    latent_channels: PositiveInt
    downscale: PositiveInt = Field(description="pixels per latent position, a side")
    block_out_channels: tuple[PositiveInt, ...] = ()
    norm_num_groups: PositiveInt = 32
    scaling_factor: PositiveFloat = 1.5305
    shift_factor: float = 0.0609

    @model_validator(mode="after")
    def _downscale_fits(self) -> Self:
        factor = 2 ** max(len(self.block_out_channels) - 1, 0)
        if self.kind == "kl" and factor != self.downscale:
            raise ValueError(f"downscale: {len(self.block_out_channels)} block_out_channels give {factor}, not {self.downscale}")
        return self


class ResolutionShift(Settings):
    """A shift that depends on the number of image tokens, in diffusers' terms; replaces the static one where it is given."""

    base_tokens: PositiveInt = 256
    max_tokens: PositiveInt = 4096
    base_shift: float = 0.5
    max_shift: float = 1.15

    @model_validator(mode="after")
    def _is_a_line(self) -> Self:
        if self.max_tokens <= self.base_tokens:
            raise ValueError(f"max_tokens: {self.max_tokens} must be more than base_tokens {self.base_tokens}")
        return self


class ModelConfig(Settings):
    """DeepGen: parts and how they are joined."""

    vlm: VLMConfig
    connector: ConnectorConfig
    dit: DiTConfig
    vae: VAEConfig
    timestep_shift: PositiveFloat = Field(3.0, description="static shift s of sigma' = s sigma / (1 + (s - 1) sigma)")
    resolution_shift: ResolutionShift | None = None


class HubWeights(Settings):
    """One part's published weights. A null revision, or licence, is one that nobody has looked at yet: refused until someone does."""

    repo: str
    revision: str | None = Field(pattern="^[0-9a-f]{40}$")
    subfolder: str = ""
    licence: str | None = Field(description="as its model card names it; `deepgen fetch --accept NAME` accepts it")
    gated: bool = Field(False, description="needs an account that has accepted the publisher's conditions, and its HF_TOKEN")


class FoundationConfig(Settings):
    """Where the capable parts that training starts from come from.

    `random` initialises them from `seed`; `folder` reads `path` (kept in git, or made by you); `hub` names pinned revisions,
    which `deepgen fetch` brings.
    """

    source: Literal["random", "folder", "hub"]
    path: str = "foundation"
    seed: int = 0
    hub: dict[Literal["vlm", "dit", "vae"], HubWeights] = {}

    @model_validator(mode="after")
    def _hub_is_complete(self) -> Self:
        if self.source == "hub" and set(self.hub) != {"vlm", "dit", "vae"}:
            raise ValueError(f"hub: names {sorted(self.hub)}, must name a repo and revision for vlm, dit and vae")
        return self
