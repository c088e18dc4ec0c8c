"""The whole of params.yaml, typed: each section's model lives in the `config.py` of the room that uses it."""

import difflib
import re
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import yaml
from pydantic import ValidationError, model_validator

from data.config import DataConfig, MixtureConfig, StageMixtureConfig
from model.config import FoundationConfig, ModelConfig
from orchestration.config import BudgetConfig, GatesConfig, RegistryConfig, RetrainConfig
from runtime.config import NoticesConfig
from runtime.settings import Settings
from training.config import EvaluationConfig, LatentsConfig, LaunchConfig, MRGRPOConfig, SFTConfig, SupervisedConfig

STAGES = ("alignment", "sft", "mr_grpo")
MAX_BYTES = 1_000_000
SettingsT = TypeVar("SettingsT", bound=Settings)


class ParamsError(Exception):
    """params.yaml can't be used. Each line names a key, its value and what is allowed."""


class Params(Settings):
    """params.yaml. Checked as a whole before any work starts."""

    preset: str
    data: DataConfig
    mixture: dict[Literal["alignment", "sft", "mr_grpo"], StageMixtureConfig]
    foundation: FoundationConfig
    model: ModelConfig
    latents: LatentsConfig
    alignment: SupervisedConfig
    sft: SFTConfig
    mr_grpo: MRGRPOConfig
    evaluation: EvaluationConfig
    launch: LaunchConfig
    gates: GatesConfig
    registry: RegistryConfig
    budget: BudgetConfig
    retrain: RetrainConfig
    notices: NoticesConfig

    @model_validator(mode="after")
    def _parts_exist(self) -> Self:
        if set(self.mixture) != set(STAGES):
            raise ValueError(f"mixture: names {sorted(self.mixture)}, must name each of {list(STAGES)}")
        mixtures: dict[str, MixtureConfig] = {f"mixture.{stage}": mixture for stage, mixture in self.mixture.items()}
        if self.mixture["mr_grpo"].auxiliary is not None:
            mixtures["mixture.mr_grpo.auxiliary"] = self.mixture["mr_grpo"].auxiliary
        used = [(f"{key}.parts", name) for key, mixture in mixtures.items() for name in mixture.parts]
        used += [("latents.parts", name) for name in self.latents.parts]
        used += [("evaluation.parts", name) for name in self.evaluation.parts]
        for key, name in used:
            if name not in self.data.parts:
                raise ValueError(f"{key}: names {name!r}, which data.parts lacks; allowed: {sorted(self.data.parts)}")
            if self.data.parts[name].source == "prompts" and key != "mixture.mr_grpo.parts":
                raise ValueError(f"{key}: names {name!r}, which has prompts and no pictures; only mixture.mr_grpo.parts may")
            split = self.data.parts[name].split
            if (split == "evaluation") != (key == "evaluation.parts"):
                raise ValueError(f"{key}: {name!r} is of the {split} split; training reads no evaluation part, and evaluation no other")
        for key, mixture in mixtures.items():
            for task, share in mixture.ratio.items():
                weight = sum(w for name, w in mixture.parts.items() if self.data.parts[name].task == task)
                if share > 0 and weight <= 0:
                    raise ValueError(
                        f"{key}: ratio.{task} is {share}, but the weights of its {task} parts sum to {weight}; must be above 0"
                    )
        return self

    @model_validator(mode="after")
    def _sizes_agree(self) -> Self:
        side = self.data.image_size
        step = self.model.vae.downscale * self.model.dit.patch_size
        if side % step:
            raise ValueError(f"data.image_size: {side} must be a multiple of {step} (vae.downscale x dit.patch_size)")
        vision = self.model.vlm.vision
        token = vision.patch_size * vision.spatial_merge_size
        if side * 28 // 32 % token or side % 32:
            raise ValueError(
                f"data.image_size: {side} x 28/32 must be a whole number of {token}-pixel vision tokens, and {side} a multiple of 32"
            )
        if side // step > self.model.dit.pos_embed_max_size:
            raise ValueError(
                f"model.dit.pos_embed_max_size: {self.model.dit.pos_embed_max_size} is below the {side // step} positions of a side"
            )
        for stage in ("alignment", "sft"):
            section: SupervisedConfig = getattr(self, stage)
            cycle = sum(self.mixture[stage].ratio.values())  # type: ignore[index]
            unit = section.micro_batch_size * self.launch.processes * cycle
            if section.batch_size % unit:
                below = section.batch_size // unit * unit
                raise ValueError(
                    f"{stage}.batch_size: {section.batch_size} must be a multiple of {unit} (micro_batch_size {section.micro_batch_size} "
                    f"x launch.processes {self.launch.processes} x mixture ratio sum {cycle}), so that every step sees the exact ratio; "
                    f"nearest: {', '.join(str(size) for size in (below, below + unit) if size)}"
                )
        return self

    @model_validator(mode="after")
    def _reinforcement_fits(self) -> Self:
        config, ranks, mixture = self.mr_grpo, self.launch.processes, self.mixture["mr_grpo"]
        if config.prompts_per_step % ranks:
            raise ValueError(f"mr_grpo.prompts_per_step: {config.prompts_per_step} must be a multiple of launch.processes, {ranks}")
        real = mixture.auxiliary
        for stage in ("alignment", "sft"):
            if self.mixture[stage].auxiliary is not None:  # type: ignore[index]
                raise ValueError(f"mixture.{stage}.auxiliary: given; allowed: null, for mr_grpo alone has an auxiliary loss")
        if (config.auxiliary is None) != (real is None):
            given, lacking = ("mr_grpo.auxiliary", "mixture.mr_grpo.auxiliary")[:: 1 if real is None else -1]
            raise ValueError(f"{given}: given, but {lacking} is null; allowed: both, or neither")
        if config.auxiliary is not None and real is not None:
            unit = sum(real.ratio.values()) * ranks
            if config.auxiliary.batch_size % unit:
                raise ValueError(
                    f"mr_grpo.auxiliary.batch_size: {config.auxiliary.batch_size} must be a multiple of {unit} (ratio sum of "
                    f"mixture.mr_grpo.auxiliary x launch.processes {ranks})"
                )
        for part in config.part_rewards:
            if part not in mixture.parts:
                raise ValueError(f"mr_grpo.part_rewards: names {part!r}, which mixture.mr_grpo.parts lacks: {sorted(mixture.parts)}")
        return self


