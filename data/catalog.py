"""The paper's data sets: what each is, where it lies, what may be done with it, and what each stage draws from it."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, StringConstraints, ValidationError, model_validator

from data.config import PartName, Task
from runtime.params import ParamsError, parse_params
from runtime.settings import Settings

CATALOG = Path(__file__).with_name("catalog.yaml")
CLOSE = 0.01  # parts may miss the paper's rounded total by this share without a note

Category = Literal["general", "reasoning", "text_rendering"]
Stage = Literal["alignment", "sft", "mr_grpo"]
Format = Literal["t2i_pretrain_json", "t2i_sft_json", "edit_json", "webdataset", "hugging_face", "prompts", "drawn"]
NotEmpty = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class CatalogError(ParamsError):
    """The catalogue, which is settings like params.yaml, can't be used. Each line names an entry and what is wrong with it."""


class HubRepo(Settings):
    """A data set on the Hugging Face hub."""

    repo: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    revision: str | None = Field(pattern=r"^[0-9a-f]{40}$", description="full commit hash; null where nobody has looked at the files yet")


class DataSet(Settings):
    """One data set, as the paper uses it."""

    task: Task
    category: Category
    stages: tuple[Stage, ...] = Field(description="that read it; none for one that only stands in, or must not be read")
    count: PositiveInt = Field(description="samples expected, as stated")
    hub: tuple[HubRepo, ...] = ()
    licence: NotEmpty = Field(description="SPDX name, or unknown")
    format: Format = Field(description="kind of source that reads it")
    caption_key: NotEmpty | None = Field(None, description="key of the caption in each annotation; null for the format's own")
    status: Literal["public", "unreleased"]
    stand_in: PartName | None = Field(None, description="set that is read in its place; for unreleased ones only")
    note: NotEmpty | None = None

    @property
    def images(self) -> int:
        """Images of all samples; an edit is counted with one reference, which is what the paper's loader keeps."""
        return 0 if self.format == "prompts" else self.count * (2 if self.task == "image_edit" else 1)


class CatalogMixture(Settings):
    """What a stage draws: micro-batches of each task in a cycle, and how often each set comes relative to its size."""

    ratio: dict[Task, NonNegativeInt]
    weights: dict[PartName, NonNegativeFloat]


class StatedTotal(Settings):
    """A total that the paper states."""

    stage: Stage
    task: Task
    category: Category
    count: PositiveInt
    note: NotEmpty | None = None


class Catalog(Settings):
    """catalog.yaml."""

    data_sets: dict[PartName, DataSet] = Field(min_length=1)
    mixtures: dict[Stage, CatalogMixture]
    stated: tuple[StatedTotal, ...] = ()

    @model_validator(mode="after")
    def _entries_agree(self) -> Self:
        problems = [*self._stand_in_problems(), *self._mixture_problems(), *self._total_problems()]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _stand_in_problems(self) -> list[str]:
        problems = []
        for name, data_set in self.data_sets.items():
            key, other = f"data_sets.{name}.stand_in", data_set.stand_in
            if (data_set.status == "unreleased") != (other is not None):
                problems.append(
                    f"{key}: {other} given for a set that is {data_set.status}; unreleased sets need one, public sets have none"
                )
            elif other is not None and other not in self.data_sets:
                problems.append(f"{key}: names {other!r}, which data_sets lacks")
            elif other is not None and (self.data_sets[other].status, self.data_sets[other].task) != ("public", data_set.task):
                it = self.data_sets[other]
                problems.append(f"{key}: {other!r} is {it.status} and of {it.task}; must be public and of {data_set.task}")
        return problems

    def _mixture_problems(self) -> list[str]:
        problems = []
        for stage, mixture in self.mixtures.items():
            key = f"mixtures.{stage}"
            problems += [f"{key}.weights: names {name!r}, which data_sets lacks" for name in mixture.weights if name not in self.data_sets]
            reads = {name for name, data_set in self.data_sets.items() if stage in data_set.stages}
            if differ := sorted(reads ^ (set(mixture.weights) & set(self.data_sets))):
                problems.append(
                    f"{key}.weights: {differ} stand either in the mixture or in the sets whose stages say {stage}; must be in both"
                )
            for task, times in mixture.ratio.items():
                weights = [weight for name, weight in mixture.weights.items() if name in reads and self.data_sets[name].task == task]
                if times > 0 and sum(weights) == 0:
                    problems.append(f"{key}: ratio.{task} is {times}, but the weights of its {task} sets sum to 0; must be above 0")
            if sum(mixture.ratio.values()) == 0:
                problems.append(f"{key}.ratio: {mixture.ratio} sums to 0; at least one task must be above 0")
        return problems

    def _total_problems(self) -> list[str]:
        problems, sums = [], self.totals()
        for i, total in enumerate(self.stated):
            key = (total.stage, total.task, total.category)
            if abs(sums[key] - total.count) > CLOSE * total.count and total.note is None:
                problems.append(f"stated.{i}: {total.count:,} for {key}, but its sets sum to {sums[key]:,}; add a note that says why")
        return problems

    def totals(self) -> Counter[tuple[str, str, str]]:
        """Samples by (stage, task, category)."""
        totals: Counter[tuple[str, str, str]] = Counter()
        for data_set in self.data_sets.values():
            for stage in data_set.stages:
                totals[stage, data_set.task, data_set.category] += data_set.count
        return totals

    def union(self, stages: Sequence[str]) -> dict[str, DataSet]:
        """Sets with images that any of `stages` reads, each once."""
        return {name: s for name, s in self.data_sets.items() if set(stages) & set(s.stages) and s.format != "prompts"}

    def shares(self, stage: Stage) -> dict[str, float]:
        """Share of each set in the samples of its own task; a task's shares sum to 1."""
        mixture = self.mixtures[stage]
        drawn = {name: weight * self.data_sets[name].count for name, weight in mixture.weights.items()}
        sums: dict[str, float] = defaultdict(float)
        for name, amount in drawn.items():
            sums[self.data_sets[name].task] += amount
        return {name: amount / sums[self.data_sets[name].task] for name, amount in drawn.items() if amount > 0}

    def refusals(self, name: str) -> list[str]:
        """Why a build refuses this set; empty where it may be fetched and built."""
        data_set = self.data_sets[name]
        reasons = []
        if data_set.status == "unreleased":
            reasons.append(f"unreleased: use its stand-in, {data_set.stand_in}")
        elif data_set.licence == "unknown":
            reasons.append("licence unknown: read the set's own page and write its SPDX name")
        if data_set.status == "public" and not data_set.hub and data_set.format not in ("prompts", "drawn"):
            reasons.append("no hub repository: name the one it comes from, with its revision")
        reasons += [
            f"{hub.repo} has no revision: pin the full commit hash of the files you looked at" for hub in data_set.hub if not hub.revision
        ]
        return reasons


