"""The release: the final model folder with a card and its provenance, loaded once in a fresh process with the network off."""

import shutil
import subprocess
import sys
from pathlib import Path

from runtime.fetched import foundation_wants
from runtime.files import read_json, sha256_file, tensors_digest, write_atomic, write_json
from runtime.stage import StageRun
from training.evaluate import spell_marks

SEED = 7
FRESH = """
import socket, sys
from pathlib import Path
def refuse(*a, **k): raise OSError("the export tried to reach the network")
socket.socket.connect = refuse
import numpy as np, torch
from PIL import Image
from model.pipeline import DeepGenPipeline
torch.set_num_threads(int(sys.argv[4]))
pipeline = DeepGenPipeline.from_pretrained(sys.argv[1])
seed = int(sys.argv[5])
made = pipeline("a red circle", num_inference_steps=int(sys.argv[3]), guidance_scale=1.0, seed=seed, height=64, width=64).images[0]
made.save(sys.argv[2])
"""


class ExportDiffers(Exception):
    """The exported folder does not give the image that the training code gives for the same seed."""


def run_export(run: StageRun) -> None:
    """Write `outputs/exports/diffusers/`.

    Raises:
        ExportDiffers: for the same seed, the fresh process made another image than the training code.
    """
    source = run.root / "outputs" / "mr_grpo" / "model"
    folder = run.folder / "out"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    scores = read_json(run.root / "outputs" / "evaluation" / "mr_grpo" / "metrics.json")
    digest = tensors_digest(folder)
    gates = read_json(run.root / "outputs" / "evaluation" / "mr_grpo" / "gates.json")
    facts = {
        "model_digest": digest,
        "preset": run.params.preset,
        "digests": run.digests,
        "parents": {stage: tensors_digest(run.root / "outputs" / stage / "model") for stage in ("mr_grpo",)},
        "evaluation": {task: {"strict": row["strict"], "n": row["n"]} for task, row in scores.items()},
        "contamination": gates.get("contamination", {}),
        "licences": sorted({part.licence for part in run.params.data.parts.values()}),
        "upstream": carry_licences(run, folder),
    }
    write_json(folder / "provenance.json", facts)
    write_atomic(folder / "README.md", card(facts))
    difference = prove(run, folder)
    proof = {"model_digest": digest, "network": "off", "process": "fresh", "seed": SEED, "largest_pixel_difference": difference}
    write_json(folder / "proof.json", proof)
    files = {str(file.relative_to(folder)): sha256_file(file) for file in sorted(folder.rglob("*")) if file.is_file()}
    write_json(folder / "files.json", files)
    run.publish(folder)
    run.report(
        {"model_digest": digest, "files": len(files), "largest pixel difference": difference}, {"same seed": run.folder / "fresh.png"}
    )


def carry_licences(run: StageRun, folder: Path) -> list[dict[str, str | None]]:
    """What others published and this model grew from, with its licence; their licence files are copied to `licences/`."""
    config = run.params.foundation
    wants = foundation_wants(config)
    folders = {wanted.name: run.root / wanted.folder for wanted in wants}
    if config.source == "folder":
        folders["foundation"] = run.root / config.path
    for name, source in folders.items():
        for file in [*source.glob("LICEN[SC]E*"), *source.glob("NOTICE*")]:
            (folder / "licences" / name).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / "licences" / name / file.name)
    return [{"name": wanted.name, "repo": wanted.repo, "revision": wanted.revision, "licence": wanted.licence} for wanted in wants]


def prove(run: StageRun, folder: Path) -> int:
    """Make one image in a fresh process from the folder and one by the training code; the largest difference in a pixel (of 255)."""
    import numpy as np
    import torch
    from PIL import Image

    from model.generate import generate
    from model.vae import to_uint8
    from model.weights import load_model

    steps, threads = run.params.evaluation.sampling_steps, run.params.launch.threads
    picture = run.folder / "fresh.png"
    command = [sys.executable, "-c", FRESH, str(folder), str(picture), str(steps), str(threads), str(SEED)]
    subprocess.run(command, check=True, cwd=run.root)
    torch.set_num_threads(threads)
    model = load_model(run.root / "outputs" / "mr_grpo" / "model").eval()
    ours = to_uint8(generate(model, ["a red circle"], [SEED], (64, 64), (), steps, 1.0))[0].numpy()
    difference = int(np.abs(ours.astype(int) - np.asarray(Image.open(picture)).astype(int)).max())
    if difference > 0:
        raise ExportDiffers(f"{folder}: the fresh process's image differs by up to {difference} of 255 for the same seed; expected none.")
    return difference


def card(facts: dict) -> str:
    """README of the export."""
    scores = "\n".join(f"| {task} | {row['strict']:.3f} | {row['n']} |" for task, row in facts["evaluation"].items())
    return f"""---
library_name: deepgen
license: apache-2.0
---
# DeepGen, preset `{facts["preset"]}`

Generates images from text and edits images by instruction. Weights `{facts["model_digest"][:16]}`.

```python
from model.pipeline import DeepGenPipeline
pipe = DeepGenPipeline.from_pretrained("this folder")
pipe("a red circle left of a blue square", num_inference_steps=12, guidance_scale=1.0, seed=1).images[0].save("x.png")
```

| task | strictly right | n |
|---|---|---|
{scores}
{marked(facts)}
Trained on data under {", ".join(facts["licences"])}.{grown_from(facts)}
`provenance.json` says from what, `proof.json` that it was loaded alone; `files.json` holds a sha256 a file.
"""


def marked(facts: dict) -> str:
    return f"\nIt was {spell_marks(facts['contamination'])}: scores of these sets are not held out.\n" if facts.get("contamination") else ""


def grown_from(facts: dict) -> str:
    rows = [f"{row['repo']} ({row['licence']})" for row in facts["upstream"]]
    return f" Grown from {', '.join(rows)}; their licence files are in `licences/`." if rows else ""
