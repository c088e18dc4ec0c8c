"""Optional: the named parts' images as the frozen autoencoder and vision tower make of them, so that alignment and SFT skip both."""

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from data.latents import FORMAT, Latents, check_latents, latent_members, parse_latents
from data.loader import Part, Sample
from data.pictures import save_samples
from data.shards import finished_shard, index_of, save_index, write_shard
from model.vae import AnyAutoencoder, posterior_of, to_uint8
from model.vlm import encode_references
from model.weights import WeightsMismatch, load_vae, load_vlm
from runtime.exits import Interrupted
from runtime.files import read_json, sha256_file, sha256_json, tensors_digest, write_json
from runtime.progress import Progress
from runtime.stage import StageRun
from training.batching import one_size_batches, reference_pixels, stack_pixels
from training.config import LatentsConfig
from training.launch import build_accelerator

SHOWN = 12  # samples of a part in its picture
VISION_TOWER = "visual."  # in the names of its tensors among the VLM's


def run_latents(run: StageRun) -> None:
    """Write `outputs/latents/<part>/` for the parts of `latents.parts`; shards finished by an interrupted run are kept, and parts that are
    published already, of the same images, autoencoder and settings, are taken over.

    Ranks take turns at the shards. Equal images, autoencoder and settings give equal bytes on one kind of machine.
    """
    config = run.params.latents
    accelerator = build_accelerator(run.params.launch)
    source = run.root / "outputs" / "foundation" / "model" / "vae"
    vae = load_vae(source, torch.float32).to(accelerator.device).eval()
    plan = {"format": FORMAT, "vae": tensors_digest(source)} | config.model_dump(mode="json", exclude={"parts"})
    vlm = None
    if config.vision and config.parts:
        vlm = load_vlm(source.with_name("vlm"), torch.float32).to(accelerator.device).eval()
        plan["vision_tower"] = tensors_digest(source.with_name("vlm"), VISION_TOWER)
    parts = {name: Part(run.root / "outputs" / "shards" / name) for name in config.parts}
    for name, part in parts.items():
        if not published(run.out / name, part, plan):
            encode_part(run, part, run.folder / "latents" / name, vae, plan, accelerator, vlm)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        publish_latents(run, parts, vae, plan)
    accelerator.wait_for_everyone()


def published(folder: Path, part: Part, plan: dict[str, Any]) -> bool:
    """Whether `folder` holds the latents of just this part by just this plan."""
    if not (folder / "manifest.json").is_file():
        return False
    manifest = read_json(folder / "manifest.json")
    return all(manifest.get(key) == value for key, value in (plan | {"dataset_id": part.manifest["dataset_id"]}).items())


def refuse_other_encoders(latents: Path, model: Path) -> None:
    """Raises WeightsMismatch unless all latents in a folder are of the autoencoder, and what a vision tower saw is of the tower, in the
    model folder `model`: those that another model brought may differ."""
    parts = {manifest.parent: read_json(manifest) for manifest in sorted(latents.glob("*/manifest.json"))}
    for kind, folder, names in (("vae", "vae", ""), ("vision_tower", "vlm", VISION_TOWER)):
        made = {part: manifest[kind] for part, manifest in parts.items() if kind in manifest}
        ours = tensors_digest(model / folder, names) if made else ""
        for part, theirs in made.items():
            if theirs != ours:
                raise WeightsMismatch(
                    f"{part}: made by {kind} {theirs[:12]}, that of {model} is {ours[:12]}. Set latents.parts to [], or `sft.start` to "
                    "alignment, or train with the foundation that the model came from."
                )


