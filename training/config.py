"""Settings of the stages, of evaluation and of the launch, as written in params.yaml."""

from typing import Any, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from runtime.settings import Settings
from training.rewards.config import PreferenceConfig

# Each reward's own noise floor: a group in which it spreads less says nothing. An edit distance moves by a letter, a cosine always moves.
NOISE_FLOORS = {name: 0.01 for name in ("count", "shape", "color", "binding", "relation", "position", "word", "edited", "kept")} | {
    "ocr": 0.01,
    "ocr_words": 0.01,
    "clip": 0.002,
    "preference": 0.02,
}


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


class StageConfig(Settings):
    """What every training stage has."""

    steps: PositiveInt
    micro_batch_size: PositiveInt = Field(description="samples, or images of mr_grpo, a forward pass with gradients, on one rank")
    optimizer: OptimizerConfig
    ema_decay: float = Field(0.0, ge=0.0, lt=1.0, description="0 turns the average of the weights off")
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


class SupervisedConfig(StageConfig):
    """A flow-matching stage: alignment or sft (paper sections 3.1, 3.2)."""

    batch_size: PositiveInt = Field(description="samples an optimizer step, over all ranks and both tasks")
    timestep_sampling: Literal["uniform", "logit_normal"] = "uniform"
    text_dropout: float = Field(0.1, ge=0.0, le=1.0)
    reference_dropout: float = Field(0.0, ge=0.0, le=1.0)
    lora: LoRAConfig | None = None

    def accumulation(self, ranks: int) -> int:
        """Micro-batches of an optimizer step on each of `ranks`; that they come out even is checked with the whole of params.yaml."""
        return self.batch_size // (self.micro_batch_size * ranks)


class SFTConfig(SupervisedConfig):
    """Stage 2 (paper section 3.2)."""

    start: Literal["alignment", "champion"] = Field(
        "alignment",
        description="whose weights it begins with; champion: those that `deepgen start-from champion` brought",
    )


class AuxiliaryConfig(Settings):
    """The flow-matching loss on real data that MR-GRPO adds to each update, so that the model forgets nothing (paper section 3.3)."""

    batch_size: PositiveInt = Field(description="samples an update, over all ranks and both tasks of mixture.mr_grpo.auxiliary")
    weight: float | None = Field(None, gt=0.0, lt=1.0, description="lambda of the paper: loss = (1 - lambda) policy + lambda auxiliary")
    share: PositiveFloat | None = Field(None, description="in its place: norm of its gradient, as a share of the policy gradient's")
    timestep_sampling: Literal["uniform", "logit_normal"] = "uniform"
    text_dropout: float = Field(0.1, ge=0.0, le=1.0)
    reference_dropout: float = Field(0.0, ge=0.0, le=1.0)
    seed: int = 0

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.weight is None) == (self.share is None):
            raise ValueError(f"weight: {self.weight} and share: {self.share} given; allowed: one of them, the other null")
        return self


class ProbeConfig(Settings):
    """What the update does to what it is not rewarded for, looked at on evaluation samples, and when that ends the stage."""

    every: PositiveInt = Field(description="updates between two")
    samples: PositiveInt = Field(64, description="of each evaluation part, with the seeds, steps and guidance of evaluation")
    max_edit_fall: float | None = Field(None, gt=0.0, le=1.0, description="of editing, strict, below the start's; more stops the stage")
    max_strict_fall: float | None = Field(None, gt=0.0, le=1.0, description="of generation; rewards that rise meanwhile are being hacked")


