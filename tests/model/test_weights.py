"""A model folder gives back the model, whole and offline, or says what is wrong with it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from model.deepgen import DeepGen
from model.generate import generate
from model.lora import merge_lora
from model.pipeline import DeepGenPipeline
from model.vae import LinearAutoencoder, decode_latents, encode_images
from model.weights import WeightsMismatch, load_model, save_model
from runtime.files import sha256_path, tensors_digest
from training.config import LoRAConfig
from training.stages import freeze_for


def test_saved_and_loaded_weights_give_the_same_image(model: DeepGen, tmp_path: Path, references):
    save_model(model, tmp_path / "a")
    again = load_model(tmp_path / "a").eval()
    for images in ((), references):
        ours = generate(model, ["red circle"] * 3, [1, 2, 3], (64, 64), images, steps=2, guidance=2.0)
        theirs = generate(again, ["red circle"] * 3, [1, 2, 3], (64, 64), images, steps=2, guidance=2.0)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_equal_weights_are_equal_bytes(model: DeepGen, tmp_path: Path):
    save_model(model, tmp_path / "a")
    save_model(load_model(tmp_path / "a"), tmp_path / "b")
    assert sha256_path(tmp_path / "a") == sha256_path(tmp_path / "b")


def test_one_changed_weight_changes_the_digest(model: DeepGen, tmp_path: Path):
    save_model(model, tmp_path)
    before = tensors_digest(tmp_path)
    file = tmp_path / "connector" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["projector_1.bias"][0] += 1
    save_file(tensors, file)
    assert tensors_digest(tmp_path) != before


@pytest.mark.parametrize("part", ["connector", "vlm"])
def test_a_missing_tensor_is_named(model: DeepGen, tmp_path: Path, part: str):
    save_model(model, tmp_path)
    file = next((tmp_path / part).glob("*.safetensors"))
    tensors = load_file(file)
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(WeightsMismatch, match=name.replace(".", r"\.")):
        load_model(tmp_path)


def test_the_pipeline_gives_the_image_of_the_training_code(model: DeepGen, tmp_path: Path):
    save_model(model, tmp_path)
    pipeline = DeepGenPipeline.from_pretrained(tmp_path)
    made = pipeline("red circle", num_inference_steps=2, guidance_scale=1.0, seed=4).images[0]
    ours = generate(model, ["red circle"], [4], (64, 64), (), 2, 1.0)
    expected = ((ours[0].clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(np.asarray(made), expected)
    assert pipeline("make red", image=made, num_inference_steps=1, seed=1).images[0].size == (64, 64)


def test_the_pipeline_refuses_a_size_that_does_not_fit_naming_the_step(model: DeepGen, tmp_path: Path):
    save_model(model, tmp_path)
    with pytest.raises(ValueError, match="height is 60; expected a multiple of 16 up to 64"):
        DeepGenPipeline.from_pretrained(tmp_path)("red", height=60, width=64)


def test_merged_lora_gives_the_output_of_the_adapters(model: DeepGen):
    trained = freeze_for(model, "sft", LoRAConfig(rank=4, alpha=8.0))
    for name, parameter in trained.items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    with_adapters = model.encode_condition(["red circle"]).prompt_embeds
    merge_lora(model)
    assert not [name for name, _ in model.named_parameters() if "lora" in name]
    torch.testing.assert_close(model.encode_condition(["red circle"]).prompt_embeds, with_adapters, rtol=1e-4, atol=1e-4)


def test_the_linear_autoencoder_loses_nothing_that_its_basis_spans():
    vae = LinearAutoencoder(latent_channels=12, downscale=2)
    images = torch.rand(4, 3, 8, 8) * 2 - 1
    vae.fit(images, whitening=0.5)
    torch.testing.assert_close(decode_latents(vae, encode_images(vae, images)), images, rtol=1e-4, atol=1e-4)