def encode_part(
    run: StageRun, part: Part, folder: Path, vae: AnyAutoencoder, plan: dict[str, Any], accelerator: Accelerator, vlm: Any = None
) -> None:
    """This rank's shards of a part, each with its receipt; with a VLM, what its vision tower makes of references too.

    Raises:
        Interrupted: asked to stop; what is whole stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = list(enumerate(part.manifest["shards"]))[accelerator.process_index :: accelerator.num_processes]
    total, name = sum(shard["samples"] for _, shard in shards), part.folder.name
    log = run.folder / "progress.jsonl" if accelerator.is_main_process else None
    with Progress(total, "sample", f"latents {name}", log) as progress:
        for number, shard in shards:
            if run.stop:
                raise Interrupted(f"stopped between shards of {name}; those that are done are kept, the same command goes on")
            digest = shard_plan(plan, shard)
            if finished_shard(folder, shard["name"], digest) is None:
                rows = np.flatnonzero(part.index["shard"] == number).tolist()
                encoded = encode(vae, vlm, (part[row] for row in rows), run.params.latents)
                samples = (latent_members(sample.key, latents) for sample, latents in encoded)
                write_shard(folder, shard["name"], digest, samples, check_latents)
            progress.update(shard["samples"])


def shard_plan(plan: dict[str, Any], shard: dict[str, Any]) -> str:
    """What a tar of latents depends on: the tar of images, the autoencoder, the settings."""
    return sha256_json(plan | {"shard": shard["sha256"]})


@torch.no_grad()
def encode(vae: AnyAutoencoder, vlm: Any, samples: Iterator[Sample], config: LatentsConfig) -> Iterator[tuple[Sample, Latents]]:
    """Each sample with its latents, in order."""

    def stored(latents: Tensor) -> np.ndarray:
        return latents.cpu().numpy().astype(config.precision)

    for batch in one_size_batches(samples, config.batch_size):
        mean, std = (stored(latents) for latents in posterior_of(vae, stack_pixels([sample.target for sample in batch], vae.device)))
        pixels = reference_pixels(batch, vae.device)
        references = [stored(posterior_of(vae, images)[0]) for images in pixels]
        vision = [] if vlm is None else [stored(torch.stack(encode_references(vlm, list(images)))) for images in pixels]
        for i, sample in enumerate(batch):
            yield sample, Latents(mean[i], std[i], tuple(means[i] for means in references), tuple(tokens[i] for tokens in vision))


def publish_latents(run: StageRun, parts: dict[str, Part], vae: AnyAutoencoder, plan: dict[str, Any]) -> None:
    """Every part's tars, index and manifest, swapped in as one folder; pictures of what the latents keep."""
    out = run.folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    size, pictures = 0, {}
    for name, part in parts.items():
        if published(run.out / name, part, plan):
            shutil.copytree(run.out / name, out / name, copy_function=os.link)
        else:
            assemble(run.folder / "latents" / name, part, plan, out / name)
        latents = Part(out / name, "latents")
        size += sum(shard["bytes"] for shard in latents.manifest["shards"])
        pictures[name] = run.folder / f"{name}.png"
        draw_kept(part, latents, vae, pictures[name])
    write_json(out / "parts.json", sorted(parts))
    run.publish(out)
    shutil.rmtree(run.folder / "latents", ignore_errors=True)
    images = sum(shard["bytes"] for part in parts.values() for shard in part.manifest["shards"])
    run.report({"samples": sum(map(len, parts.values())), "bytes": size, "bytes of the images": images}, pictures)


def assemble(folder: Path, part: Part, plan: dict[str, Any], out: Path) -> None:
    """The tars that all ranks wrote into `folder`, with their index and manifest.

    Raises:
        FileNotFoundError: a tar is not finished.
    """
    out.mkdir()
    receipts = []
    for shard in part.manifest["shards"]:
        receipt = finished_shard(folder, shard["name"], shard_plan(plan, shard))
        if receipt is None:
            raise FileNotFoundError(f"{folder / shard['name']}: its rank did not finish it. Run the same command again; it goes on.")
        receipts.append(receipt)
        (out / receipt.name).hardlink_to(folder / receipt.name)
    save_index(out / "index.npy", index_of(receipts))
    tars = [{key: value for key, value in asdict(receipt).items() if key not in ("plan", "spans")} for receipt in receipts]
    facts = {"part": part.folder.name, "dataset_id": part.manifest["dataset_id"], "samples": len(part), "shards": tars}
    write_json(out / "manifest.json", plan | facts | {"files": {"index.npy": sha256_file(out / "index.npy")}})


@torch.no_grad()
def draw_kept(part: Part, latents: Part, vae: AnyAutoencoder, path: Path) -> None:
    """Targets as they are, each beside what the decoder makes of its latents."""
    shown: Sequence[Sample] = [part[row] for row in range(min(SHOWN, len(part)))]
    pairs = []
    for row, sample in enumerate(shown):
        mean = torch.from_numpy(parse_latents(latents.content(row), f"{latents.folder.name} row {row}", sample.key).mean)
        decoded = to_uint8(vae.decode(mean[None].float().to(vae.device), return_dict=False)[0])[0].cpu().numpy()
        pairs.append(replace(sample, references=(sample.target,), target=decoded))
    save_samples(pairs, path)
