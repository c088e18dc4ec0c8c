"""What `training/report.py` counted, as pictures and as one HTML page that needs no other file."""

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from PIL import Image

from runtime.environment import git_state
from runtime.files import read_json, sha256_file, write_atomic
from runtime.params import STAGES
from training.batching import batched
from training.evaluate import spell_marks
from training.pictures import draw_curves, save_grid

TITLES = {"text_to_image": "generation", "image_edit": "editing"}
ALL, NO_WORDS = "all", "without words"
FOUNDATION = "foundation"  # scored by --full alone
SIDE = 128  # pixels to which larger images are reduced
LOSSES = ("loss", "loss_text_to_image", "loss_image_edit", "held_out/text_to_image", "held_out/image_edit")
Named = Mapping[str, Any]


def save_pictures(root: Path, figures: Named, scores: Named, folder: Path) -> list[str]:
    """accuracy.png, curves.png and a grid a task, in `folder`; their names, the grids first."""
    names = save_grids(shown_samples(_stage_folders(root), scores), "stages", folder)
    (folder / "accuracy.png").write_bytes(accuracy_plot(figures["accuracy"], STAGES))
    (folder / "curves.png").write_bytes(curves_plot(root))
    return [*names, "accuracy.png", "curves.png"]


def _stage_folders(root: Path) -> dict[str, Path]:
    return {stage: root / "outputs" / "evaluation" / stage for stage in STAGES}


