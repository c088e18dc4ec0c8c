"""Results of an ablation, compared: means over seeds, paired differences to base with t intervals, and what they say of each claim."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from scipy.stats import t

from runtime.files import read_json
from training.ablations import STAGES, load_experiment
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
    print(table(experiment, results), flush=True)


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
        for stage in STAGES if rows else ():
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
