"""A DiT and its text encoder that go on from trained ones, though autoencoder and vocabulary are new."""

# C channels of the old latents, E of the new ones, D width of the DiT

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from model.dit import DeepGenTransformer
from model.vae import AnyAutoencoder, encode_images
from model.weights import load_dit, load_vae
from runtime.exits import Plain
from training.text_encoder import PlainTextEncoder


class CannotWarmStart(Plain):
    """The weights that were named to go on from have another shape than the preset's."""


def rebase(dit: DeepGenTransformer, old_vae: AnyAutoencoder, new_vae: AnyAutoencoder, images: Tensor) -> DeepGenTransformer:
    """The same function for the latents of another autoencoder, as far as both are linear maps of each other.

    With new latents z' = A z + b the target of flow matching is noise' - z' = A velocity - b, where noise' = A noise; and the input is
    z = P z' + c. Both maps are the least squares over the latents of `images` (N, 3, H, W) in [-1, 1]. New noise that no old noise maps to,
    as where there are more channels, is dropped at the input.
    """
    old, new = (encode_images(vae, images).movedim(1, -1).flatten(0, -2).double() for vae in (old_vae, new_vae))
    A_EC, b_E = linear_map(old, new)
    P_CE, c_C = linear_map(new, old)
    channels = new.shape[1]
    rebased = type(dit).from_config({**dit.config, "in_channels": channels, "out_channels": channels})
    weights = dit.state_dict()
    patches, bias = weights["pos_embed.proj.weight"].double(), weights["pos_embed.proj.bias"].double()  # (D, C, p, p), (D,)
    weights["pos_embed.proj.weight"] = torch.einsum("dcpq,ce->depq", patches, P_CE).float()
    weights["pos_embed.proj.bias"] = (bias + torch.einsum("dcpq,c->d", patches, c_C)).float()
    p, width = dit.config.patch_size, dit.config.patch_size**2 * channels
    out, bias = (weights[f"proj_out.{name}"].double().unflatten(0, (p, p, -1)) for name in ("weight", "bias"))  # (p, p, C, D), (p, p, C)
    weights["proj_out.weight"] = torch.einsum("ec,pqcd->pqed", A_EC, out).reshape(width, -1).float()
    weights["proj_out.bias"] = (torch.einsum("ec,pqc->pqe", A_EC, bias) - b_E).reshape(width).float()
    rebased.load_state_dict(weights)
    return rebased


def linear_map(x_NC: Tensor, y_NE: Tensor) -> tuple[Tensor, Tensor]:
    """The least squares A (E, C), b (E,) of y = A x + b."""
    x0, y0 = x_NC.mean(0), y_NE.mean(0)
    A = torch.linalg.lstsq(x_NC - x0, y_NE - y0, driver="gelsd").solution.T
    return A, y0 - A @ x0


@torch.no_grad()
def carry_words(encoder: PlainTextEncoder, weights: dict[str, Tensor], old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase) -> None:
    """Load a trained text encoder's `weights`: rows of words, positions and places that both encoders have. Others stay."""
    own = encoder.state_dict()
    old_rows, new_rows = old.get_vocab(), new.get_vocab()
    words = [word for word in new_rows if word in old_rows]
    own["words.weight"][[new_rows[word] for word in words]] = weights["words.weight"][[old_rows[word] for word in words]]
    for name in ("positions", "places"):
        rows = min(len(own[name]), len(weights[name]))
        own[name][:rows] = weights[name][:rows]
    encoder.load_state_dict(weights | {name: own[name] for name in ("words.weight", "positions", "places")})


def warm_start(
    folder: Path,
    fresh: DeepGenTransformer,
    encoder: PlainTextEncoder,
    vae: AnyAutoencoder,
    tokenizer: PreTrainedTokenizerBase,
    images: Tensor,
) -> DeepGenTransformer:
    """The DiT in `folder` (transformer, vae, tokenizer, text_encoder.safetensors) for `vae`, with `fresh`'s settings; words into `encoder`.

    Raises:
        CannotWarmStart: naming tensors of another shape than `fresh` has.
    """
    old = load_dit(folder / "transformer", torch.float32, reference_offset=fresh.config.reference_offset)
    dit = rebase(old, load_vae(folder / "vae", torch.float32), vae, images)
    refuse_shapes(folder / "transformer", dit, fresh)
    weights = load_file(folder / "text_encoder.safetensors")
    carry_words(encoder, weights, AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True), tokenizer)
    return dit


def refuse_shapes(folder: Path, found: nn.Module, wanted: nn.Module) -> None:
    shapes, expected = ({name: tuple(value.shape) for name, value in part.state_dict().items()} for part in (found, wanted))
    odd = sorted(name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name))
    if odd:
        raise CannotWarmStart(
            f"{folder}: {odd[0]} is {shapes.get(odd[0])}, the preset's is {expected.get(odd[0])} ({len(odd)} differ). "
            "Set warm_start: null in foundation/params.yaml to begin with fresh weights."
        )
