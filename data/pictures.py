"""What a person looks at: a sheet of samples, and a part's sizes, prompt lengths and reasons as histograms."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from data.loader import Sample
from data.rows import read_table
from runtime.files import read_json

SIDE = 128  # pixels of the longer side of a thumbnail


def save_samples(samples: Sequence[Sample], path: Path, columns: int = 6) -> None:
    """A sheet of samples with their prompts; edits as sources and target side by side."""
    seam = 4  # between source and target: both may be dark to the edge
    wide = max((SIDE + seam) * (1 + len(sample.references)) - seam for sample in samples)
    columns = min(columns, len(samples))
    rows = -(-len(samples) // columns)
    sheet = Image.new("RGB", (columns * (wide + 14) + 6, rows * (SIDE + 22) + 6), (245, 245, 245))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=9)
    for i, sample in enumerate(samples):
        x, y = 6 + i % columns * (wide + 14), 6 + i // columns * (SIDE + 22)
        for j, pixels in enumerate((*sample.references, sample.target)):
            if pixels.size == 0:  # a mere prompt
                continue
            image = Image.fromarray(pixels)
            scale = SIDE / max(image.size)
            sampling = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BILINEAR
            image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), sampling)
            sheet.paste(image, (x + j * (SIDE + seam), y))
        draw.text((x, y + SIDE + 2), _fitting(sample.prompt, draw, font, wide), fill=(30, 30, 30), font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.quantize(128).save(path, optimize=True)


def _fitting(prompt: str, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    line = " ".join(prompt.split())[:500]
    if draw.textlength(line, font) <= width + 10:
        return line
    return next(cut for end in range(len(line), -1, -1) if draw.textlength(cut := line[:end].rstrip() + "...", font) <= width + 10)


def save_facts(folder: Path, path: Path) -> None:
    """Sizes as found and as stored, prompt lengths, and how the records ended, of a published part."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    manifest = read_json(folder / "manifest.json")
    rows = read_table(folder / "rows.parquet", ["prompt", "images", "bucket"]).to_pylist()
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.2), layout="constrained")
    targets = [row["images"][-1] for row in rows if row["images"]]
    axes[0].scatter([image["found_width"] for image in targets], [image["found_height"] for image in targets], s=6, alpha=0.5)
    axes[0].set(title="targets as found", xlabel="width (pixels)", ylabel="height (pixels)")
    buckets = Counter(row["bucket"] for row in rows).most_common(12)
    axes[1].barh([name for name, _ in buckets], [number for _, number in buckets])
    axes[1].set(title="sizes as stored (target < references)", xlabel="samples")
    axes[2].hist([len(row["prompt"]) for row in rows], bins=30)
    axes[2].set(title="prompt length", xlabel="characters", ylabel="samples")
    ends = {"written": manifest["counts"]["written"]} | manifest["reasons"]
    axes[3].barh(list(ends), list(ends.values()))
    axes[3].set(title=f"{manifest['counts']['input']} records", xlabel="records")
    for axis in (axes[1], axes[3]):
        axis.invert_yaxis()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def save_shares(mixture: dict[str, Any], path: Path) -> None:
    """What a mixture asks for and what it draws: the tasks by its cycle, the parts of each task by its first samples."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks, realised = mixture["tasks"], mixture["realised"]
    figure, axes = plt.subplots(1, 1 + len(tasks), figsize=(4 * (1 + len(tasks)), 2.6), layout="constrained")
    axes[0].barh(list(mixture["ratio"]), list(mixture["ratio"].values()))
    axes[0].set(title=f"{mixture['stage']}: micro-batches of a cycle")
    for axis, (task, parts) in zip(axes[1:], tasks.items(), strict=True):
        total = sum(part["weight"] for part in parts)
        names = [part["part"] for part in parts]
        axis.barh(names, [part["weight"] / total for part in parts], height=0.8, alpha=0.35, label="asked for")
        axis.barh(names, [realised["parts"][task][name] / realised["samples"] for name in names], height=0.4, label="realised")
        axis.set(title=task, xlabel=f"share of {realised['samples']} samples", xlim=(0, 1.05))
    figure.legend(*axes[-1].get_legend_handles_labels(), frameon=False, loc="outside lower right", ncols=2)
    for axis in axes:
        axis.invert_yaxis()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80, metadata={"Software": None})
    plt.close(figure)