def save_grids(samples: Mapping[str, Sequence[Named]], name: str, folder: Path) -> list[str]:
    """`NAME_TASK.png` of the samples of each task, in `folder`; the names."""
    names = []
    for task, shown in samples.items():
        rows, captions = [], []
        for group in batched(shown, 2 if task == "image_edit" else 4):
            rows.append([image for row in group for image in row["images"]])
            captions.append([text for row in group for text in _captions(row)])
        names.append(f"{name}_{task}.png")
        save_grid(rows, folder / names[-1], captions, scale=max(1, SIDE // max(rows[0][0].shape[:2])))
    return names


def _captions(row: Named) -> list[str]:
    texts = [text if right is None else f"{'+' if right else '-'} {text}" for text, right in zip(row["names"], row["right"], strict=True)]
    mark = "" if row["right"][0] is None else texts[0][:2]
    return [mark + row["prompt"], *texts[1:]]


def shown_samples(evaluations: Mapping[str, Path], scores: Named) -> dict[str, list[dict[str, Any]]]:
    """Task -> the samples whose pictures were kept: prompt, images, their names, whether each is right (None: given).

    Args:
        evaluations: name -> folder of an evaluation; all of them of the same set.
        scores: name -> task -> its rows of samples.json.
    """
    names = list(evaluations)
    folders = [evaluations[name] / "images" for name in names]
    shown: dict[str, list[dict[str, Any]]] = {}
    for task in scores[names[-1]]:
        for rows in zip(*(scores[name][task] for name in names), strict=True):
            key = rows[0]["key"]
            if not (folders[0] / f"{key}.png").is_file():
                continue
            sources = sorted(folders[0].glob(f"{key}.source-*.png"))
            targets = [folders[0] / f"{key}.target.png"] if sources else []
            files = [*sources, *(folder / f"{key}.png" for folder in folders), *targets]
            shown.setdefault(task, []).append(
                {
                    "prompt": rows[0]["prompt"],
                    "images": [thumbnail(file) for file in files],
                    "names": ["before"] * len(sources) + names + ["target"] * len(targets),
                    "right": [None] * len(sources) + [row["strict"] for row in rows] + [None] * len(targets),
                }
            )
    return shown


def thumbnail(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        small = image.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    return np.asarray(small)


# ---------------------------------------------------------------- plots


COLORS = ("#9db2d9", "#4f7fd9", "#e08b3e", "#3fa37c", "#b565c4", "#c8574b", "#8a8f98")  # the first ones for the stages, in their order


@contextmanager
def drawing(rows: int, columns: int, height: float, dark: bool) -> Iterator[tuple[Any, Any]]:
    """A figure and its axes (rows, columns), each row `height` inches high, in the colours of the page."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ink, back = ("#c9ced8", "#1c2027") if dark else ("#33383f", "#ffffff")
    look: Any = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "axes.titlesize": 10}
    look |= dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), ink)
    look |= {"figure.facecolor": back, "axes.facecolor": back, "axes.prop_cycle": plt.cycler(color=COLORS)}
    with plt.rc_context(look):
        figure, axes = plt.subplots(rows, columns, figsize=(10.4, height * rows), layout="constrained", squeeze=False)
        yield figure, axes
        plt.close(figure)


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, dpi=100, format="png")
    with Image.open(file) as image:
        return _encoded(image.convert("RGB"))


def accuracy_plot(accuracy: Named, names: Sequence[str], dark: bool = False) -> bytes:
    """A bar a category and each of `names`, which were scored on the same samples, with its 95% interval; a panel a task."""
    last = accuracy[names[-1]]
    width = 0.8 / len(names)
    with drawing(len(last), 1, 2.7, dark) as (figure, axes):
        for axis, (task, named) in zip(axes[:, 0], last.items(), strict=True):
            for i, scored in enumerate(names):
                rows = [accuracy[scored][task][name] for name in named]
                places = np.arange(len(rows)) + (i - (len(names) - 1) / 2) * width
                heights = np.array([row["strict"] for row in rows])
                low, high = np.array([row["interval_95"] for row in rows]).T
                around = [np.maximum(heights - low, 0), np.maximum(high - heights, 0)]  # rounded, 0 or 1 may lie a hair outside
                axis.bar(places, heights, width * 0.92, label=scored)
                axis.errorbar(places, heights, around, fmt="none", ecolor=axis.xaxis.label.get_color(), elinewidth=1, capsize=2)
            axis.set_xticks(range(len(named)), [f"{name}\nn {row['n']}" for name, row in named.items()])
            axis.set(ylim=(0, 1), title=TITLES[task])
            axis.grid(axis="y", alpha=0.25)
        figure.legend(*axes[0, 0].get_legend_handles_labels(), frameon=False, ncols=len(names), loc="outside upper right")
        return _png(figure)


def curves_plot(root: Path, dark: bool = False) -> bytes:
    """A panel of losses a stage; of a stage that has rewards, one of their mean and one of their parts."""
    panels: list[tuple[str, Sequence[dict[str, float]], list[str]]] = []
    for stage in STAGES:
        history = read_json(root / "outputs" / stage / "history.json")
        names = sorted({name for row in history for name in row})
        if "reward" in names:
            panels.append((f"{stage}: reward", history, [name for name in ("reward", "held_out_reward") if name in names]))
            panels.append((f"{stage}: its parts", history, [name for name in names if name.startswith("reward_")]))
        else:
            panels.append((f"{stage}: loss", history, [name for name in LOSSES if name in names]))
    with drawing((len(panels) + 1) // 2, 2, 3.1, dark) as (figure, axes):
        for axis in axes.flat[len(panels) :]:
            axis.set_axis_off()
        for axis, (title, history, names) in zip(axes.flat, panels, strict=False):
            draw_curves(axis, history, names, title)
            axis.legend(frameon=False, fontsize=7)
        return _png(figure)


# ---------------------------------------------------------------- HTML


def write_page(root: Path, path: Path, figures: Named, runs: Named, scores: Named, folder: Path) -> None:
    """The page at `path`. Pictures, those in `folder` too, are in it, so that it can be mailed, attached and opened offline."""
    n = {TITLES[task]: named[ALL]["n"] for task, named in figures["accuracy"][STAGES[-1]].items()}
    texts = {
        "title": f"DeepGen, preset {escape(figures['preset'])}",
        "lead": f"What the model draws and edits after {_join(STAGES)}, counted by a verifier that reads each image back.",
        "facts": _facts(root, figures, runs, n),
        "heads": "".join(_heads(figures)),
        "falls": _falls(figures),
        "accuracy": "".join(_accuracy(figures)),
        "parts": "".join(_parts(figures)),
        "accuracy_plot": _both(
            folder / "accuracy.png", accuracy_plot(figures["accuracy"], STAGES, dark=True), "accuracy by category and stage"
        ),
        "strips": "".join(_strips(root)),
        "curves_plot": _both(folder / "curves.png", curves_plot(root, dark=True), "losses and rewards over steps"),
        "samples": "".join(_samples(shown_samples(_stage_folders(root), scores))),
        "behind": _behind(runs),
        "runs": "".join(_runs(runs)),
        "digests": "".join(_digests(figures)),
    }
    write_atomic(path, Template((Path(__file__).with_name("page.html")).read_text()).substitute(texts))


def _join(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1]))) if words else ""


def _pairs(rows: Mapping[str, str]) -> str:
    return "".join(f"<dt>{escape(name)}</dt><dd>{value}</dd>" for name, value in rows.items())


def _facts(root: Path, figures: Named, runs: Named, n: Mapping[str, int]) -> str:
    here = git_state(root)
    sampling = figures["sampling"]
    commits = sorted({_commit(row["commit"], row["dirty"]) for row in runs.values()})
    ends = sorted(row["ended"] for row in runs.values())
    gates = {stage: read_json(folder / "gates.json") for stage, folder in _stage_folders(root).items()}
    marks = {stage: spell_marks(row["contamination"]) for stage, row in gates.items() if row.get("contamination")}
    return _pairs(
        {f"{stage} is not held out": escape(words) for stage, words in marks.items()}
        | {
            "preset": escape(figures["preset"]),
            "params.yaml": f"<code>{sha256_file(root / 'params.yaml')[:12]}</code>",
            "runs": f"{ends[0]} to {ends[-1]}, at commit {_join(commits)}" if ends else "not made in this clone",
            "page": f"at commit {_commit(here['git_commit'], here['git_dirty'])}",
            "samples": ", ".join(f"{name} {count}" for name, count in n.items())
            + f"; {sampling['steps']} sampling steps, guidance {sampling['guidance']:g}",
            "evaluation set": ", ".join(
                f"{escape(part)} <code>{digest[:12]}</code>" for part, digest in figures["datasets"]["evaluation"].items()
            ),
        }
    )


def _commit(commit: str, dirty: str) -> str:
    return f"<code>{commit[:12]}</code>" + (" with uncommitted changes" if dirty == "true" else "")


def columns(figures: Named) -> list[str]:
    """What was scored, in order: the foundation where it was, and every stage."""
    return [name for name in (FOUNDATION, *STAGES) if name in figures["accuracy"]]


def headlines(figures: Named, stage: str) -> dict[str, Any]:
    """The figures that a stage is first judged by: generation without words, generation, editing."""
    named: dict[str, Any] = {}
    for task, title in TITLES.items():
        found = figures["accuracy"][stage].get(task, {})
        named |= {f"{title} {name}".removesuffix(f" {ALL}"): found[name] for name in (NO_WORDS, ALL) if name in found}
    return named


def _heads(figures: Named) -> Iterator[str]:
    by_stage = {stage: headlines(figures, stage) for stage in STAGES}
    for title, row in by_stage[STAGES[-1]].items():
        low, high = row["interval_95"]
        way = " → ".join(f"{by_stage[stage][title]['strict']:.3f}" for stage in STAGES)
        yield (
            f'<div class="card">{title}<b>{row["strict"]:.3f}</b><small>95% [{low:.3f}, {high:.3f}], n {row["n"]}<br>'
            f"{way}<br>after {_join(STAGES)}</small></div>"
        )


def _falls(figures: Named) -> str:
    lines = [
        f"<li>▼ {TITLES[task]}: {escape(name)} fell by {-row['difference']:.3f} from {pair['before']} to {pair['after']}</li>"
        for pair in figures["paired"]
        for task, named in pair["tasks"].items()
        for name, row in named.items()
        if row["falls"]
    ]
    return f'<ul class="falls">{"".join(lines)}</ul>' if lines else '<p class="good">No category fell by more than two standard errors.</p>'


def _accuracy(figures: Named) -> Iterator[str]:
    yield "<thead><tr><th></th><th>n</th>" + "".join(f"<th>{name}</th>" for name in columns(figures))
    yield "".join(f"<th>{pair['before']} → {pair['after']}</th>" for pair in figures["paired"]) + "</tr></thead>"
    for task, named in figures["accuracy"][STAGES[-1]].items():
        for name, last in named.items():
            title = TITLES[task]
            yield f'<tr class="sum"><td>{title}</td>' if name == ALL else f"<tr><td>{title}: {escape(name)}</td>"
            yield f"<td>{last['n']}</td>"
            for column in columns(figures):
                row = figures["accuracy"][column][task][name]
                low, high = row["interval_95"]
                yield f'<td class="bar" style="--part: {row["strict"]:.1%}">{row["strict"]:.3f} <small>[{low:.3f}, {high:.3f}]</small></td>'
            for pair in figures["paired"]:
                yield _moved(pair["tasks"][task][name])
            yield "</tr>"


def _moved(row: Named) -> str:
    surely = abs(row["difference"]) > 2 * row["standard_error"]
    kind = "falls" if row["falls"] else "good" if surely else ""
    mark = "▼ " if row["falls"] else ""
    return (
        f'<td class="{kind}" title="{row["gained"]} gained, {row["lost"]} lost">{mark}{row["difference"]:+.3f}'
        f" <small>± {row['standard_error']:.3f}</small></td>"
    )


def _parts(figures: Named) -> Iterator[str]:
    yield "<thead><tr><th></th>" + "".join(f"<th>{stage}</th>" for stage in STAGES) + "</tr></thead>"
    for task, named in figures["parts"][STAGES[-1]].items():
        for name in named:
            yield f"<tr><td>{TITLES[task]}: {escape(name)}</td>"
            for stage in STAGES:
                value = figures["parts"][stage][task][name]
                yield f'<td class="bar" style="--part: {value:.1%}">{value:.3f}</td>'
            yield "</tr>"


def _samples(shown: Mapping[str, Sequence[Named]]) -> Iterator[str]:
    for task, samples in shown.items():
        least = 500 if task == "image_edit" else 320
        yield f'<h3>{TITLES[task]}</h3><div class="samples" style="--least: min({least}px, 100%)">'
        for sample in samples:
            yield f'<div class="card sample">{escape(sample["prompt"])}<div>'
            for image, name, right in zip(sample["images"], sample["names"], sample["right"], strict=True):
                kind, mark = {None: ("", ""), True: ("right", "✓ "), False: ("wrong", "✗ ")}[right]
                yield f'<figure class="{kind}"><img alt="{name}" src="{_uri(_encoded(Image.fromarray(image)))}">'
                yield f"<figcaption>{mark}{name}</figcaption></figure>"
            yield "</div></div>"
        yield "</div>"


def _strips(root: Path) -> Iterator[str]:
    pictures = sorted((root / "outputs" / STAGES[-1] / "strips").glob("*.png"))
    if pictures:
        yield "<h2>What the rewards tell apart</h2>"
        yield "<p>Of some updates, for each reward, the picture that it liked best of the group that it told apart most, and below it the "
        yield "one of the same prompt that it liked least. A reward that is being fooled shows here first.</p>"
    for picture in pictures:
        with Image.open(picture) as image:
            source = _uri(_encoded(image.convert("RGB")))
        yield f'<div class="card" style="margin-top: 14px"><h3>{escape(picture.stem.replace("-", " "))}</h3>'
        yield f'<img class="plot" style="width: auto; max-width: 100%" alt="best and worst, {escape(picture.stem)}" src="{source}"></div>'


def _encoded(image: Image.Image) -> bytes:
    """A PNG of 256 colours: a fraction of the bytes, and Dagster shows no large ones."""
    file = io.BytesIO()
    image.quantize(256).save(file, "png", optimize=True)
    return file.getvalue()


def _uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _both(light: Path, dark: bytes, alt: str) -> str:
    """One picture for either colour scheme."""
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{_uri(dark)}">'
        f'<img class="plot" alt="{alt}" src="{_uri(light.read_bytes())}"></picture>'
    )


def _behind(runs: Named) -> str:
    if len(runs) == 2 * len(STAGES):
        return "Who made what is shown here, by the run folders of this clone."
    return "Runs of this clone that ended with the weights shown here; what is missing came from DVC's cache or was removed."


def _runs(runs: Named) -> Iterator[str]:
    yield "<thead><tr><th>stage</th><th>commit</th><th>params</th><th>began</th><th>ended</th></tr></thead>"
    for name, row in runs.items():
        yield f"<tr><td>{name}<br><small>{row['folder']}</small></td>"
        yield f'<td class="wraps">{_commit(row["commit"], row["dirty"])}</td>'
        yield f"<td><code>{row['params_digest'][:12]}</code></td><td>{row['began']}</td><td>{row['ended']}</td></tr>"


def _digests(figures: Named) -> Iterator[str]:
    for stage, digest in figures["models"].items():
        yield _pairs({f"weights after {stage}": f"<code>{digest}</code>"})
    for stage, parts in figures["datasets"].items():
        yield _pairs({f"{stage} reads {part}": f"<code>{digest}</code>" for part, digest in parts.items()})
