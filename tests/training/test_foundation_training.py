"""The foundation's training: interrupted or not, on one rank or two, from trained weights or fresh, it is the same training."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from data.drawn import draw_image_edit
from model.vae import LinearAutoencoder, encode_images
from model.weights import load_dit, load_vae
from runtime.exits import DONE, INTERRUPTED, Interrupted
from runtime.params import ParamsError, check_settings, load_params
from runtime.run_folder import checkpoints, claimed
from runtime.stage import InputsChanged, Locked
from training import foundation_training
from training.batching import stack_pixels
from training.checkpoint import CheckpointCorrupt
from training.config import FoundationTraining
from training.dit_training import learning_rate_factor
from training.foundation_training import begin, load_start, train_part
from training.muon import Muon
from training.text_encoder import MAX_WORDS, word_ids
from training.warm_start import rebase

REPO = Path(__file__).parents[2]
SHAPES = load_params(REPO / "presets" / "tiny.yaml").model
LATER = 240.0  # seconds that a process gets


def small(**dit: object) -> dict:
    """foundation/params.yaml for three steps on few samples."""
    params = yaml.safe_load((REPO / "foundation" / "params.yaml").read_text())
    few = {"steps": 3, "batch_size": 8, "warmup": 1, "save_every": 2, "sampling_steps": 1}
    return params | {"processes": 1, "autoencoder_images": 100, "evaluation_samples": 2, "dit": params["dit"] | few | dit}


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every part begins with."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("foundation") / "out"
    begin(FoundationTraining.model_validate(small()), SHAPES, REPO, out)
    return out


@pytest.fixture
def out(started: Path, tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "start").symlink_to(started / "start")
    return tmp_path / "out"


def train(out: Path, stop_at: int | None = None, **dit: object) -> None:
    """Train the DiT in this process; a stop is asked for after step `stop_at`."""
    asked = iter(range(1000))
    train_part("dit", FoundationTraining.model_validate(small(**dit)), SHAPES, out, lambda: next(asked) == stop_at)


def weights(out: Path) -> dict[str, torch.Tensor]:
    trained = out / "dit" / "trained"
    return load_file(trained / "transformer" / "diffusion_pytorch_model.safetensors") | load_file(trained / "text_encoder.safetensors")


def command(out: Path, file: Path) -> list[str]:
    return [sys.executable, "-m", "training", "train_foundation", "--part", "dit", "--params", str(file), "--out", str(out)]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_interrupted_training_ends_with_the_weights_of_a_whole_one(out: Path, tmp_path: Path, optimizer: str):
    with pytest.raises(Interrupted, match="stopped after step 1 of 3"):
        train(out, stop_at=1, optimizer=optimizer)
    train(out, optimizer=optimizer)
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "start").symlink_to(out / "start")
    train(whole, optimizer=optimizer)
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(out)[name]), name


@pytest.mark.slow
def test_two_ranks_compute_the_weights_of_one_though_one_of_them_was_stopped(out: Path, tmp_path: Path):
    two = tmp_path / "two"
    two.mkdir()
    (two / "start").symlink_to(out / "start")
    file = tmp_path / "params.yaml"
    file.write_text(yaml.safe_dump(small(optimizer="muon", save_every=1) | {"processes": 2}))
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    running = subprocess.Popen(command(two, file), cwd=REPO, env=environment)
    deadline = time.monotonic() + LATER
    while not checkpoints(two / "dit") and time.monotonic() < deadline and running.poll() is None:
        time.sleep(0.02)
    running.send_signal(signal.SIGTERM)
    assert running.wait(LATER) in (INTERRUPTED, DONE)
    assert subprocess.run(command(two, file), cwd=REPO, env=environment, timeout=LATER, check=False).returncode == DONE
    train(out, optimizer="muon")
    # As a whole: Adam makes a step of the rounding where a gradient is zero (the bias of keys), and hardly less where it nearly is.
    start = load_file(out / "start" / "transformer" / "diffusion_pytorch_model.safetensors")
    apart, moved = (torch.cat([(weights(out)[name] - other[name]).flatten() for name in start]).norm() for other in (weights(two), start))
    assert apart < 1e-4 * moved


def test_a_damaged_checkpoint_is_refused_by_name_with_what_to_do(out: Path):
    with pytest.raises(Interrupted):
        train(out, stop_at=1)
    state = out / "dit" / "step-000001" / "state.pt"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    with pytest.raises(
        CheckpointCorrupt, match=r"step-000001/state.pt: has not the sha256.*Delete .*step-000001; .*begins this part again"
    ):
        train(out)


def test_a_second_writer_of_a_part_is_refused(out: Path):
    (out / "dit").mkdir()
    with claimed(out / "dit"), pytest.raises(Locked, match="dit is being written by process"):
        train(out)


def test_a_training_goes_on_with_more_steps_but_not_with_another_rate(out: Path):
    with pytest.raises(Interrupted):
        train(out, stop_at=1)
    with pytest.raises(InputsChanged, match=r"lr was 0.002, is 0.1. Put that back, or delete .*dit"):
        train(out, lr=0.1)
    train(out, steps=4)
    assert [path.name for path in checkpoints(out / "dit")] == ["step-000004"]


def test_a_part_that_is_done_is_not_trained_again(out: Path, monkeypatch: pytest.MonkeyPatch):
    train(out)
    monkeypatch.setattr(foundation_training, "train", lambda *_: pytest.fail("trained again"))
    train(out)


def test_a_rate_is_constant_until_its_decay_whatever_the_number_of_steps():
    settings = FoundationTraining.model_validate(small(steps=100, decay_share=0.2, warmup=10)).dit
    longer = settings.model_copy(update={"steps": 1000})
    factors = [learning_rate_factor(step, settings) for step in range(100)]
    assert factors[:80] == [learning_rate_factor(step, longer) for step in range(80)]
    assert factors[9:81] == [1.0] * 72 and factors[80:] == sorted(factors[80:], reverse=True)
    assert factors[90] == pytest.approx(0.51)


def test_a_rebased_dit_predicts_the_same_velocities_in_the_new_latents():
    """New latents that are a rotation, another scale and another origin of the old: to the rounding of the maps."""
    dit, old = load_dit(REPO / "foundation" / "transformer", torch.float32), load_vae(REPO / "foundation" / "vae", torch.float32)
    new = LinearAutoencoder(**{name: old.config[name] for name in ("latent_channels", "downscale")})
    rng = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(48, 48, generator=rng)).Q
    new.load_state_dict({"basis": turn @ old.basis, "mean": old.mean + 0.1 * old.basis.mean(0), "scale": old.scale.mean().expand(48)})
    images = stack_pixels([draw_image_edit("train", 1, i).target for i in range(200)])
    rebased = rebase(dit, old, new, images)

    matrix = turn * old.scale / new.scale[:, None]  # z' = matrix z + b
    z = encode_images(old, images[:8])
    b = encode_images(new, images[:8]) - torch.einsum("ec,bchw->behw", matrix, z)
    noise, sigma = torch.randn(z.shape, generator=rng), torch.full((8,), 0.3)
    words, pooled = torch.randn(8, 5, 128, generator=rng), torch.randn(8, 128, generator=rng)
    with torch.no_grad():
        # a point on the new path stands for the old point that the input's map gives, which knows no sigma
        x = 0.7 * z + 0.3 * noise
        before = dit(x, words, pooled, sigma * 1000, (z,))
        after = rebased(torch.einsum("ec,bchw->behw", matrix, x) + b, words, pooled, sigma * 1000, (encode_images(new, images[:8]),))
    torch.testing.assert_close(after, torch.einsum("ec,bchw->behw", matrix, before) - b, rtol=1e-5, atol=1e-4)


def test_words_that_both_vocabularies_have_keep_their_meaning_and_new_ones_are_fresh(started: Path):
    model, encoder = load_start(FoundationTraining.model_validate(small()), SHAPES, started)
    trained = load_file(REPO / "foundation" / "text_encoder.safetensors")
    fresh = foundation_training.build_text_encoder(FoundationTraining.model_validate(small()), SHAPES)
    old = foundation_training.load_foundation(REPO / "foundation", SHAPES).tokenizer.get_vocab()
    for word, row in model.tokenizer.get_vocab().items():
        expected = trained["words.weight"][old[word]] if word in old else fresh.words.weight[row]
        assert torch.equal(encoder.words.weight[row], expected), word


def test_a_prompt_that_is_too_long_is_named(started: Path):
    model, _ = load_start(FoundationTraining.model_validate(small()), SHAPES, started)
    ids, _, lengths = word_ids(model.tokenizer, ["a red circle", ""])
    assert lengths.tolist() == [4, 1] and ids.shape == (2, 4)
    with pytest.raises(ValueError, match=f"prompt of {MAX_WORDS} words, at most {MAX_WORDS - 1} fit: 'a a"):
        word_ids(model.tokenizer, [" ".join(["a"] * MAX_WORDS)])


def test_a_letter_knows_its_place_in_its_word_wherever_the_word_stands(started: Path):
    model, encoder = load_start(FoundationTraining.model_validate(small()), SHAPES, started)
    ids, places, lengths = word_ids(model.tokenizer, ["the word TAXI in red", "write OX there", "AAT written in white"])
    assert places.tolist() == [[0, 0, 0, 1, 2, 3, 0, 0, 0], [0, 0, 1, 0, 0, 0, 0, 0, 0], [0, 1, 2, 0, 0, 0, 0, 0, 0]]
    assert lengths.tolist() == [9, 5, 7]
    with torch.no_grad():
        encoder.places.normal_()
        moved = encoder(ids, places.roll(1, 1), lengths).prompt_embeds - encoder(ids, places, lengths).prompt_embeds
    assert moved[0].abs().max() > 0.1, "it reads them"


def test_a_wrong_key_of_the_foundations_params_is_named():
    wrong = small(stepz=3)
    with pytest.raises(ParamsError, match=r"params\.yaml can't be used:\n  dit\.stepz: unknown key; did you mean 'steps'\?"):
        check_settings(FoundationTraining, wrong, "foundation/params.yaml")


def test_muon_is_torchs_to_the_rounding_of_its_bfloat16():
    rng = torch.Generator().manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape, generator=rng)) for shape in ((16, 64), (64, 16), (16, 64))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    optimizers = [
        Muon(ours, lr=0.1, weight_decay=0.01),
        torch.optim.Muon(theirs, lr=0.1, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
    ]
    for _ in range(3):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=rng)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0.01)
