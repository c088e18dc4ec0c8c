"""Settings of the stages, of evaluation and of the launch, as written in params.yaml."""

from typing import Any, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from runtime.settings import Settings


class LatentsConfig(Settings):
    """Parts whose images are encoded once by the frozen autoencoder, and vision tower, so that alignment and SFT need not."""

    parts: tuple[str, ...] = Field((), description="of data.parts; a micro-batch skips the autoencoder where all of its parts are named")
    precision: Literal["float16", "float32"] = Field("float16", description="of what is stored; float32 is twice the bytes")
    batch_size: PositiveInt = Field(32, description="images encoded at a time")
    vision: bool = Field(False, description="store what the VLM's frozen vision tower makes of references too, so that it isn't run either")


class OptimizerConfig(Settings):
    """AdamW with linear warm-up and cosine decay, both counted in optimizer steps; weight decay on matrices only."""

    lr: PositiveFloat
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: NonNegativeFloat = 0.05
    warmup_ratio: float = Field(0.01, ge=0.0, le=1.0, description="share of the steps spent warming up")
    decay: Literal["cosine", "constant"] = "cosine"
    max_grad_norm: PositiveFloat = 1.0


class LoRAConfig(Settings):
    """Low-rank adapters on the linears of the language model layers whose output is used."""

    rank: PositiveInt
    alpha: PositiveFloat
    dropout: float = Field(0.0, ge=0.0, lt=1.0)


class GuardConfig(Settings):
    """What is done about steps whose loss, gradient or input is no finite number, and about losses that leap."""

    rollback_after: PositiveInt = Field(
        default=3, description="bad steps in a row before the last checkpoint is taken up again, past their batches"
    )
    stop_after: PositiveInt = Field(
        default=20, description="bad steps in all before the stage stops and leaves evidence; 1 stops at the first"
    )
    spike: PositiveFloat = Field(default=10.0, description="deviations (1.4826 MAD) above the median from which a loss counts as a spike")
    spike_window: int = Field(default=50, ge=4, description="steps behind that median and deviation; before as many, nothing is a spike")
    skip_spikes: bool = Field(
        default=False, description="treat a spike as a bad step; else it is counted and logged, and trains as any other"
    )


class EarlyStopConfig(Settings):
    """Ends a stage whose held-out loss no longer falls."""

    patience: PositiveInt = Field(description="validations in a row without a new best that end the stage")
    min_delta: NonNegativeFloat = Field(0.0, description="how far below the best a held-out loss must be to count as a new best")


class SupervisedConfig(Settings):
    """A flow-matching stage: alignment or sft (paper sections 3.1, 3.2)."""

    steps: PositiveInt
    batch_size: PositiveInt = Field(description="samples an optimizer step, over all ranks and both tasks")
    micro_batch_size: PositiveInt = Field(description="samples a forward pass, on one rank")
    optimizer: OptimizerConfig
    ema_decay: float = Field(0.0, ge=0.0, lt=1.0, description="0 turns the average of the weights off")
    timestep_sampling: Literal["uniform", "logit_normal"] = "uniform"
    text_dropout: float = Field(0.1, ge=0.0, le=1.0)
    reference_dropout: float = Field(0.0, ge=0.0, le=1.0)
    lora: LoRAConfig | None = None
    checkpoint_every: PositiveInt
    keep_checkpoints: PositiveInt = 2
    log_every: PositiveInt = 10
    seed: int = 0
    async_checkpoints: bool = Field(False, description="write checkpoints behind the training, from copies in main memory")
    guard: GuardConfig = GuardConfig()
    validate_every: NonNegativeInt = Field(0, description="optimizer steps between held-out losses, which the last step has too; 0: never")
    board_every: NonNegativeInt = Field(0, description="optimizer steps between sample boards, boards/step-000200.png; 0: never")
    early_stop: EarlyStopConfig | None = Field(
        None,
        description="on the held-out loss, so that validate_every must be above 0; the evaluation parts then have a say in the weights",
    )

    @model_validator(mode="after")
    def _early_stop_has_what_it_looks_at(self) -> Self:
        if self.early_stop is not None and self.validate_every == 0:
            raise ValueError("early_stop: set, but validate_every is 0; allowed: null, or a validate_every above 0")
        return self

    def accumulation(self, ranks: int) -> int:
        """Micro-batches of an optimizer step on each of `ranks`; that they come out even is checked with the whole of params.yaml."""
        return self.batch_size // (self.micro_batch_size * ranks)


