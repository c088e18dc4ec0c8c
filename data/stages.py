"""The stage commands of this room: build a part's shards, resolve a stage's mixture."""

import os
import shutil
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from data.loader import Sample, read_part
from data.mixture import cycle, resolve_mixture
from data.shards import build_part, plan_part, verify_part
from runtime.exits import Interrupted
from runtime.files import write_json
from runtime.progress import Progress
from runtime.stage import StageRun


def run_shards(run: StageRun) -> None:
    """Build `outputs/shards/<part>/`; shards finished by an interrupted build are kept."""
    name = run.stage.key or ""
    data = run.params.data
    if data.store is not None:
        raise FileNotFoundError(f"data.store: {data.store!r}, but publishing shards to a store is not built yet; set it to null.")
    part, folder = data.parts[name], run.folder / "shards"
    plans = plan_part(name, part, data.shard_samples)
    workers = max(1, min(len(os.sched_getaffinity(0)), len(plans) // 4))  # a worker costs seconds to start
    with Progress(plans[-1].stop, "sample", f"shards {name}", run.folder / "progress.jsonl") as progress:
        manifest = build_part(name, part, data.shard_samples, folder, workers, progress.update, lambda: bool(run.stop))
    if manifest is None:
        raise Interrupted(f"stopped between shards; what is done is in {folder.relative_to(run.root)}, and the same command goes on")
    out = run.folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    for file in ["manifest.json", "index.npy", *(shard["name"] for shard in manifest["shards"])]:
        os.link(folder / file, out / file)
    run.publish(out)
    shutil.rmtree(folder)
    save_samples(list(read_part(run.out, 24)), run.folder / "samples.png")
    size = sum(shard["bytes"] for shard in manifest["shards"])
    shown = {"samples": manifest["samples"], "shards": len(manifest["shards"]), "bytes": size, "dataset_id": manifest["dataset_id"]}
    run.report(shown | manifest["counts"], {"a look inside": run.folder / "samples.png"})


def run_mixture(run: StageRun) -> None:
    """Write `outputs/mixture/<stage>.json`, after checking every part it reads."""
    stage = run.stage.key or ""
    shards = run.root / "outputs" / "shards"
    config = run.params.mixture[stage]  # type: ignore[index]
    for name, weight in config.parts.items():
        if weight > 0:
            verify_part(shards / name)
    mixture = resolve_mixture(stage, config, shards)
    write_json(run.folder / "mixture.json", mixture)
    run.publish(run.folder / "mixture.json")
    samples = {f"{task} samples": sum(part["samples"] for part in parts) for task, parts in mixture["tasks"].items()}
    run.report({"mixture_hash": mixture["mixture_hash"], "cycle": ", ".join(cycle(mixture))} | samples)


def save_samples(samples: list[Sample], path: Path, columns: int = 6, scale: int = 2) -> None:
    """A sheet of samples with their prompts; edits as source and target side by side."""
    side = samples[0].target.shape[0] * scale
    seam = 4  # between source and target: both are dark to the edge
    wide = (side + seam) * (1 + len(samples[0].references)) - seam
    rows = -(-len(samples) // columns)
    sheet = Image.new("RGB", (columns * (wide + 14) + 6, rows * (side + 22) + 6), (245, 245, 245))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=9)
    for i, sample in enumerate(samples):
        x, y = 6 + i % columns * (wide + 14), 6 + i // columns * (side + 22)
        for j, image in enumerate((*sample.references, sample.target)):
            sheet.paste(Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST), (x + j * (side + seam), y))
        draw.text((x, y + side + 2), sample.prompt, fill=(30, 30, 30), font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.quantize(128).save(path, optimize=True)