class MRGRPOConfig(StageConfig):
    """Stage 3 (paper section 3.3): group-relative policy optimisation of the DiT over several rewards. A step is one update."""

    prompts_per_step: PositiveInt = Field(description="groups an update, over all ranks")
    group_size: int = Field(ge=2, description="images a prompt")
    rollout_prompts: PositiveInt | None = Field(
        None, description="groups rolled out at a time on one rank; those before are scored meanwhile; null: all at once"
    )
    rollout_steps: PositiveInt
    stochastic_steps: PositiveInt = Field(description="steps of the rollout that add noise and are trained; the last never is one")
    window: Literal["first", "neighbours", "spread"] = Field(
        "first",
        description="which: the first, neighbours from a place drawn an update, or any, drawn an update; all others are Euler steps",
    )
    sampler: Literal["cps_sde", "flow_sde"] = "flow_sde"
    eta: PositiveFloat = 1.0
    same_noise: bool = Field(False, description="a group's images start from one noise")
    guidance: NonNegativeFloat = Field(1.0, description="of rollout and update alike; 1 runs the conditional branch alone")
    clip_range: PositiveFloat
    rewards: dict[str, PositiveFloat] = Field(min_length=1, description="weight of each reward")
    part_rewards: dict[str, dict[str, NonNegativeFloat]] = Field(
        {}, description="part of mixture.mr_grpo -> its own weights; a reward that it does not name is not asked about its prompts"
    )
    held_out_reward: str | None = Field(None, description="scored and logged, never trained on: the gain that it shows is no hacking")
    noise_floor: dict[str, NonNegativeFloat] = Field(
        {}, description="of a reward: a group in which it spreads less gets advantage 0 from it; of those not named here their own"
    )
    preference: PreferenceConfig | None = Field(None, description="the judge whose comparisons are the reward `preference`")
    advantage_norm: Literal["per_reward", "summed"] = Field(
        "per_reward", description="MR-GRPO normalises each reward in its group, then the batch; plain GRPO the weighted sum in its group"
    )
    advantage_clip: PositiveFloat = 5.0
    max_gain: PositiveFloat = Field(3.0, description="most that the batch normalisation enlarges by: few live groups are not blown up")
    control: bool = Field(False, description="an experiment's control: rewards are scored, and no advantage is given")
    min_coverage: float = Field(0.9, ge=0.0, le=1.0, description="share of valid reward values below which an update is not taken")
    on_low_coverage: Literal["skip", "stop"] = "stop"
    refill: NonNegativeInt = Field(0, description="how often an update draws prompts anew for groups without any spread")
    kl: Literal["velocity", "kernel"] = Field("velocity", description="the reference's form, or the exact one of the step's Gaussian")
    kl_weight: NonNegativeFloat = 0.0
    auxiliary: AuxiliaryConfig | None = None
    strips_every: NonNegativeInt = Field(0, description="updates between strips of each reward's best and worst picture; 0: never")
    probe: ProbeConfig | None = None
    log_every: PositiveInt = 1

    @model_validator(mode="after")
    def _last_step_is_deterministic(self) -> Self:
        if self.stochastic_steps >= self.rollout_steps:
            raise ValueError(
                f"stochastic_steps: {self.stochastic_steps} of {self.rollout_steps} rollout_steps; allowed: 1..{self.rollout_steps - 1}, "
                "because the last step must be deterministic"
            )
        if self.sampler == "cps_sde" and self.eta > 1:
            raise ValueError(f"eta: {self.eta} given; allowed for cps_sde: up to 1, where all noise is new")
        return self

    @model_validator(mode="after")
    def _rewards_are_known(self) -> Self:
        named = {f"rewards.{name}": name for name in self.rewards} | {f"noise_floor.{name}": name for name in self.noise_floor}
        named |= {f"part_rewards.{part}.{name}": name for part, weights in self.part_rewards.items() for name in weights}
        if self.held_out_reward is not None:
            named["held_out_reward"] = self.held_out_reward
        for key, name in named.items():
            if name not in NOISE_FLOORS:
                never = "; strict is what the model is judged by, and never a reward" if name == "strict" else ""
                raise ValueError(f"{key}: no reward is called {name!r}; allowed: {', '.join(sorted(NOISE_FLOORS))}{never}")
        if "preference" in named.values() and self.preference is None:
            raise ValueError("preference: null, but a reward of that name is asked for; allowed: its endpoint and model, or no such reward")
        if self.held_out_reward in self.trained_rewards:
            raise ValueError(f"held_out_reward: {self.held_out_reward} is trained on by rewards or part_rewards; allowed: null, or another")
        for part, weights in self.part_rewards.items():
            if not sum(weights.values()):
                raise ValueError(f"part_rewards.{part}: {weights} sums to 0; at least one weight must be above 0")
        return self

    @property
    def auxiliary_per_image(self) -> float:
        """Real samples of the auxiliary loss for each image that is rolled out."""
        return self.auxiliary.batch_size / (self.prompts_per_step * self.group_size) if self.auxiliary else 0.0

    @property
    def trained_rewards(self) -> tuple[str, ...]:
        """Names, in a fixed order."""
        parts = (name for weights in self.part_rewards.values() for name, weight in weights.items() if weight)
        return tuple(sorted({*self.rewards, *parts}))

    def weights_of(self, part: str) -> dict[str, float]:
        """Reward -> weight, for the prompts of `part`."""
        return {name: weight for name, weight in self.part_rewards.get(part, self.rewards).items() if weight}


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
    stages: tuple[Literal["alignment", "sft", "mr_grpo"], ...] = Field(
        ("alignment", "sft"), description="what each item trains: these two, or mr_grpo alone, from the project's own outputs/sft"
    )
    share_of_steps: float = Field(gt=0.0, description="of the preset's steps of those stages; above 1 is longer")
    seeds: int = Field(ge=1, le=100, description="0, 1, ... of those stages; the mixtures' are moved with them")
    guidances: tuple[NonNegativeFloat, ...] = Field((), description="of mr_grpo: each item is scored at each; none: the preset's")
    overrides: dict[str, Any] = Field({}, description="dotted keys of params.yaml, for base and variants alike")
    base: str = Field(description="what the preset is, in words")
    variants: dict[str, VariantConfig] = Field(min_length=1)

    @model_validator(mode="after")
    def _stages_are_known(self) -> Self:
        if self.stages not in (("alignment", "sft"), ("mr_grpo",)):
            raise ValueError(f"stages: {list(self.stages)} given; allowed: [alignment, sft] or [mr_grpo]")
        if self.guidances and self.stages != ("mr_grpo",):
            raise ValueError(f"guidances: {list(self.guidances)} given; allowed with stages [alignment, sft]: none")
        if len(set(self.guidances)) < len(self.guidances):
            raise ValueError(f"guidances: {list(self.guidances)} names one twice")
        return self

    @model_validator(mode="after")
    def _names_are_file_names(self) -> Self:
        wrong = [name for name in self.variants if name in ("base", "start") or not name.replace("_", "").isalnum()]
        if wrong:
            raise ValueError(f"variants: {wrong} can't be names; allowed: letters, digits and _, and neither base nor start")
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