class SFTConfig(SupervisedConfig):
    """Stage 2 (paper section 3.2)."""

    start: Literal["alignment", "champion"] = Field(
        "alignment",
        description="whose weights it begins with; champion: those that `deepgen start-from champion` brought",
    )


class MRGRPOConfig(Settings):
    """Stage 3 (paper section 3.3): group-relative policy optimisation of the DiT over several rewards."""

    steps: PositiveInt
    prompts_per_step: PositiveInt
    group_size: int = Field(ge=2)
    micro_batch_size: PositiveInt = Field(description="images a forward pass of the update, on one rank")
    rollout_steps: PositiveInt
    stochastic_steps: PositiveInt = Field(description="how many of the first rollout steps add noise and are trained; the last never is")
    sampler: Literal["cps_sde", "flow_sde"] = "flow_sde"
    eta: PositiveFloat = 1.0
    guidance: NonNegativeFloat = 1.0
    clip_range: PositiveFloat
    advantage_clip: PositiveFloat = 5.0
    rewards: dict[str, PositiveFloat] = Field(min_length=1, description="weight of each reward")
    noise_floor: NonNegativeFloat = Field(0.01, description="a group whose reward spreads less than this gets advantage 0 from it")
    min_coverage: float = Field(0.9, ge=0.0, le=1.0, description="share of valid reward values below which the step is refused")
    kl_weight: NonNegativeFloat = 0.0
    sft_weight: float = Field(0.0, ge=0.0, lt=1.0, description="lambda of the auxiliary flow-matching loss")
    optimizer: OptimizerConfig
    checkpoint_every: PositiveInt
    keep_checkpoints: PositiveInt = 2
    log_every: PositiveInt = 1
    seed: int = 0

    @model_validator(mode="after")
    def _last_step_is_deterministic(self) -> Self:
        if self.stochastic_steps >= self.rollout_steps:
            raise ValueError(
                f"stochastic_steps: {self.stochastic_steps} of {self.rollout_steps} rollout_steps; allowed: 1..{self.rollout_steps - 1}, "
                "because the last step must be deterministic"
            )
        return self


class EvaluationConfig(Settings):
    """How every stage is scored: on the parts of the evaluation split, with one seed per sample."""

    parts: tuple[str, ...] = Field(min_length=1)
    sampling_steps: PositiveInt
    guidance: NonNegativeFloat = 1.0
    batch_size: PositiveInt = 64
    seed: int = 0


class VariantConfig(Settings):
    """One configuration of an experiment, and the paper's claim that it asks about."""

    claim: str
    paper: str = Field(description="where the paper says or measures it")
    expected: Literal["lower", "higher"] = Field(description="its scores beside base, if the claim holds")
    overrides: dict[str, Any] = Field(min_length=1, description="dotted keys of params.yaml")


class ExperimentConfig(Settings):
    """`ablations/<name>.yaml`: variants of a preset, each compared with it over the same seeds."""

    preset: str
    share_of_steps: float = Field(gt=0.0, le=1.0, description="of the preset's steps of alignment and sft")
    seeds: int = Field(ge=1, le=100, description="0, 1, ... of alignment and sft; the mixtures' are moved with them")
    overrides: dict[str, Any] = Field({}, description="dotted keys of params.yaml, for base and variants alike")
    base: str = Field(description="what the preset is, in words")
    variants: dict[str, VariantConfig] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_are_file_names(self) -> Self:
        wrong = [name for name in self.variants if name == "base" or not name.replace("_", "").isalnum()]
        if wrong:
            raise ValueError(f"variants: {wrong} can't be names; allowed: letters, digits and _, and not base")
        return self

    def configurations(self) -> dict[str, dict[str, Any]]:
        """Overrides by name, base first."""
        return {"base": {}} | {name: variant.overrides for name, variant in self.variants.items()}


