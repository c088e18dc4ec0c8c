"""Prompt files: the benchmarks' and the RL recipe's, each layout as it is published."""

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, ValidationError, field_validator, model_validator

from runtime.exits import Plain
from runtime.params import parse_params
from runtime.settings import Settings

SHOWN = 120  # characters of an example


class Layout(NamedTuple):
    """A record is of this layout if it has all of `keys`; its prompt stands under `prompt`."""

    name: str
    keys: frozenset[str]
    prompt: str


def _layout(name: str, keys: str, prompt: str) -> Layout:
    return Layout(name, frozenset(keys.split()), prompt)


# The first that fits is taken, so the more particular ones stand before the plainer ones.
LAYOUTS = (
    _layout("GenEval, rewritten", "tag include detailed_caption", "detailed_caption"),  # what the model is given; the original is beside it
    _layout("GenEval", "tag include prompt", "prompt"),
    _layout("UniGenBench, English", "index prompt_en", "prompt_en"),
    _layout("UniGenBench, Chinese", "index prompt_zh", "prompt_zh"),
    _layout("UniGenBench, vendored", "index prompt sub_dims", "prompt"),
    _layout("CVTG-2K", "index prompt carrier_list", "prompt"),
    _layout("DPG-Bench, lines", "key prompt", "prompt"),
    _layout("LongText-Bench", "prompt_id text prompt", "prompt"),
    _layout("WISE", "prompt_id Prompt", "Prompt"),
    _layout("T2I-CoReBench", "Prompt Checklist", "Prompt"),
    _layout("T2I-CoReBench, lines", "ID Prompt", "Prompt"),
    _layout("GEdit-Bench and ImgEdit-Bench", "id edit_type prompt", "prompt"),
    _layout("KRIS-Bench", "ori_img ins_en", "ins_en"),
    _layout("RISEBench", "index category image instruction", "instruction"),
    _layout("Imagine", "id note instruction", "instruction"),
)


class UnknownLayout(Plain, ValueError):
    """A prompt file that is none of the layouts we read, or is broken."""


class PromptFile(NamedTuple):
    """What was read of a file, and as what."""

    layout: str
    prompts: list[str]


def read_prompts(path: Path) -> list[str]:
    """The prompts of a benchmark or training file, in its order, as they are written; blank lines of plain text are left out.

    path: a .json, .jsonl, .csv or .txt file, or a folder of .txt files, one prompt each, in the order of their names.

    Raises:
        FileNotFoundError: nothing is there.
        UnknownLayout: naming the file, and the keys found or the item that is broken.
    """
    return read_prompt_file(path).prompts


