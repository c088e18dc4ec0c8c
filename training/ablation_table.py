"""Results of an ablation, compared: means over seeds, paired differences to base with t intervals, and what they say of each claim."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from scipy.stats import t

from runtime.files import read_json
from training.ablations import REINFORCED, START, SUPERVISED, load_experiment
from training.config import ExperimentConfig

BASE = "base"
SCORES = {"generation without words": "text_to_image", "editing": "image_edit"}
Results = dict[str, dict[int, dict[str, Any]]]  # configuration -> seed -> result


def print_table(root: Path, name: str) -> None:
    """Markdown of all results in `ablations/<name>/`, with a sentence a claim."""
    experiment = load_experiment(root, name)
    results: Results = {}
    for file in sorted((root / "ablations" / name).glob("*.json")):
        result = read_json(file)
        results.setdefault(result["configuration"], {})[result["seed"]] = result
    if not results:
        raise FileNotFoundError(f"ablations/{name}/ holds no result yet: `python -m training ablate {name}` makes them.")
    print((reinforced_table if experiment.stages == REINFORCED else table)(experiment, results), flush=True)


def score_of(result: dict[str, Any], stage: str, task: str) -> float:
    """Share of right images of a task, all kinds but `word` (which no tiny model renders), each weighted by its count."""
    kinds = [row for kind, row in result["stages"][stage]["evaluation"][task]["kinds"].items() if kind != "word"]
    return sum(row["n"] * row["strict"] for row in kinds) / sum(row["n"] for row in kinds)


def differences(results: Results, configuration: str, stage: str, task: str) -> list[float]:
    """Configuration minus base, for each seed that both have."""
    base, other = results.get(BASE, {}), results.get(configuration, {})
    return [score_of(other[seed], stage, task) - score_of(base[seed], stage, task) for seed in sorted(base.keys() & other.keys())]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95% of the mean by Student's t; infinite for one value."""
    if len(values) < 2:
        return -math.inf, math.inf
    half = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return mean(values) - half, mean(values) + half


def verdict(expected: str, intervals: Iterable[tuple[float, float]]) -> str:
    """Whether the differences that a claim is about lie on the expected side of 0: at least one surely, none surely on the other."""
    sides = {"higher" if low > 0 else "lower" for low, high in intervals if low > 0 or high < 0}
    if sides == {expected}:
        return "shows"
    return "reverse" if len(sides) == 1 else "does not show at this scale"


def table(experiment: ExperimentConfig, results: Results) -> str:
    """Rows of configuration and stage, then the verdicts, which look at the models after SFT as the paper's table 6 does."""
    lines = [
        "| configuration | seeds | connector | after | " + " | ".join(f"{name} | minus {BASE}, 95%" for name in SCORES) + " |",
        "|---" * (4 + 2 * len(SCORES)) + "|",
    ]
    for configuration in experiment.configurations():
        rows = list(results.get(configuration, {}).values())
        for stage in SUPERVISED if rows else ():
            cells = [configuration, str(len(rows)), f"{connector_parameters(rows[0]):,}", stage]
            for task in SCORES.values():
                cells += [f"{mean(score_of(row, stage, task) for row in rows):.3f}"]
                cells += ["-" if configuration == BASE else spell(differences(results, configuration, stage, task))]
            lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for configuration, variant in experiment.variants.items():
        found = {name: differences(results, configuration, "sft", task) for name, task in SCORES.items()}
        said = verdict(variant.expected, map(interval, found.values())) if all(len(v) > 1 for v in found.values()) else "not measured yet"
        shown = ", ".join(f"{name} {spell(values)}" for name, values in found.items())
        lines.append(f"- {configuration}, {variant.claim} ({variant.paper}): **{said}**. {variant.expected} expected; after SFT {shown}.")
    each = [result for seeds in results.values() for result in seeds.values()]
    lines += ["", f"Differences are paired by seed; no correction for {len(experiment.variants) * len(SCORES)} comparisons."]
    for name in ("code", "data", "foundation"):
        if len({result["digests"][name] for result in each}) > 1:
            lines.append(f"Not all of these results are of the same {name}.")
    return "\n".join(lines)


def spell(values: Sequence[float]) -> str:
    if not values:
        return "-"
    low, high = interval(values)
    return f"{mean(values):+.3f} " + (f"[{low:+.3f}, {high:+.3f}]" if len(values) > 1 else "(one seed)")


