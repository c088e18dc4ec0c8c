"""Small stand-ins for the capable parts that the paper starts from, trained on the drawn world: autoencoder, VLM, CLIP, DiT.

`start/` holds what every part begins with; then each part trains in a folder of its own, alone or beside the others; what they became is
shipped into `foundation/`. Every part can be interrupted, and goes on by the same command.
"""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import distributed

from data.drawn import VOCABULARY, draw_image_edit, draw_text_to_image
from model.config import ModelConfig
from model.deepgen import DeepGen, build_deepgen
from model.vlm import encode_references
from model.weights import load_dit, load_foundation, load_vlm, save_model
from runtime import exits
from runtime.exits import Interrupted, Plain, StopRequest
from runtime.files import (
    folder_files,
    publish_folder,
    read_json,
    sha256_file,
    sha256_json,
    sha256_path,
    sweep_stale,
    write_atomic,
    write_json,
)
from runtime.keys import seed_from
from runtime.params import check_settings, load_params, parse_params
from runtime.run_folder import checkpoints, claimed, step_of, writer_of
from runtime.stage import InputsChanged, Locked, find_root, rank
from training.batching import stack_pixels
from training.clip_training import train_clip
from training.config import FoundationTraining
from training.dit_training import train_dit
from training.launch import join_ranks, run_ranks
from training.randomness import generator
from training.text_encoder import PlainTextEncoder
from training.tokenizer import build_tokenizer
from training.vlm_training import train_vlm
from training.warm_start import warm_start

PARTS = ("vlm", "clip", "dit")
# what may change while a part trains
FREE = {"steps", "decay", "decay_share", "kinds", "edits", "edit_share", "repainted", "save_every", "score_every", "score_samples"}
PARAMS, OUT = "foundation/params.yaml", "outputs/foundation_training"
SHIPPED = ("vlm", "transformer", "vae", "tokenizer", "text_encoder.safetensors", "clip")
MAX_BYTES = 15_000_000  # of all that ships: it lies in git


class TooLarge(Plain):
    """What was trained is more than the repository holds."""


def run_train_foundation(stop: StopRequest, only: str | None = None, params: str = PARAMS, out: str = OUT) -> None:
    """The command of foundation/dvc.yaml: make `start`, train every part that isn't done, ship. With `only`, that part alone, unshipped.

    Raises:
        Interrupted: saved; the same command goes on.
        Locked: another process trains the part.
        InputsChanged: a part was begun with other settings.
        ParamsError: a key or value of `params` is wrong.
    """
    root = find_root()
    config = check_settings(FoundationTraining, parse_params((root / params).read_text(), params), params)
    shapes = load_params(root / config.preset).model
    torch.set_num_threads(config.threads)
    if "RANK" in os.environ:
        train_part(str(only), config, shapes, root / out, lambda: bool(stop))
        return
    begin(config, shapes, root, root / out)
    for part in (only,) if only else PARTS:
        if stop:  # came where nothing looks at it
            raise Interrupted("Run the same command to go on.")
        if part == "dit" and config.processes > 1:
            train_on_ranks(part, config, root / out, ["--params", params, "--out", out])
            stop.install()
        else:
            train_part(part, config, shapes, root / out, lambda: bool(stop))
    if only is None:
        ship(root / out, root / "foundation", config, shapes, code_digest(root))


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Hold the folder's lock. Raises Locked, naming the process that has it."""
    folder.mkdir(parents=True, exist_ok=True)
    with claimed(folder) as mine:
        if not mine:
            raise Locked(f"{folder} is being written by process {writer_of(folder) or 'unknown'}; wait or stop it.")
        (folder / "lock").write_text(str(os.getpid()))
        sweep_stale(folder)
        yield


def refuse_changed(file: Path, settings: dict[str, Any], folder: Path) -> None:
    """Raises InputsChanged if what `file` remembers of a folder's settings differs; a first time, remember them."""
    if not file.exists():
        write_json(file, settings)
        return
    before = read_json(file)
    changed = [f"{name} was {before.get(name)}, is {settings.get(name)}" for name in settings if before.get(name) != settings[name]]
    if changed:
        raise InputsChanged(f"{folder} was begun otherwise: {'; '.join(changed)}. Put that back, or delete {folder} to begin it again.")