_SafeLoader: Any = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader  # in C: thousands of parts take seconds in Python


class _Loader(_SafeLoader):
    """YAML 1.2 numbers (1e-4 is a float) and no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ParamsError(f"{key}: written twice (line {node.start_mark.line + 1} on); keep one.")
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.\d*([eE][-+]?\d+)?|\.\d+([eE][-+]?\d+)?|\d+[eE][-+]?\d+)$"),
    list("-+0123456789."),
)


def parse_params(text: str, name: str = "params.yaml") -> dict[str, Any]:
    """The file as plain values, unchecked but for YAML itself.

    Raises:
        ParamsError: not YAML, a key twice, too large, or no mapping.
    """
    if len(text) > MAX_BYTES:
        raise ParamsError(f"{name} has {len(text)} bytes; allowed: up to {MAX_BYTES}.")
    try:
        value = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise ParamsError(f"{name} is not YAML: {error}") from error
    if not isinstance(value, dict):
        raise ParamsError(f"{name} holds {type(value).__name__}; expected sections such as data: and model:.")
    return value


def check_params(value: dict[str, Any], name: str = "params.yaml") -> Params:
    """Typed params. Raises as `check_settings`."""
    return check_settings(Params, value, name)


def check_settings(kind: type[SettingsT], value: dict[str, Any], name: str) -> SettingsT:
    """The values of the file `name`, typed.

    Raises:
        ParamsError: one line a problem: key, value given, what is allowed.
    """
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        lines = [_explain(problem, kind) for problem in error.errors()]
        raise ParamsError(f"{name} can't be used:\n" + "\n".join(f"  {line}" for line in lines) + "\nNothing was started.") from error


def load_params(path: Path) -> Params:
    """Read and check a params file."""
    return check_params(parse_params(Path(path).read_text(), Path(path).name), Path(path).name)


def _explain(problem: Any, settings: type[Settings]) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    kind = problem["type"]
    if kind == "extra_forbidden":
        known = _names_at(problem["loc"][:-1], settings)
        near = difflib.get_close_matches(str(problem["loc"][-1]), known, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"{key}: unknown key; {hint}allowed here: {', '.join(known)}"
    if kind == "missing":
        return f"{key}: missing; every key of a params file is written out"
    if kind == "value_error":
        return f"{key}.{message}" if key else message
    return f"{key}: {problem['input']!r} given; {message[0].lower()}{message[1:]}"


def _names_at(location: tuple[int | str, ...], settings: type[Settings]) -> list[str]:
    """Field names of the settings model that a location in the file leads to."""
    kind: Any = settings
    for part in location:
        if isinstance(kind, type) and issubclass(kind, Settings) and part in kind.model_fields:
            kind = kind.model_fields[str(part)].annotation
        else:  # a dict's own key: its value type
            kind = getattr(kind, "__args__", [None, kind])[-1]
        for option in getattr(kind, "__args__", ()):  # Optional[...] leads to its model
            if isinstance(option, type) and issubclass(option, Settings) and not getattr(kind, "__origin__", None):
                kind = option
    return sorted(kind.model_fields) if isinstance(kind, type) and issubclass(kind, Settings) else []
