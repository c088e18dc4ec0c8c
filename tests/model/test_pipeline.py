"""What an application sees: one image a seed, whatever shares its batch."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model.deepgen import DeepGen
from model.generate import generate
from model.lora import add_lora, load_lora, merge_lora, save_lora
from model.pipeline import DeepGenPipeline
from model.summary import build_on_meta, count_parts
from model.weights import save_model

from .conftest import REPO


@pytest.fixture
def pipeline(model: DeepGen, tmp_path: Path) -> DeepGenPipeline:
    save_model(model, tmp_path / "saved")
    made = DeepGenPipeline.from_pretrained(tmp_path / "saved")
    made.set_progress_bar_config(disable=True)
    return made


def picture(seed: int, height: int = 64, width: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def difference(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max())


def test_generation_and_editing_share_a_call_and_each_image_is_what_it_is_alone(pipeline: DeepGenPipeline):
    prompts = ["red circle", "make square green", "remove red square", "green square"]
    images = [None, picture(1), [picture(2), picture(3, 32, 64)], picture(4, 32, 64)]
    settings = {"num_inference_steps": 2, "guidance_scale": 2.0}
    together = pipeline(prompts, image=images, seed=[5, 6, 7, 8], **settings).images
    assert [made.size for made in together] == [(64, 64), (64, 64), (64, 64), (64, 32)]
    for row, seed in enumerate((5, 6, 7, 8)):
        alone = pipeline(prompts[row], image=images[row], seed=seed, **settings).images[0]
        assert difference(alone, together[row]) <= 1


def test_a_saved_pipeline_makes_the_same_image(pipeline: DeepGenPipeline, tmp_path: Path):
    pipeline.save_pretrained(tmp_path / "again")
    again = DeepGenPipeline.from_pretrained(tmp_path / "again")
    again.set_progress_bar_config(disable=True)
    assert difference(*(p("red circle", num_inference_steps=2, seed=1).images[0] for p in (pipeline, again))) == 0


def test_parts_that_wait_on_the_cpu_make_the_same_image_and_are_sent_back(pipeline: DeepGenPipeline):
    settings = {"image": picture(1), "num_inference_steps": 1, "seed": 3}
    plain = pipeline("make square green", **settings).images[0]
    pipeline.enable_model_cpu_offload(device="cpu")
    moved = []
    for name in ("vlm", "connector", "transformer", "vae"):
        part = getattr(pipeline, name)
        part.to = lambda *args, name=name, part=part, to=part.to, **kwargs: (moved.append(name), to(*args, **kwargs))[1]
    assert difference(pipeline("make square green", **settings).images[0], plain) == 0
    assert {"vlm", "connector", "transformer", "vae"} <= set(moved)


def test_the_callback_sees_every_step_and_the_latents(pipeline: DeepGenPipeline):
    seen = []
    pipeline("red circle", num_inference_steps=3, callback_on_step_end=lambda step, latents: seen.append((step, tuple(latents.shape))))
    assert seen == [(step, (1, 48, 4, 4)) for step in range(3)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"prompt": ["a", "b"], "image": picture(0)}, "1 images for 2 prompts"),
        ({"prompt": ["a", "b"], "seed": [1]}, "1 seeds for 2 prompts"),
        ({"prompt": "a", "solver": "magic"}, "expected one of \\['dpm\\+\\+', 'euler'\\]"),
        ({"prompt": "a", "image": picture(0, 60, 64)}, "height is 60; expected a multiple of 16"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(pipeline: DeepGenPipeline, arguments: dict, said: str):
    with pytest.raises(ValueError, match=said):
        pipeline(**arguments)


def test_guidance_of_one_is_no_guidance_and_so_is_guidance_in_an_empty_interval(model: DeepGen):
    made = {
        name: generate(model, ["red circle"], [1], (64, 64), (), 3, **settings)
        for name, settings in {
            "none": {"guidance": 1.0},
            "almost": {"guidance": 1.0 + 1e-6},
            "empty": {"guidance": 5.0, "guidance_interval": (2.0, 3.0)},
            "full": {"guidance": 5.0},
            "half": {"guidance": 5.0, "guidance_interval": (0.7, 1.0)},
        }.items()
    }
    torch.testing.assert_close(made["almost"], made["none"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made["empty"], made["none"], rtol=1e-4, atol=1e-4)
    assert (made["full"] - made["none"]).abs().max() > 1e-3
    assert (made["half"] - made["full"]).abs().max() > 1e-4


def test_saved_adapters_give_the_output_again_and_merging_keeps_it(model: DeepGen, tmp_path: Path):
    save_model(model, tmp_path / "base")
    add_lora(model, rank=4, alpha=8.0)
    for name, parameter in model.vlm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    adapted = model.encode_condition(["red circle"]).prompt_embeds
    save_lora(model, tmp_path / "lora")
    again = DeepGenPipeline.from_pretrained(tmp_path / "base").model
    plain = again.encode_condition(["red circle"]).prompt_embeds
    load_lora(again, tmp_path / "lora")
    torch.testing.assert_close(again.encode_condition(["red circle"]).prompt_embeds, adapted, rtol=0, atol=0)
    assert (plain - adapted).abs().max() > 1e-3
    for module in again.vlm.modules():
        if hasattr(module, "unmerge"):
            module.merge()
            module.unmerge()
    torch.testing.assert_close(again.encode_condition(["red circle"]).prompt_embeds, adapted, rtol=1e-4, atol=1e-5)
    merge_lora(again)
    torch.testing.assert_close(again.encode_condition(["red circle"]).prompt_embeds, adapted, rtol=1e-4, atol=1e-5)


def test_the_papers_model_has_the_papers_number_of_bridge_parameters():
    import yaml

    from model.config import ModelConfig

    counts = count_parts(
        build_on_meta(ModelConfig.model_validate(yaml.safe_load((REPO / "presets" / "deepgen-5b.yaml").read_text())["model"]))
    )
    assert counts["connector"] + counts["think_tokens"] == 432_449_532
