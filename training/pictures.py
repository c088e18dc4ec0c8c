"""Pictures people look at: grids of images, and curves. PNG bytes depend on the content alone."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from runtime.files import write_atomic

CAPTION = 14
STRIP_SIDE = 192  # pixels of a picture in a strip, which goes into the report's page


def save_grid(rows: Sequence[Sequence[np.ndarray]], path: Path, captions: Sequence[Sequence[str]] | None = None, scale: int = 1) -> None:
    """One PNG of `rows` of uint8 (H, W, 3) images, each with a line of text under it where captions are given."""
    height, width = rows[0][0].shape[0] * scale, rows[0][0].shape[1] * scale
    tall = height + (CAPTION if captions else 0)
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (columns * (width + 4) + 4, len(rows) * (tall + 4) + 4), (245, 245, 245))
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=9)
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            place = (4 + c * (width + 4), 4 + r * (tall + 4))
            sheet.paste(ImageOps.contain(Image.fromarray(image), (width, height), Image.Resampling.NEAREST), place)
            if captions:
                draw.text((place[0] + 1, place[1] + height + 1), fitted(captions[r][c], width, font), fill=(30, 30, 30), font=font)
    file = io.BytesIO()
    sheet.quantize(128).save(file, format="png", optimize=True)
    write_atomic(path, file.getvalue())  # a board is looked at while the stage runs


def edit_row(references: Sequence[np.ndarray], image: np.ndarray, target: np.ndarray) -> list[np.ndarray]:
    """What a grid shows of a sample: the image made, and of an edit its sources before and its target after."""
    return [*references, image, target] if references else [image]


def edit_captions(prompt: str, references: int, result: str = "result") -> list[str]:
    """A line under each of `edit_row`."""
    return [prompt, *["second"] * (references - 1), result, "target"] if references else [prompt]


def fitted(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """`text`, cut with two dots where it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "..") > width:
        text = text[:-1]
    return text + ".."


def save_curves(history: Sequence[dict[str, float]], names: Sequence[str], path: Path, title: str) -> None:
    """Each named series of `history` over its `step`, in one figure."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    draw_curves(axes, history, names, title)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def save_scores(metrics: dict[str, Any], floors: dict[str, float], path: Path) -> None:
    """A panel a task: the share that is strictly right, of all and by kind, with 95% intervals; a line where the task's floor is."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(metrics), figsize=(5.2 * len(metrics), 3.4), layout="constrained", squeeze=False)
    for axes, (task, row) in zip(panels[0], metrics.items(), strict=True):
        shares = {"all": row} | row["kinds"]
        heights = [one["strict"] for one in shares.values()]
        spans = [
            [height - one["interval_95"][0], one["interval_95"][1] - height] for height, one in zip(heights, shares.values(), strict=True)
        ]
        axes.bar(list(shares), heights, yerr=np.clip(np.transpose(spans), 0, None), color=["#4f7fd9"] + ["#9db2d9"] * len(row["kinds"]))
        if task in floors:
            axes.axhline(floors[task], color="#c8574b", linestyle="--", label=f"floor {floors[task]:g} for all")
            axes.legend(frameon=False)
        axes.set(title=f"{task}, n {row['n']}", ylabel="strictly right", ylim=(0, 1.02))
        axes.tick_params(axis="x", rotation=45)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)


def draw_curves(axes: Any, history: Sequence[dict[str, float]], names: Sequence[str], title: str) -> None:
    """Each named series smoothed, and as it is behind that."""
    for name in names:
        points = [(row["step"], row[name]) for row in history if row.get(name) is not None]
        if points:
            steps, values = zip(*points, strict=True)
            (line,) = axes.plot(steps, _smooth(values), label=name)
            axes.plot(steps, values, alpha=0.2, color=line.get_color())
    axes.set(xlabel="optimizer step", title=title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average without the start's bias."""
    smooth, average = [], 0.0
    for i, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * value
        smooth.append(average / (1 - weight**i))
    return smooth


@dataclass(frozen=True)
class Shown:
    """A picture uint8 (H, W, 3) and what a reward says of it."""

    reward: str
    prompt: str
    value: float
    image: np.ndarray


def save_strips(shown: Sequence[Shown], path: Path) -> None:
    """The best picture of each reward, and below it the worst: `shown` has them in pairs."""
    rows = [shown[::2], shown[1::2]]
    captions = [[f"{row.value:.2f} {row.reward}: {row.prompt}" for row in strip] for strip in rows]
    images = [[_reduced(row.image) for row in strip] for strip in rows]
    save_grid(images, path, captions, scale=max(1, 128 // shown[0].image.shape[1]))


def _reduced(image: np.ndarray) -> np.ndarray:
    small = Image.fromarray(image)
    small.thumbnail((STRIP_SIDE, STRIP_SIDE))
    return np.asarray(small)
