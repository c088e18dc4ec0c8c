"""Results of an ablation, compared: means over seeds, paired differences to base with t intervals, and what they say of each claim.

Those of mr_grpo are compared with the model that it begins with too, sample by sample.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from scipy.stats import t

from runtime.files import read_json
from training.ablations import START, expand, load_experiment
from training.config import ExperimentConfig

BASE = "base"
MOST_EDITING_LOST = 0.02  # share of right edits that reinforcement may cost
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
    print((table_over_start if experiment.stages == ("mr_grpo",) else table)(experiment, results), flush=True)


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
        for stage in experiment.stages if rows else ():
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
    lines += ["", f"Differences are paired by seed; no correction for {len(experiment.variants) * len(SCORES)} comparisons."]
    return "\n".join([*lines, *unlike(results)])


def unlike(results: Results) -> list[str]:
    """A sentence for each thing that all items read, and that was not the same for all of these results."""
    each = [result["digests"] for seeds in results.values() for result in seeds.values()]
    names = ("code", "data", "foundation", START)
    return [f"Not all of these results are of the same {name}." for name in names if len({digests.get(name) for digests in each}) > 1]


def measures(result: dict[str, Any], guidance: str, rewards: dict[str, Any]) -> dict[str, np.ndarray]:
    """Name -> (N,) of each sample, NaN where the measure has no meaning for it.

    Trained rewards are weighted by mr_grpo.rewards over the parts that apply, and like the held-out one looked at in the trained tasks.

    Args:
        rewards: the result whose `rewards`, `held_out_reward` and `tasks` say what is measured.
    """
    outcomes, held_out = result["guidances"][guidance]["outcomes"], str(rewards["held_out_reward"])
    trained = [outcomes[task] for task in rewards["tasks"] if task in outcomes]
    found = {
        "trained rewards": joined([weighted(outcome, rewards["rewards"]) for outcome in trained]),
        f"held-out reward ({held_out})": joined([weighted(outcome, {held_out: 1.0}) for outcome in trained]),
        "generation, strict": strict(outcomes, "text_to_image"),
        "editing, strict": strict(outcomes, "image_edit"),
    }
    return {name: values for name, values in found.items() if not np.isnan(values).all()}


def joined(columns: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0), *columns])


def weighted(outcome: dict[str, Any], weights: dict[str, float]) -> np.ndarray:
    """(N,) mean of a task's parts, by weight over those that apply; NaN where none does."""
    parts = {name: np.array(expand(part), float) for name, part in outcome["parts"].items() if name in weights}
    total, weight = np.zeros(len(outcome["strict"])), np.zeros(len(outcome["strict"]))
    for name, values in parts.items():
        total += np.nan_to_num(values) * weights[name]
        weight += ~np.isnan(values) * weights[name]
    return np.divide(total, weight, out=np.full(len(total), np.nan), where=weight > 0)


def strict(outcomes: dict[str, Any], task: str) -> np.ndarray:
    return np.array([float(letter) for letter in outcomes[task]["strict"]] if task in outcomes else [])


def changes(start: dict[str, Any], results: Sequence[dict[str, Any]], guidance: str) -> dict[str, np.ndarray]:
    """Measure -> (seeds, samples) by how much each result lies above `start` on each sample that the measure applies to.

    Raises:
        ValueError: they were scored on other samples.
    """
    changed: dict[str, list[np.ndarray]] = {}
    for result in results:
        for task, outcome in start["guidances"][guidance]["outcomes"].items():
            if result["guidances"][guidance]["outcomes"][task]["keys"] != outcome["keys"]:
                raise ValueError(
                    f"{result['configuration']}-seed{result['seed']}: scored on other samples of {task} than {START}. Run all with the "
                    "same --samples, and --again."
                )
        before, after = (measures(one, guidance, result) for one in (start, result))
        for name in after:
            changed.setdefault(name, []).append((after[name] - before[name])[~np.isnan(before[name])])
    return {name: np.stack(rows) for name, rows in changed.items()}


