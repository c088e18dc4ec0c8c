"""DeepGen as a diffusers pipeline: what an application loads."""

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
from model.deepgen import DeepGen
from model.dit import DeepGenTransformer
from model.generate import generate, latent_shape
from model.vae import to_pixels, to_uint8
from model.weights import load_model, save_model


class DeepGenPipeline(DiffusionPipeline):
    """Generation and editing from one folder, offline.

    The parts are this package's own classes and transformers', so the folder is read by this class, not by a remote one.
    """

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
        self.model = DeepGen(vlm, connector, transformer, vae, tokenizer, scheduler.config.shift, max_prompt_tokens).eval()

    @classmethod
    def from_pretrained(cls, folder: str | Path, torch_dtype: torch.dtype = torch.float32, **unknown: Any) -> "DeepGenPipeline":
        """Read a model folder, strictly and without the network.

        Raises:
            TypeError: an option that this pipeline lacks (there is no remote code, and nothing is fetched).
        """
        if unknown:
            raise TypeError(f"from_pretrained got {sorted(unknown)}; this pipeline reads local folders and takes torch_dtype alone.")
        model = load_model(Path(folder), torch_dtype)
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(Path(folder) / "scheduler", local_files_only=True)
        return cls(model.vlm, model.connector, model.dit, model.vae, model.tokenizer, scheduler, model.max_prompt_tokens)

    def save_pretrained(self, folder: str | Path) -> None:  # type: ignore[override]
        save_model(self.model, Path(folder))

    def __call__(
        self,
        prompt: str | Sequence[str],
        image: Image.Image | Sequence[Image.Image] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 4.0,
        seed: int | Sequence[int] = 0,
        callback_on_step_end: Callable[[int, torch.Tensor], None] | None = None,
    ) -> ImagePipelineOutput:
        """Generate from prompts, or edit `image` by an instruction.

        Args:
            image: the reference, or several of one edit; with it, prompt must be one instruction.
            height, width: pixels; by default those of the image, else the model's own size.
            seed: one an image; a single seed s gives s, s + 1, ... to the images of a batch.

        Returns:
            .images: PIL images.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        references = [] if image is None else [image] if isinstance(image, Image.Image) else list(image)
        if references and len(prompts) != 1:
            raise ValueError(f"{len(prompts)} prompts with an image; expected one instruction. Call once an edit.")
        side = self.default_side()
        height = height or (references[0].height if references else side)
        width = width or (references[0].width if references else side)
        self._check_size(height, width)
        seeds = [seed + i for i in range(len(prompts))] if isinstance(seed, int) else list(seed)
        pixels = generate(
            self.model,
            prompts,
            seeds,
            (height, width),
            tuple(to_pixels(torch.from_numpy(np.array(picture.convert("RGB")))[None]).to(self.model.device) for picture in references),
            num_inference_steps,
            guidance_scale,
            callback_on_step_end,
        )
        return ImagePipelineOutput(images=[Image.fromarray(array) for array in to_uint8(pixels).cpu().numpy()])

    def default_side(self) -> int:
        """Pixels a side that the DiT was made for: its own size, or the position grid's where that is smaller."""
        config = self.transformer.config
        factor = 64 // latent_shape(self.model, (64, 64))[1]
        return min(config.sample_size, config.pos_embed_max_size * config.patch_size) * factor

    def _check_size(self, height: int, width: int) -> None:
        config = self.transformer.config
        step = 64 // latent_shape(self.model, (64, 64))[1] * config.patch_size
        largest = config.pos_embed_max_size * step
        for name, value in (("height", height), ("width", width)):
            if value % step or not 0 < value <= largest:
                raise ValueError(
                    f"{name} is {value}; expected a multiple of {step} up to {largest}. Resize the image or ask for another size."
                )