def note_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Add to `settings_by_step.json` with what a part goes on from its newest checkpoint, where that differs from before."""
    file, found = folder / "settings_by_step.json", checkpoints(folder)
    noted = read_json(file) if found and file.exists() else []
    if not noted or noted[-1]["settings"] != settings:
        write_json(file, [*noted, {"from_step": step_of(found[-1]) if found else 0, "settings": settings}])


# ---------------------------------------------------------------- what every part begins with


def begin(config: FoundationTraining, shapes: ModelConfig, root: Path, out: Path) -> None:
    """Write `out`/start, unless it is there: tokenizer, fitted autoencoder, VLM with a standardised vision tower, DiT, text encoder."""
    start = out / "start"
    settings = {name: getattr(config, name) for name in ("seed", "autoencoder_images", "whitening", "warm_start")}
    settings |= {"model": shapes.model_dump(mode="json"), "vocabulary": list(VOCABULARY)}
    if (start / "settings.json").exists():
        refuse_changed(start / "settings.json", settings, out)
        return
    with writing(out):
        torch.manual_seed(generator("foundation", config.seed).initial_seed())
        model = build_deepgen(shapes, build_tokenizer(VOCABULARY, shapes.vlm.vocab_size))
        encoder = build_text_encoder(config, shapes)
        images = autoencoder_images(config)
        model.vae.fit(images, config.whitening)
        standardise_vision(model, config)
        origin = None
        if config.warm_start:
            origin = {"folder": config.warm_start, "transformer": sha256_path(root / config.warm_start / "transformer")}
            model.dit = warm_start(root / config.warm_start, model.dit, encoder, model.vae, model.tokenizer, images)
        temporary = out / f".start.{os.getpid()}.tmp"
        save_model(model, temporary)
        save_file(encoder.state_dict(), temporary / "text_encoder.safetensors")
        write_json(temporary / "origin.json", {"warm_start": origin})  # ours may be what this training replaces
        write_json(temporary / "settings.json", settings)
        publish_folder(temporary, start)


def build_text_encoder(config: FoundationTraining, shapes: ModelConfig) -> PlainTextEncoder:
    torch.manual_seed(generator("text encoder", config.seed).initial_seed())
    return PlainTextEncoder(shapes.vlm.vocab_size, shapes.dit.joint_attention_dim, shapes.dit.pooled_projection_dim)


def load_start(config: FoundationTraining, shapes: ModelConfig, out: Path) -> tuple[DeepGen, PlainTextEncoder]:
    encoder = build_text_encoder(config, shapes)
    encoder.load_state_dict(load_file(out / "start" / "text_encoder.safetensors"))
    return load_foundation(out / "start", shapes), encoder


def autoencoder_images(config: FoundationTraining) -> torch.Tensor:
    """(N, 3, H, W) in [-1, 1]: captions' pictures and edits' targets by turns."""
    seed = seed_from("autoencoder", config.seed)
    return stack_pixels(
        [(draw_image_edit if i % 2 else draw_text_to_image)("train", seed, i).target for i in range(config.autoencoder_images)]
    )


@torch.no_grad()
def standardise_vision(model: DeepGen, config: FoundationTraining) -> None:
    """Fold the mean and spread of the random vision tower's output into its last layer, so that image tokens are of unit scale."""
    images = [draw_image_edit("train", seed_from("vision", config.seed), i).references[0] for i in range(400)]
    tokens = torch.cat(encode_references(model.vlm, list(stack_pixels(images))))
    last: Any = model.vlm.model.visual.merger.mlp[-1]
    mean, spread = tokens.mean(0), tokens.std(0) + 1e-6
    last.weight.div_(spread[:, None])
    last.bias.sub_(mean).div_(spread)


# ---------------------------------------------------------------- the parts


def train_on_ranks(part: str, config: FoundationTraining, out: Path, arguments: list[str]) -> None:
    """Train a part in processes that meet. Raises Interrupted if they were; ends as they did if they failed."""
    if is_done(out / part, getattr(config, part).model_dump(mode="json")):
        return
    if (writer := writer_of(out / part)) is not None:
        raise Locked(f"{out / part} is being written by process {writer or 'unknown'}; wait or stop it.")
    code = run_ranks(config.processes, config.threads, ["training", "train_foundation", "--part", part, *arguments])
    if code == exits.INTERRUPTED:
        raise Interrupted(f"{part}: saved. Run the same command to go on.")
    if code != exits.DONE:
        sys.exit(code)


