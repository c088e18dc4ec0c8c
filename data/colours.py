"""One rule for each way a file may hold colour: sRGB of 8 bits over white. What a rule did is named; nothing is left to a decoder."""

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
GRAY = ("1", "L", "LA", *SIXTEEN_BIT)
MODES = (*GRAY, "P", "PA", "RGB", "RGBA", "RGBX", "CMYK")
SOURCE_MODE = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # of an ICC colour space
SAME_LEVELS = 2  # of 255; profiles that call themselves sRGB differ by up to this


def to_srgb(image: Image.Image, depth: int = 8) -> tuple[Image.Image, list[str]]:
    """A loaded image in one of MODES -> mode RGB, and what was done to its colours.

    Args:
        depth: bits a channel in the file, where Pillow's mode does not say.
    """
    changes = []
    profile = image.info.get("icc_profile", b"")
    gray = image.mode in GRAY
    if image.mode in SIXTEEN_BIT or depth == 16:
        image = _high_byte(image)
        changes.append("sixteen_bit_scaled")
    elif image.mode == "L" and depth < 8 and "transparency" in image.info:
        image.info["transparency"] = image.info["transparency"] * 255 // (2**depth - 1)  # Pillow scales the pixels, not this
    if image.mode in ("P", "PA"):
        changes.append("palette_to_rgb")
    alpha = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    colour = image if image.mode in ("RGB", "CMYK") else image.convert("RGB")
    if profile != b"":  # Pillow says None for one that it could not unpack
        colour, change = _through_profile(colour, profile, gray)
        changes += change
    if image.mode == "CMYK":
        changes.append("cmyk_to_rgb")
        colour = colour.convert("RGB")
    if alpha is not None:
        changes.append("alpha_over_white")
        colour = Image.composite(colour, Image.new("RGB", colour.size, "white"), alpha)
    return colour, changes


def _high_byte(image: Image.Image) -> Image.Image:
    """16 bits -> 8 by the high byte, as Pillow itself reads 16-bit colour; a transparent colour goes the same way."""
    key = image.info.get("transparency")
    if image.mode in SIXTEEN_BIT:
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if key is not None:
        image.info["transparency"] = tuple(value >> 8 for value in key) if isinstance(key, tuple) else key >> 8
    return image


def _through_profile(colour: Image.Image, profile: bytes | None, gray: bool) -> tuple[Image.Image, list[str]]:
    """RGB or CMYK by an ICC profile -> sRGB; a profile that can't be used leaves the pixels as they are."""
    try:
        mode, transform = _transform(profile or b"")
        if mode != colour.mode and not (mode == "L" and gray):
            raise ValueError(f"a profile of mode {mode} on an image of mode {colour.mode}")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, KeyError):
        return colour, ["icc_ignored"]
    if transform is None:
        return colour, []
    converted = transform.apply(colour.getchannel("R") if mode == "L" else colour)
    return converted, ["icc_to_srgb"]


@lru_cache(maxsize=16)
def _transform(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """The mode that a profile speaks of, and its way to sRGB: None where that would change nothing, whatever the profile's name."""
    opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    mode = SOURCE_MODE[opened.profile.xcolor_space.strip()]
    transform = ImageCms.buildTransform(
        opened,
        ImageCms.createProfile("sRGB"),
        mode,
        "RGB",
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    if mode == "CMYK":
        return mode, transform
    probe = _probe(mode)
    difference = np.asarray(transform.apply(probe)).astype(int) - np.asarray(probe.convert("RGB"))
    return mode, transform if np.abs(difference).max() > SAME_LEVELS else None


def _probe(mode: str) -> Image.Image:
    """Every gray, or a 9 x 9 x 9 grid of colours."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    levels = np.linspace(0, 255, 9).astype(np.uint8)
    return Image.fromarray(np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(27, 27, 3))