def connector_parameters(result: dict[str, Any]) -> int:
    """Of the connector with its think tokens."""
    counts = result["stages"]["alignment"]["parameters"]
    return sum(counts[part]["trained"] for part in ("connector", "think_tokens"))


# ---------------------------------------------------------------- mr_grpo, against the model that it started from

MEASURES = {"trained rewards": ("text_to_image", "rewards"), "held-out reward": ("text_to_image", "held_out")} | {
    f"strict, {name}": (task, "strict") for name, task in (("generation", "text_to_image"), ("editing", "image_edit"))
}
HARMLESS = -0.02  # of editing: a change that surely is above this is none


def values_of(result: dict[str, Any], guidance: str, task: str, measure: str) -> list[float | None]:
    """Of each sample, in the order of the evaluation set; None where the measure does not apply."""
    text = result["guidances"][guidance][task][measure]
    return [None if value == "-" else float(value) for value in (text if measure == "strict" else text.split())]


def changes(result: dict[str, Any], start: dict[str, Any], guidance: str, task: str, measure: str) -> list[float]:
    """Of each sample to which the measure applies, its value less that of the start.

    Raises:
        ValueError: the two were scored on other samples.
    """
    ours, theirs = (row["guidances"][guidance][task]["samples"] for row in (result, start))
    if ours != theirs:
        raise ValueError(f"{result['configuration']}-seed{result['seed']} and start were scored on other samples; make one anew, --again")
    pairs = zip(*(values_of(row, guidance, task, measure) for row in (result, start)), strict=True)
    return [after - before for after, before in pairs if after is not None and before is not None]


def paired_interval(by_seed: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Mean change and its 95% interval: the wider of what samples say (their mean over seeds) and of what seeds say (Student's t)."""
    means = [mean(each) for each in by_seed]
    samples = [mean(row) for row in zip(*by_seed, strict=True)]
    half = 1.959964 * stdev(samples) / math.sqrt(len(samples))
    if len(means) > 1:
        low, high = interval(means)
        half = max(half, (high - low) / 2)
    return mean(means), mean(means) - half, mean(means) + half


def reinforced_table(experiment: ExperimentConfig, results: Results) -> str:
    """A row a configuration and guidance: changes over the start, paired by sample, and what they say."""
    if START not in results:
        raise FileNotFoundError("no result of `start` yet, which all others are compared with: run the queue first.")
    start = results[START][0]
    lines = ["| configuration | guidance | seeds | " + " | ".join(MEASURES) + " |", "|---" * (3 + len(MEASURES)) + "|"]
    for guidance in start["guidances"]:
        cells = [START, guidance, "-"]
        for task, measure in MEASURES.values():
            there = [value for value in values_of(start, guidance, task, measure) if value is not None]
            cells.append(f"{mean(there):.3f} (n {len(there)})" if there else "-")
        lines.append(f"| {' | '.join(cells)} |")
        for configuration in experiment.configurations():
            rows = [row for _, row in sorted(results.get(configuration, {}).items())]
            if not rows:
                continue
            cells = [configuration, guidance, str(len(rows))]
            for task, measure in MEASURES.values():
                by_seed = [changes(row, start, guidance, task, measure) for row in rows]
                cells.append(spell_change(*paired_interval(by_seed), harmless=task == "image_edit") if by_seed[0] else "-")
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Changes are over start, paired by sample; 95% intervals, the wider of those over samples and over seeds."]
    for configuration, variant in experiment.variants.items():
        lines.append(f"- {configuration}: {variant.claim} ({variant.paper}); {variant.expected} than {BASE} expected.")
    for name in ("code", "data", "foundation", "start"):
        if len({row["digests"][name] for seeds in results.values() for row in seeds.values()}) > 1:
            lines.append(f"Not all of these results are of the same {name}.")
    return "\n".join(lines)


def spell_change(value: float, low: float, high: float, harmless: bool = False) -> str:
    said = "rises" if low > 0 else "falls" if high < 0 else "undecided"
    if harmless and said != "rises":
        said += f", {'not' if low >= HARMLESS else 'perhaps'} by more than {-HARMLESS}" if high >= HARMLESS else ""
    return f"{value:+.4f} [{low:+.4f}, {high:+.4f}] {said}"
