"""DeepGen as a diffusers pipeline: what an application loads."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from PIL import Image
from transformers import PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration

from model.connector import StackedChannelBridging
from model.deepgen import DeepGen, stacked
from model.dit import DeepGenTransformer
from model.generate import generate, latent_shape
from model.published import load_release
from model.sampler import SOLVERS
from model.vae import to_pixels, to_uint8
from model.weights import resolution_shift_of, save_model, scheduler_of

Picture = Image.Image | Sequence[Image.Image] | None


class DeepGenPipeline(DiffusionPipeline):
    """Generation and editing from one folder, offline.

    The parts are this package's own classes and transformers', so the folder is read by this class, not by a remote one.
    """

    model_cpu_offload_seq = "vlm->connector->transformer->vae"

    def __init__(
        self,
        vlm: Qwen2_5_VLForConditionalGeneration,
        connector: StackedChannelBridging,
        transformer: DeepGenTransformer,
        vae: Any,
        tokenizer: PreTrainedTokenizerBase,
        scheduler: FlowMatchEulerDiscreteScheduler,
        max_prompt_tokens: int = 1024,
    ) -> None:
        super().__init__()
        self.register_modules(vlm=vlm, connector=connector, transformer=transformer, vae=vae, tokenizer=tokenizer, scheduler=scheduler)
        by_size = resolution_shift_of(scheduler.config)
        self.model = DeepGen(vlm, connector, transformer, vae, tokenizer, scheduler.config.shift, max_prompt_tokens, by_size).eval()

    @classmethod
    def from_pretrained(cls, folder: str | Path, torch_dtype: torch.dtype = torch.float32, **unknown: Any) -> "DeepGenPipeline":
        """Read a model folder of ours, or the published one in diffusers' layout, strictly and without the network.

        Raises:
            TypeError: an option that this pipeline lacks (there is no remote code, and nothing is fetched).
        """
        if unknown:
            raise TypeError(f"from_pretrained got {sorted(unknown)}; this pipeline reads local folders and takes torch_dtype alone.")
        model = load_release(Path(folder), torch_dtype)
        return cls(model.vlm, model.connector, model.dit, model.vae, model.tokenizer, scheduler_of(model), model.max_prompt_tokens)

    def save_pretrained(self, folder: str | Path) -> None:  # type: ignore[override]
        save_model(self.model, Path(folder))

    def __call__(
        self,
        prompt: str | Sequence[str],
        image: Picture | Sequence[Picture] = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 4.0,
        seed: int | Sequence[int] = 0,
        negative_prompt: str = "",
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        solver: str = "euler",
        callback_on_step_end: Callable[[int, torch.Tensor], None] | None = None,
    ) -> ImagePipelineOutput:
        """Generate from prompts, edit images by instructions, or both in one call.

        Args:
            image: for one prompt, its reference or list of references. For a list of prompts, a list with each one's own: None, an image or
                a list of images.
            height, width: pixels; by default those of the first reference, else the model's own size.
            seed: one an image; a single seed s gives s, s + 1, ... to the images of a batch.
            guidance_interval: sigmas between which guidance acts.
            solver: `euler`, or `dpm++`, which needs fewer steps.
            callback_on_step_end: called with (step, latents).

        Returns:
            .images: PIL images, in the order of the prompts.

        Raises:
            ValueError: a size, solver or number of images or seeds that does not fit, before any work.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        references = [_as_list(image)] if isinstance(prompt, str) else _each(image, len(prompts))
        seeds = [seed + i for i in range(len(prompts))] if isinstance(seed, int) else list(seed)
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts; expected one a prompt, or a single number.")
        if solver not in SOLVERS:
            raise ValueError(f"solver is {solver!r}; expected one of {sorted(SOLVERS)}.")
        rows_of_size: dict[tuple[int, int], list[int]] = defaultdict(list)
        for row, pictures in enumerate(references):
            rows_of_size[self._size(pictures, height, width)].append(row)

        made: dict[int, Image.Image] = {}
        with self.progress_bar(total=num_inference_steps * len(rows_of_size)) as bar:

            def on_step(step: int, latents: torch.Tensor) -> None:
                bar.update()
                if callback_on_step_end is not None:
                    callback_on_step_end(step, latents)

            for size, rows in rows_of_size.items():
                pixels = generate(
                    self.model,
                    [prompts[row] for row in rows],
                    [seeds[row] for row in rows],
                    size,
                    stacked([[self._pixels(picture) for picture in references[row]] for row in rows]),
                    num_inference_steps,
                    guidance_scale,
                    on_step,
                    solver,
                    guidance_interval,
                    negative_prompt,
                )
                made.update(zip(rows, map(Image.fromarray, to_uint8(pixels).cpu().numpy()), strict=True))
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=[made[row] for row in range(len(prompts))])

    def default_side(self) -> int:
        """Pixels a side that the DiT was made for: its own size, or the position grid's where that is smaller."""
        config = self.transformer.config
        factor = 64 // latent_shape(self.model, (64, 64))[1]
        return min(config.sample_size, config.pos_embed_max_size * config.patch_size) * factor

    def _pixels(self, picture: Image.Image) -> torch.Tensor:
        pixels = to_pixels(torch.from_numpy(np.array(picture.convert("RGB")))[None])[0]
        return pixels.to(self.model.device, self.transformer.dtype)

    def _size(self, pictures: Sequence[Image.Image], height: int | None, width: int | None) -> tuple[int, int]:
        """(H, W) of one image to make; every picture's own size must fit as well."""
        side = self.default_side()
        height = height or (pictures[0].height if pictures else side)
        width = width or (pictures[0].width if pictures else side)
        self._check_size("height", height)
        self._check_size("width", width)
        for picture in pictures:
            self._check_size("an image's height", picture.height)
            self._check_size("an image's width", picture.width)
        return height, width

    def _check_size(self, name: str, value: int) -> None:
        config = self.transformer.config
        step = 64 // latent_shape(self.model, (64, 64))[1] * config.patch_size
        largest = config.pos_embed_max_size * step
        if value % step or not 0 < value <= largest:
            raise ValueError(f"{name} is {value}; expected a multiple of {step} up to {largest}. Resize the image or ask for another size.")


def _as_list(image: Any) -> list[Image.Image]:
    """One prompt's references as a list."""
    return [] if image is None else [image] if isinstance(image, Image.Image) else list(image)


def _each(image: Any, count: int) -> list[list[Image.Image]]:
    """Each prompt's references, from None for all or a list with one entry a prompt."""
    if image is None:
        return [[] for _ in range(count)]
    if isinstance(image, Image.Image) or len(image) != count:
        given = 1 if isinstance(image, Image.Image) else len(image)
        raise ValueError(f"{given} images for {count} prompts; expected a list with one entry a prompt: None, an image or several.")
    return [_as_list(entry) for entry in image]
