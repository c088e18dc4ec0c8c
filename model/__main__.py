"""python -m model generate "PROMPT" --model FOLDER --out x.png | edit IMAGE "INSTRUCTION" --model FOLDER --out y.png"""

import argparse
import sys
from pathlib import Path

from runtime.environment import set_environment
from runtime.files import write_atomic


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m model", description="Images from a model folder.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    generate = verbs.add_parser("generate", help="an image from a prompt")
    edit = verbs.add_parser("edit", help="an image changed by an instruction")
    edit.add_argument("image", type=Path)
    for verb in (generate, edit):
        verb.add_argument("prompt")
        verb.add_argument("--model", type=Path, required=True, help="model folder")
        verb.add_argument("--out", type=Path, required=True, help="PNG to write")
        verb.add_argument("--seed", type=int, default=0)
        verb.add_argument("--steps", type=int, default=50)
        verb.add_argument("--guidance", type=float, default=1.0)
        verb.add_argument("--size", type=int, default=None, help="pixels a side; by default the image's, or the model's own")
    arguments = parser.parse_args()
    set_environment()
    try:
        run(arguments)
    except (OSError, ValueError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)


def run(arguments: argparse.Namespace) -> None:
    import io

    from PIL import Image

    reference = None
    if arguments.verb == "edit":  # before the heavy imports, so that a wrong path is told at once
        with Image.open(arguments.image, formats=["PNG", "JPEG", "WEBP"]) as opened:
            reference = opened.convert("RGB")

    from model.pipeline import DeepGenPipeline

    pipeline = DeepGenPipeline.from_pretrained(arguments.model)
    side = arguments.size
    if reference is not None and side is not None:
        reference = reference.resize((side, side), Image.Resampling.LANCZOS)
    images = pipeline(
        arguments.prompt,
        image=reference,
        height=side,
        width=side,
        num_inference_steps=arguments.steps,
        guidance_scale=arguments.guidance,
        seed=arguments.seed,
    ).images
    buffer = io.BytesIO()
    images[0].save(buffer, format="PNG")
    write_atomic(arguments.out, buffer.getvalue())
    print(arguments.out)


if __name__ == "__main__":
    main()
