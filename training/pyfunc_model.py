"""The export as an MLflow model: a prompt, and an image for edits, to a PNG as base64 text. Stored as this file, never as a pickle."""

import base64
import io
from typing import Any

import mlflow
import pandas as pd
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from PIL import Image

MAX_IMAGE_BYTES = 12_000_000
MAX_PIXELS = 16_000_000
FORMATS = ("JPEG", "PNG", "WEBP")


class DeepGenModel(PythonModel):
    """One row a picture: column `prompt`, and optionally `image` (base64); params seed, size, steps and guidance hold for all rows."""

    def load_context(self, context: PythonModelContext) -> None:
        from model.pipeline import DeepGenPipeline

        self.pipeline = DeepGenPipeline.from_pretrained(context.artifacts["pipeline"])

    def predict(self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> list[str]:
        settings = params or {}
        rows = model_input.to_dict(orient="records")
        return [encode_png(draw(self.pipeline, str(row["prompt"]), decode_image(row.get("image")), settings)) for row in rows]


def draw(pipeline: Any, prompt: str, image: Image.Image | None, settings: dict[str, Any]) -> Image.Image:
    """One picture; the same seed gives the same picture, whatever else is in the request."""
    chosen: dict[str, Any] = {"seed": int(settings.get("seed", 0))}
    if "steps" in settings:
        chosen["num_inference_steps"] = int(settings["steps"])
    if "guidance" in settings:
        chosen["guidance_scale"] = float(settings["guidance"])
    if image is not None:
        chosen["image"] = image
    elif "size" in settings:  # an edit keeps the size of its image
        chosen["height"] = chosen["width"] = int(settings["size"])
    return pipeline(prompt, **chosen).images[0]


def decode_image(text: Any) -> Image.Image | None:
    """The picture in a base64 text; no picture for an empty cell.

    Raises:
        ValueError: not base64, too large, or not a JPEG, PNG or WebP.
    """
    if not isinstance(text, str) or not text:
        return None
    if len(text) > MAX_IMAGE_BYTES * 4 // 3:
        raise ValueError(f"image: {len(text)} base64 characters; allowed: up to {MAX_IMAGE_BYTES} bytes.")
    try:
        image = Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:  # from the header, before anything is decoded
            raise ValueError(f"{image.width} x {image.height} pixels; allowed: up to {MAX_PIXELS} in all")
        return image.convert("RGB")
    except (ValueError, OSError) as error:
        raise ValueError(f"image: expected base64 of a {', '.join(FORMATS)}; {error}") from None


def encode_png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


mlflow.models.set_model(DeepGenModel())