def load_catalog(path: Path = CATALOG) -> Catalog:
    """The catalogue, checked as a whole.

    Raises:
        CatalogError: a line a problem: entry, what was given, what is allowed.
        ParamsError: not YAML, or a key twice.
    """
    try:
        return Catalog.model_validate(parse_params(path.read_text(), path.name))
    except ValidationError as error:
        lines = [".".join(map(str, p["loc"])) + f": {p['msg'].removeprefix('Value error, ')}" for p in error.errors()]
        lines = [re.sub(r"^: ", "", line, flags=re.MULTILINE) for line in lines]
        raise CatalogError(f"{path.name} can't be used:\n" + "\n".join(lines)) from error


def print_catalog(catalog: Catalog) -> None:
    """A line a set, then totals by stage, task and category beside the paper's own."""
    print(f"{'data set':26}{'task':15}{'category':16}{'stages':16}{'count':>12}  {'licence':17}{'format':19}status")
    for name, data_set in catalog.data_sets.items():
        status = data_set.status + (
            ", not pinned"
            if any(hub.revision is None for hub in data_set.hub)
            else f", {data_set.stand_in} stands in"
            if data_set.stand_in
            else ""
        )
        facts = f"{name:26}{data_set.task:15}{data_set.category:16}{' '.join(data_set.stages):16}{data_set.count:12,}"
        print(f"{facts}  {data_set.licence:17}{data_set.format:19}{status}")
    print(f"\n{'stage':12}{'ratio':8}{'task':15}{'category':16}{'sum of sets':>12}{'paper':>14}")
    stated: dict[tuple[str, str, str], StatedTotal] = {(total.stage, total.task, total.category): total for total in catalog.stated}
    totals = catalog.totals()
    for stage, mixture in catalog.mixtures.items():
        for task, times in sorted(mixture.ratio.items(), reverse=True):
            for category in (category for s, t, category in totals if (s, t) == (stage, task)):
                total = stated.get((stage, task, category))
                paper = f"{total.count:14,}  {total.note or ''}" if total else f"{'not stated':>14}"
                print(f"{stage:12}{times:<8}{task:15}{category:16}{totals[stage, task, category]:12,}{paper}".rstrip())
        print(f"{stage:12}{'':8}{'all':31}{sum(count for key, count in totals.items() if key[0] == stage):12,}")
    refused = [name for name in catalog.data_sets if catalog.refusals(name)]
    print(f"\n{len(refused)} of {len(catalog.data_sets)} sets are refused by a build: unreleased, not pinned, or of unknown licence.")