def is_done(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether a part was trained to its end, with these very settings."""
    done = folder / "trained" / "measured.json"
    return done.exists() and read_json(done)["params"] == settings


def train_part(part: str, config: FoundationTraining, shapes: ModelConfig, out: Path, stop: Callable[[], bool]) -> None:
    """Train one part in `out`/<part>, from its last checkpoint on, into its `trained/`; nothing if that was made by these settings."""
    if rank() != 0:
        with meeting():
            train(part, config, shapes, out, stop)
        return
    folder, settings = out / part, getattr(config, part).model_dump(mode="json")
    with writing(folder):
        if is_done(folder, settings):
            return
        if not checkpoints(folder):
            (folder / "settings.json").unlink(missing_ok=True)
        refuse_changed(folder / "settings.json", {name: value for name, value in settings.items() if name not in FREE}, folder)
        note_settings(folder, settings)
        with meeting():
            model, encoder, measured = train(part, config, shapes, out, stop)
        temporary = folder / f".trained.{os.getpid()}.tmp"
        temporary.mkdir()
        if part == "dit":
            model.dit.save_pretrained(temporary / "transformer", safe_serialization=True)
            save_file(encoder.state_dict(), temporary / "text_encoder.safetensors")
        else:
            shutil.copytree(folder / part, temporary / part)
        noted = read_json(folder / "settings_by_step.json")
        write_json(temporary / "measured.json", {"params": settings, "settings_by_step": noted, "measured": measured})
        publish_folder(temporary, folder / "trained")


@contextmanager
def meeting() -> Iterator[None]:
    """With the other ranks of this command, where it has several."""
    join_ranks()
    try:
        yield
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def train(
    part: str, config: FoundationTraining, shapes: ModelConfig, out: Path, stop: Callable[[], bool]
) -> tuple[DeepGen, PlainTextEncoder, dict[str, Any]]:
    model, encoder = load_start(config, shapes, out)
    if part == "dit":
        ranks = distributed.get_world_size() if distributed.is_initialized() else 1
        measured = train_dit(model, encoder, config.dit, config.seed, out / part, stop, config.evaluation_samples, rank(), ranks)
    elif part == "vlm":
        measured = train_vlm(model, config.vlm, config.seed, out / part, stop)
    else:
        measured = train_clip(config.clip, model.tokenizer, config.seed, out / part, stop)
    return model, encoder, measured


# ---------------------------------------------------------------- what ships


def code_digest(root: Path) -> str:
    return sha256_json({path: sha256_path(root / path) for path in ("data", "model", "training", "runtime")})


def ship(out: Path, foundation: Path, config: FoundationTraining, shapes: ModelConfig, code: str) -> None:
    """Put the trained parts into `foundation`, with a `provenance.json`: how they were made, what they reached, and a sha256 a file.

    The VLM, which nothing is measured from but its hidden states, is stored in bfloat16.

    Raises:
        TooLarge: more than MAX_BYTES in all; nothing was shipped.
    """
    model, _ = load_start(config, shapes, out)
    model.vlm = load_vlm(out / "vlm" / "trained" / "vlm", torch.float32)
    model.dit = load_dit(out / "dit" / "trained" / "transformer", torch.float32)
    made = out / "model"
    shutil.rmtree(made, ignore_errors=True)
    save_model(model, made)
    vlm = made / "vlm" / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(vlm).items()}, vlm, metadata={"format": "pt"})
    shutil.copyfile(out / "dit" / "trained" / "text_encoder.safetensors", made / "text_encoder.safetensors")
    shutil.copytree(out / "clip" / "trained" / "clip", made / "clip")
    files = [file for name in SHIPPED for file in _files_of(made / name)]
    total = sum(file.stat().st_size for file in files)
    if total > MAX_BYTES:
        raise TooLarge(f"{made}: {total / 1e6:.1f} MB, at most {MAX_BYTES / 1e6:.0f} MB ship. Make a part smaller in {config.preset}.")
    for file in files:
        write_atomic(foundation / file.relative_to(made), file.read_bytes())
    trained = {part: read_json(out / part / "trained" / "measured.json") for part in PARTS}
    facts = {
        "command": "python -m training train_foundation",
        "code": code,
        "params": config.model_dump(mode="json"),
        "origin": read_json(out / "start" / "origin.json"),
        "measured": {part: trained[part]["measured"] for part in PARTS},
        "settings_by_step": {part: trained[part]["settings_by_step"] for part in PARTS},
        "files": {str(file.relative_to(made)): sha256_file(file) for file in files},
    }
    write_json(foundation / "provenance.json", facts)


def _files_of(path: Path) -> list[Path]:
    return [path] if path.is_file() else folder_files(path)
