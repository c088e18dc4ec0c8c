"""The parts that training starts from, gathered in one folder: made at random, or copied and checked, from git or from what was fetched."""

import shutil
from pathlib import Path

import torch

from model.config import FoundationConfig, ModelConfig
from model.deepgen import build_deepgen
from model.weights import load_foundation, save_model
from runtime.exits import Plain
from runtime.fetched import fetched_files, foundation_wants
from runtime.files import read_json, sha256_file
from runtime.stage import StageRun
from training.randomness import generator
from training.tokenizer import build_tokenizer

FOLDERS = {"vlm": "vlm", "dit": "transformer", "vae": "vae"}  # in a model folder
TOKENIZER_FILES = {
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.json",
}


class FoundationMismatch(Plain):
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
        copy_fetched(run.root, config, folder / "model", run.params.preset)
    elif config.source == "random":
        torch.manual_seed(generator("foundation", config.seed).initial_seed())
        from data.drawn import VOCABULARY

        save_model(build_deepgen(run.params.model, build_tokenizer(VOCABULARY, run.params.model.vlm.vocab_size)), folder / "model")
    else:
        copy_checked(run.root / config.path, folder / "model")
    check_shapes(folder / "model", run.params.model)
    run.publish(folder)
    run.report({"source": config.source})


def copy_fetched(root: Path, config: FoundationConfig, target: Path, preset: str) -> None:
    """Copy the hub's parts, and the tokenizer that comes with the VLM, refusing a file whose sha256 is not its receipt's.

    Raises:
        FileNotFoundError: naming each part that is not on this machine, and the command that brings it.
    """
    wants = foundation_wants(config)
    found = {wanted.name: fetched_files(root, wanted) for wanted in wants}
    lacking = [
        f"  {wanted.name}: {wanted.repo} at {wanted.revision or 'no pinned revision'}, expected in {wanted.folder}"
        for wanted in wants
        if found[wanted.name] is None
    ]
    if lacking:
        command = f"Bring them with `deepgen fetch --preset {preset}`, or use a local preset."
        raise FileNotFoundError("\n".join(["foundation.source: hub, but this machine lacks", *lacking, command]))
    for wanted in wants:
        for name, file in (found[wanted.name] or {}).items():
            source = root / wanted.folder / name
            if sha256_file(source) != file.sha256:
                command = f"deepgen fetch --preset {preset} --only {wanted.name}"
                raise FoundationMismatch(f"{source}: expected sha256 {file.sha256[:12]}...; delete it, then `{command}`.")
            inner = Path(name).relative_to(config.hub[wanted.name].subfolder)  # type: ignore[index]
            folders = [FOLDERS[wanted.name]] + ["tokenizer"] * (wanted.name == "vlm" and inner.name in TOKENIZER_FILES)
            for folder in folders:
                (target / folder / inner).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target / folder / inner)


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