def interval_of_both(change: np.ndarray) -> tuple[float, float]:
    """95% of the mean of (seeds, samples): the wider of Student's over samples, of their means over seeds, and over seeds.

    A few seeds can't tell how much of their spread is the samples', so that neither alone would do; one seed says nothing of seeds.
    """
    over_samples = interval(change.mean(0).tolist())
    over_seeds = interval(change.mean(1).tolist()) if len(change) > 1 else over_samples
    return max(over_samples, over_seeds, key=lambda ends: ends[1] - ends[0])


def side(ends: tuple[float, float]) -> str:
    low, high = ends
    return "rises" if low > 0 else "falls" if high < 0 else "undecided"


def table_over_start(experiment: ExperimentConfig, results: Results) -> str:
    """Rows of configuration, guidance and measure, beside the model that mr_grpo begins with; then the verdicts beside base."""
    if START not in results:
        raise FileNotFoundError(f"there is no result of {START} yet, which the others are compared with: run the queue first.")
    start = results[START][0]
    lines = ["| configuration | seeds | guidance | measure | start | change over start, 95% | |", "|---" * 7 + "|"]
    for configuration in experiment.configurations():
        rows = list(results.get(configuration, {}).values())
        for guidance in start["guidances"] if rows else ():
            before = measures(start, guidance, rows[0])
            for name, change in changes(start, rows, guidance).items():
                ends = interval_of_both(change)
                said = side(ends)
                if name.startswith("editing"):
                    kept = ends[0] >= -MOST_EDITING_LOST
                    said += f"; at most {MOST_EDITING_LOST} lost: {'yes' if kept else 'not shown'}"
                cells = [configuration, str(len(rows)), guidance, name, f"{np.nanmean(before[name]):.3f}", spell_both(change), said]
                lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for configuration, variant in experiment.variants.items():
        found = over_base(results, configuration, start["guidances"])
        said = verdict(variant.expected, map(interval_of_both, found.values())) if found else "not measured yet"
        shown = ", ".join(f"{name} {spell_both(change)}" for name, change in found.items()) or "nothing to compare"
        lines.append(f"- {configuration}, {variant.claim} ({variant.paper}): **{said}**. {variant.expected} than {BASE} expected; {shown}.")
    samples = " and ".join(f"{row['n']} of {task}" for task, row in next(iter(start["guidances"].values()))["evaluation"].items())
    lines += [
        "",
        f"Changes are paired by sample ({samples}); of the intervals over samples and over seeds the wider one is shown. No correction for "
        "the number of comparisons.",
    ]
    return "\n".join([*lines, *unlike(results)])


def over_base(results: Results, configuration: str, guidances: Iterable[str]) -> dict[str, np.ndarray]:
    """Of both tasks' strict scores at each guidance (seeds, samples) configuration minus base; none for fewer than two seeds of both."""
    base, other = results.get(BASE, {}), results.get(configuration, {})
    seeds = sorted(base.keys() & other.keys())
    found = {}
    for guidance in guidances if len(seeds) > 1 else ():
        for name, task in (("generation", "text_to_image"), ("editing", "image_edit")):
            after, before = (
                np.stack([strict(each[seed]["guidances"][guidance]["outcomes"], task) for seed in seeds]) for each in (other, base)
            )
            found[f"{name} at guidance {guidance}"] = after - before
    return {name: change for name, change in found.items() if change.size}


def spell_both(change: np.ndarray) -> str:
    low, high = interval_of_both(change)
    return f"{change.mean():+.3f} [{low:+.3f}, {high:+.3f}]" + (" (one seed)" if len(change) == 1 else "")


def spell(values: Sequence[float]) -> str:
    if not values:
        return "-"
    low, high = interval(values)
    return f"{mean(values):+.3f} " + (f"[{low:+.3f}, {high:+.3f}]" if len(values) > 1 else "(one seed)")


def connector_parameters(result: dict[str, Any]) -> int:
    """Of the connector with its think tokens."""
    counts = result["stages"]["alignment"]["parameters"]
    return sum(counts[part]["trained"] for part in ("connector", "think_tokens"))