def read_prompt_file(path: Path) -> PromptFile:
    """The same, with the name of the layout that the file was read as.

    Raises:
        FileNotFoundError: nothing is there.
        UnknownLayout: naming the file, and the keys found or the item that is broken.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(path.glob("*.txt"))
        if not files:
            raise UnknownLayout(f"{path}: a folder without .txt files; expected one prompt a file, or name a single file.")
        return PromptFile("a folder of .txt files", [_named(_read_text(file).strip(), file) for file in files])
    readers = {".txt": _plain, ".json": _from_json, ".jsonl": _from_json, ".csv": _from_csv}
    if path.suffix not in readers:
        raise UnknownLayout(f"{path}: {path.suffix or 'no suffix'}; expected one of {sorted(readers)}, or a folder of .txt files.")
    read = readers[path.suffix](path)
    if not read.prompts:
        raise UnknownLayout(f"{path}: holds no prompt.")
    return read


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # line ends come out as \n, whatever they were
    except UnicodeDecodeError as error:
        raise UnknownLayout(f"{path}: byte {error.start} is not UTF-8; convert the file.") from error


def _plain(path: Path) -> PromptFile:
    lines = [line for line in _read_text(path).split("\n") if line.strip()]  # splitlines() would also cut at U+2028 inside a prompt
    return PromptFile("plain text, a prompt a line", lines)


def _from_csv(path: Path) -> PromptFile:
    """Only the prompt's column is read: other columns may hold JSON that does not parse (UniGenBench's long English row 509)."""
    rows = csv.DictReader(io.StringIO(_read_text(path)))
    return _prompts_of(((f"row {i}", row) for i, row in enumerate(rows)), path, rows.fieldnames or [])


def _from_json(path: Path) -> PromptFile:
    text = _read_text(path)
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = [_parse_line(line, i, path) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if isinstance(value, dict) and isinstance(value.get("data_list"), list):
        value = value["data_list"]
    if isinstance(value, dict) and value and all(isinstance(prompt, str) and name.endswith(".txt") for name, prompt in value.items()):
        prompts = [_named(prompt, f"{path}: {name}") for name, prompt in value.items()]
        return PromptFile("DPG-Bench in one file", prompts)  # {"226.txt": prompt}
    if isinstance(value, dict) and any(layout.keys <= set(value) for layout in LAYOUTS):
        value = [value]  # a .jsonl of one line
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    records = [(f"item {name}", record) for name, record in items]
    first = records[0][1] if records else value
    keys = list(first) if isinstance(first, dict) else list(value)[:8] if isinstance(value, dict) else []
    return _prompts_of(records, path, keys)


def _parse_line(line: str, number: int, path: Path) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UnknownLayout(f"{path}: line {number} is not JSON ({error}); expected one JSON value, or one on each line.") from error


def _prompts_of(records: Iterable[tuple[str, Any]], path: Path, keys: Sequence[str]) -> PromptFile:
    layout = next((layout for layout in LAYOUTS if layout.keys <= set(keys)), None)
    if layout is None:
        known = "; ".join(f"{layout.name} ({', '.join(sorted(layout.keys))})" for layout in LAYOUTS)
        raise UnknownLayout(
            f"{path}: keys {sorted(map(str, keys))} are of no layout we read. Known: {known}. A new one is a row of LAYOUTS."
        )
    prompts = [_named(record.get(layout.prompt) if isinstance(record, dict) else None, f"{path}: {name}") for name, record in records]
    return PromptFile(layout.name, prompts)


def _named(prompt: Any, where: object) -> str:
    if not isinstance(prompt, str) or not prompt.strip():
        raise UnknownLayout(f"{where}: {prompt!r} stands where a prompt was expected; mend or remove the item.")
    return prompt


class PromptSet(Settings):
    """One prompt file of an RL recipe, the weight of its draws and of each reward."""

    name: str = Field(min_length=1)
    path: Path = Field(description="beside the recipe, or absolute")
    sample_weight: PositiveFloat = 1.0
    rewards: dict[str, NonNegativeFloat]
    prompts: tuple[str, ...] = ()

    @field_validator("rewards", mode="before")
    @classmethod
    def _one_mapping(cls, value: Any) -> Any:
        """The recipe lists one-key mappings."""
        if not isinstance(value, list):
            return value
        if not all(isinstance(item, Mapping) and len(item) == 1 for item in value):
            raise ValueError(f"{value} given; expected a list of one reward and its weight each, such as [{{ocr: 0.7}}]")
        names = [name for item in value for name in item]
        if len(set(names)) < len(names):
            raise ValueError(f"{names} names a reward twice; keep one")
        return {name: weight for item in value for name, weight in item.items()}

    @model_validator(mode="after")
    def _something_is_rewarded(self) -> Self:
        if math.fsum(self.rewards.values()) == 0:
            raise ValueError(f"rewards: {self.rewards} sums to 0; at least one weight must be above 0")
        return self


class RLMixture(Settings):
    """The prompts that RL draws from."""

    sampling_mode: Literal["sample_proportional", "weight_only"] = "sample_proportional"
    datasets: tuple[PromptSet, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [prompt_set.name for prompt_set in self.datasets]
        if len(set(names)) < len(names):
            raise ValueError(f"datasets: {sorted(name for name in set(names) if names.count(name) > 1)} stands there twice; keep one")
        return self

    def shares(self) -> dict[str, float]:
        """Share of each set in the draws: its weight times its size, or its weight alone where sampling_mode is weight_only."""
        by_size = self.sampling_mode == "sample_proportional"
        amounts = {s.name: s.sample_weight * (len(s.prompts) if by_size else 1) for s in self.datasets}
        return {name: amount / sum(amounts.values()) for name, amount in amounts.items()}


def read_rl_mixture(path: Path) -> RLMixture:
    """An RL recipe with the prompts of every file it names.

    Raises:
        ValueError: a line a problem: key, what was given, what is allowed.
        FileNotFoundError: naming every prompt file that is not there.
        UnknownLayout: a prompt file can't be read.
    """
    path = Path(path)
    try:
        mixture = RLMixture.model_validate(parse_params(path.read_text(), path.name))
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, p['loc']))}: {p['msg'].removeprefix('Value error, ')}" for p in error.errors()]
        raise ValueError(f"{path} can't be used:\n" + "\n".join(lines)) from error
    files = {prompt_set.name: path.parent / prompt_set.path for prompt_set in mixture.datasets}
    if absent := [f"{name} ({file})" for name, file in files.items() if not file.exists()]:
        raise FileNotFoundError(f"{path} names {len(files)} prompt files, {len(absent)} of which are missing: {', '.join(absent)}.")
    read = [s.model_copy(update={"path": files[s.name], "prompts": tuple(read_prompts(files[s.name]))}) for s in mixture.datasets]
    return mixture.model_copy(update={"datasets": tuple(read)})


def print_prompt_file(path: Path, read: PromptFile, first: int = 5) -> None:
    """Count and layout, then the first prompts."""
    print(f"{path}: {len(read.prompts):,} prompts, {read.layout}")
    _print_examples(read.prompts, first)


def print_rl_mixture(mixture: RLMixture, examples: int = 3) -> None:
    """A line a set: its prompts, its share of the draws, its rewards; then the first prompts of each."""
    print(f"{'set':28}{'prompts':>9}{'weight':>8}{'share':>8}  rewards ({mixture.sampling_mode})")
    shares = mixture.shares()
    for prompt_set in mixture.datasets:
        rewards = ", ".join(f"{name} {weight:g}" for name, weight in prompt_set.rewards.items())
        facts = f"{prompt_set.name:28}{len(prompt_set.prompts):9,}{prompt_set.sample_weight:8g}{shares[prompt_set.name]:8.1%}"
        print(f"{facts}  {rewards}")
    for prompt_set in mixture.datasets:
        print(f"\n{prompt_set.name}: {prompt_set.path}")
        _print_examples(prompt_set.prompts, examples)


def _print_examples(prompts: Sequence[str], number: int) -> None:
    for prompt in prompts[:number]:
        line = " ".join(prompt.split())
        print(f"  {line if len(line) <= SHOWN else line[: SHOWN - 1] + '…'}")