class LaunchConfig(Settings):
    """How a training stage is started on this machine."""

    processes: PositiveInt = Field(1, description="ranks; the trainer asserts that it has as many")
    threads: PositiveInt = Field(2, description="torch threads a rank; part of what makes a CPU run reproducible")
    precision: Literal["fp32", "bf16"] = "fp32"
    gradient_checkpointing: bool = False
    hang_seconds: NonNegativeFloat = Field(1800, description="a rank without a step for so long leaves its stacks and ends; 0: never")
    strategy: Literal["ddp", "fsdp2", "zero2"] = Field(
        "ddp",
        description="how alignment and sft lie on several ranks: a copy on each, or shards, as training/accelerate/ says; mr_grpo copies",
    )
    compile: bool = Field(
        False, description="torch.compile the blocks of DiT and connector in alignment and sft; a CPU needs a C++ compiler"
    )

    @model_validator(mode="after")
    def _shards_need_ranks(self) -> Self:
        if self.strategy != "ddp" and self.processes == 1:
            raise ValueError(f"strategy: {self.strategy} spreads a model over ranks, and launch.processes is 1; allowed: ddp")
        return self


class VLMTrainingConfig(Settings):
    """The stand-in VLM, by echo, question answering and a read-out, so that its hidden states carry what prompts say."""

    steps: PositiveInt
    batch_size: PositiveInt
    lr: PositiveFloat
    image_share: float = Field(ge=0.0, le=1.0, description="share of the steps that show pictures")
    embedding_std: PositiveFloat = Field(1.0, description="large, so that no attribute drowns in the residual stream")
    read_out: PositiveFloat = Field(1.0, description="weight of reading the prompt back from the think tokens of every stacked layer")
    save_every: PositiveInt = 200


class CLIPTrainingConfig(Settings):
    """The small CLIP whose similarity is a reward."""

    steps: PositiveInt
    batch_size: PositiveInt = Field(description="captions a step, all of one kind; with as many spoiled pictures beside theirs")
    lr: PositiveFloat
    width: PositiveInt = Field(64, multiple_of=16, description="of both towers, and of the space that they share")
    layers: PositiveInt = 3
    save_every: PositiveInt = 200


class DiTTrainingConfig(Settings):
    """The stand-in DiT, which generates and edits from a plain text encoder, as the paper's initialisation does."""

    steps: PositiveInt
    batch_size: PositiveInt = Field(description="samples a step, over all ranks")
    lr: PositiveFloat
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: for the matrices of attention and feed-forward, adamw for the rest"
    )
    muon_lr: PositiveFloat | None = Field(None, description="of those matrices, on adamw's scale; null: lr")
    weight_decay: NonNegativeFloat = 0.01
    max_grad_norm: PositiveFloat = 1.0
    warmup: PositiveInt = Field(100, description="steps up to lr")
    decay: Literal["linear", "cosine"] = "linear"
    decay_share: float = Field(0.2, ge=0.0, lt=1.0, description="of the steps, the last, in which lr falls to 2%; constant before")
    ema_decay: float = Field(ge=0.0, lt=1.0)
    text_dropout: float = Field(0.1, ge=0.0, le=1.0)
    kinds: dict[str, PositiveFloat] = Field(min_length=1, description="share of each kind of scene in text-to-image")
    edits: dict[str, PositiveFloat] = Field(
        min_length=1, description="share of each kind of edit; pick asks for one of two pictures as it is"
    )
    edit_share: float = Field(0.5, ge=0.0, le=1.0, description="of the samples")
    repainted: float = Field(0.0, ge=0.0, le=1.0, description="share of the edits whose pictures have colours without a name")
    save_every: PositiveInt = 500
    score_every: PositiveInt = 1000
    score_samples: PositiveInt = Field(256, description="of each task, for the scores on the way")
    sampling_steps: PositiveInt = 12


class FoundationTraining(Settings):
    """foundation/params.yaml: how the parts that ship in `foundation/` were trained."""

    preset: str = Field(description="the params file whose `model:` gives the shapes")
    seed: int
    processes: PositiveInt = Field(1, description="ranks of the DiT's training")
    threads: PositiveInt = Field(description="torch threads a process")
    warm_start: str | None = Field(None, description="a folder whose DiT and text encoder this one goes on from; null: fresh weights")
    autoencoder_images: PositiveInt
    whitening: float = Field(ge=0.0, le=1.0)
    vlm: VLMTrainingConfig
    clip: CLIPTrainingConfig
    dit: DiTTrainingConfig
    evaluation_samples: PositiveInt
