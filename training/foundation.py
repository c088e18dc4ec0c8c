"""The parts that training starts from, gathered in one folder: made at random, or copied and checked."""

import shutil
from pathlib import Path

import torch

from model.config import FoundationConfig, ModelConfig
from model.deepgen import build_deepgen
from model.weights import load_foundation, save_model
from runtime.files import read_json, sha256_file
from runtime.stage import StageRun
from training.randomness import generator
from training.tokenizer import build_tokenizer


class FoundationMismatch(Exception):
    """Files of the foundation are not those that its provenance names, or do not fit `model:` in params.yaml."""


def run_foundation(run: StageRun) -> None:
    """Write `outputs/foundation/model/`, and check that it fits the configured shapes.

    Raises:
        FoundationMismatch: naming the file or the part.
        FileNotFoundError: a hub source whose files were not fetched.
    """
    config = run.params.foundation
    folder = run.folder / "out"
    shutil.rmtree(folder, ignore_errors=True)
    if config.source == "hub":
        raise FileNotFoundError(missing_hub_weights(config))
    if config.source == "random":
        torch.manual_seed(generator("foundation", config.seed).initial_seed())
        from data.drawn import VOCABULARY

        save_model(build_deepgen(run.params.model, build_tokenizer(VOCABULARY, run.params.model.vlm.vocab_size)), folder / "model")
    else:
        copy_checked(run.root / config.path, folder / "model")
    check_shapes(folder / "model", run.params.model)
    run.publish(folder)
    run.report({"source": config.source})


def missing_hub_weights(config: FoundationConfig) -> str:
    """What a hub foundation lacks on this machine, part by part."""
    lines = [f"  {part}: {weights.repo} at {weights.revision or 'no pinned revision'}" for part, weights in sorted(config.hub.items())]
    why = "foundation.source: hub, but fetching and reading published weights is not built yet:"
    return "\n".join([why, *lines, "Use a local preset."])


def copy_checked(source: Path, target: Path) -> None:
    """Copy every file that `provenance.json` names, refusing one whose sha256 differs."""
    files: dict[str, str] = read_json(source / "provenance.json")["files"]
    for name, expected in files.items():
        if not (source / name).is_file() or sha256_file(source / name) != expected:
            raise FoundationMismatch(
                f"{source / name}: expected sha256 {expected[:12]}...; restore it with `git checkout {source.name}/{name}`."
            )
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)


def check_shapes(folder: Path, config: ModelConfig) -> None:
    """Load the folder and compare it with the shapes that params.yaml describes."""
    model = load_foundation(folder, config)
    text = model.vlm.config.text_config
    found = {
        "model.vlm.hidden_size": (text.hidden_size, config.vlm.hidden_size),
        "model.vlm.layers": (text.num_hidden_layers, config.vlm.layers),
        "model.dit.layers": (model.dit.config.num_layers, config.dit.layers),
        "model.dit.joint_attention_dim": (model.dit.config.joint_attention_dim, config.dit.joint_attention_dim),
        "model.vae.latent_channels": (model.vae.config.latent_channels, config.vae.latent_channels),
    }
    wrong = [f"{key}: {wanted} in params.yaml, {stored} in the weights" for key, (stored, wanted) in found.items() if stored != wanted]
    if wrong:
        raise FoundationMismatch(f"{folder} does not fit: " + "; ".join(wrong) + ". Change params.yaml or the foundation.")
