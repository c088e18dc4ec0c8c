"""Images from a model folder, and checks of the model itself.

python -m model generate "PROMPT" --model FOLDER --out x.png | edit IMAGE "INSTRUCTION" --model FOLDER --out y.png
python -m model summary --preset NAME | check-reference FILE... | adopt PUBLISHED --base FOLDER --out FOLDER
"""

import argparse
import sys
from pathlib import Path

from runtime.environment import set_environment
from runtime.files import write_atomic


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m model", description="Images from a model folder, and checks of the model itself.")
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
        verb.add_argument("--solver", default="euler", choices=("euler", "dpm++"))
        verb.add_argument("--size", type=int, default=None, help="pixels a side; by default the image's, or the model's own")
    summary = verbs.add_parser("summary", help="parameters by part, what trains in each stage, memory; allocates nothing")
    summary.add_argument("--preset", default=None, help="a name in presets/; by default params.yaml")
    check = verbs.add_parser("check-reference", help="our code on tensors of the reference implementation")
    check.add_argument("files", type=Path, nargs="+")
    adopt = verbs.add_parser("adopt", help="published weights into a model folder of ours")
    adopt.add_argument("published", type=Path, help="state dict (.pt, .safetensors), or a folder in diffusers' layout")
    adopt.add_argument("--base", type=Path, help="model folder of the same shapes, for a state dict")
    adopt.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    set_environment()
    verbs_of = {"summary": summarise, "check-reference": check_reference, "adopt": adopt_published}
    try:
        verbs_of.get(arguments.verb, run)(arguments)
    except (OSError, ValueError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)


def summarise(arguments: argparse.Namespace) -> None:
    from model.summary import summarise

    root = Path(__file__).parents[1]
    presets = {path.stem: path for path in sorted((root / "presets").glob("*.yaml"))}
    if arguments.preset not in (None, *presets):
        raise ValueError(f"no preset {arguments.preset!r}; expected one of {', '.join(presets)}.")
    for line in summarise(presets.get(arguments.preset, root / "params.yaml")):
        print(line)


def check_reference(arguments: argparse.Namespace) -> None:
    from model.reference import check_file, print_agreements

    print_agreements(arguments.files, check_file)


def adopt_published(arguments: argparse.Namespace) -> None:
    from model.published import adopt, load_release, read_state
    from model.weights import load_model, save_model

    if arguments.out.exists():
        raise ValueError(f"{arguments.out} exists; name a new folder.")
    if arguments.published.is_dir():
        model = load_release(arguments.published)
    elif arguments.base is None:
        raise ValueError("a state dict needs --base, a model folder of the same shapes.")
    else:
        model = load_model(arguments.base)
        adopt(model, read_state(arguments.published))
    save_model(model, arguments.out)
    print(arguments.out)


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
        solver=arguments.solver,
    ).images
    buffer = io.BytesIO()
    images[0].save(buffer, format="PNG")
    write_atomic(arguments.out, buffer.getvalue())
    print(arguments.out)


if __name__ == "__main__":
    main()
