"""Images: from encoded bytes as found to what a shard holds, and from a shard to pixels.

An image is kept byte for byte where nothing about it had to change; otherwise it is made upright sRGB over white, scaled to cover its
bucket, cropped, and encoded again with no metadata. What was done is named in `PreparedImage.changes`.
"""

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import simplejpeg
import xxhash
from PIL import Image, UnidentifiedImageError

from data.colours import GRAY, MODES, to_srgb
from data.config import MAX_PIXELS, ImageRules
from data.containers import FORMATS, Format, format_of, is_cut, png_depth, webp_size
from data.duplicates import SIDE, perceptual_hash
from data.records import Reason
from runtime.exits import Plain
from runtime.files import sha256_bytes

Bucket = tuple[int, int]  # width, height

EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
ORIENTATION = 0x0112
UPRIGHT_BY = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TEXT_BOMB = re.compile(r"Decompressed data too large|Too much memory used in text chunks")


# Bombs are refused by our own, stricter cap, and of broken metadata we keep nothing. Here and not around each call: catch_warnings changes
# what other threads see.
warnings.filterwarnings("ignore", module=r"PIL\b")


class BadImage(Plain):
    """Bytes that are no image we take. `reason` says why, the message names the file."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(reason, message)  # both, so that it crosses to another process
        self.reason, self.message = reason, message

    def __str__(self) -> str:
        return self.message


class WrongBuffer(ValueError):
    """The caller's array is not what the image needs: no fault of the image."""


@dataclass(frozen=True)
class PreparedImage:
    """An image as a shard holds it.

    found_width, found_height: pixels once upright, before scaling; sha256 of `content`, found_sha256 of the bytes as found; pixel_hash:
    XXH3-128 of the upright RGB pixels before scaling and their size, which tells equal pictures and guards against nobody;
    perceptual_hash: 64 bits of how the pixels as stored look, or of pixel_hash where they show next to nothing; changes: what was done, in
    order; empty where the bytes are those found.
    """

    content: bytes
    extension: str
    width: int
    height: int
    found_width: int
    found_height: int
    sha256: str
    found_sha256: str
    pixel_hash: str
    perceptual_hash: int
    changes: tuple[str, ...]


def buckets(image_size: int, multiple: int = 32, max_aspect: float = 4.0) -> tuple[Bucket, ...]:
    """Sizes of about image_size**2 pixels, sides multiples of `multiple`, from the square to `max_aspect` : 1 and 1 : `max_aspect`."""
    if image_size % multiple:
        raise ValueError(f"image_size: {image_size} given; expected a multiple of {multiple}, so that a square image has a bucket")
    found = set()
    for short in range(multiple, image_size + 1, multiple):
        long = (2 * image_size**2 + short * multiple) // (2 * short * multiple) * multiple  # rounded to the nearest multiple
        if long <= max_aspect * short:
            found |= {(long, short), (short, long)}
    return tuple(sorted(found))


def nearest_bucket(width: int, height: int, buckets: Sequence[Bucket]) -> Bucket:
    """The bucket whose aspect is nearest by ratio: the one that crops least."""

    def mismatch(bucket: Bucket) -> float:
        across, down = width * bucket[1], height * bucket[0]
        return max(across, down) / min(across, down)

    return min(buckets, key=mismatch)


def prepare_image(content: bytes, name: str, rules: ImageRules, buckets: Sequence[Bucket], lossless: bool = False) -> PreparedImage:
    """Encoded bytes as found -> what a shard holds. Equal bytes give equal results.

    Args:
        name: where the bytes are from, for messages.
        buckets: sizes to choose from; one only where an edit must have its source's size.
        lossless: never through a lossy encoder, as drawn text needs.

    Raises:
        BadImage: with its reason; broken bytes before small or long images.
    """
    if not content:
        raise BadImage(Reason.ZERO_BYTES, f"{name}: no bytes; expected an image file")
    if len(content) > rules.max_bytes:
        raise BadImage(Reason.TOO_MANY_BYTES, f"{name}: {len(content):,} bytes; allowed: up to {rules.max_bytes:,} (max_bytes)")
    with _decoding(content, name):
        image, format = _open(content, name, rules.max_pixels)
        gray = image.mode in GRAY
        upright, changes = _upright_rgb(image, format, content)
    found_height, found_width, _ = upright.shape
    _check_shape(found_width, found_height, name, rules)
    fitted, scaled = _fit(upright, nearest_bucket(found_width, found_height, buckets))
    changes += scaled
    found_sha256 = sha256_bytes(content)
    if not changes:
        stored, extension = content, EXTENSIONS[format]
    else:
        changes += ["gray_to_rgb"] if gray else []
        extension = "jpg" if format == "JPEG" and not lossless else "png"
        stored = _encode_jpeg(fitted, rules.jpeg_quality) if extension == "jpg" else encode_png(fitted)
    pixel_hash = _pixel_hash(upright)
    looks = perceptual_hash(_small_gray(fitted))
    return PreparedImage(
        content=stored,
        extension=extension,
        width=fitted.shape[1],
        height=fitted.shape[0],
        found_width=found_width,
        found_height=found_height,
        sha256=sha256_bytes(stored) if changes else found_sha256,
        found_sha256=found_sha256,
        pixel_hash=pixel_hash,
        perceptual_hash=int(pixel_hash[:16], 16) if looks is None else looks,
        changes=tuple(changes),
    )


def decode_image(content: bytes, name: str, out: np.ndarray | None = None) -> np.ndarray:
    """Encoded bytes -> uint8 (H, W, 3), in `out` where it is given: contiguous, uint8, of just that shape.

    Raises:
        BadImage: naming `name`: not JPEG, PNG or WebP, cut short, or of more than 50 million pixels by its header.
        WrongBuffer: `out` is not of the image's shape.
    """
    with _decoding(content, name):
        if format_of(content) == "JPEG":  # the loader's hot path: Pillow takes longer to open a file than libjpeg over its header
            height, width, space, _ = simplejpeg.decode_jpeg_header(content)
            _check_pixels((width, height), name, MAX_PIXELS)
            if space != "CMYK" and space != "YCCK":
                _check_buffer(out, (height, width, 3), name)
                return simplejpeg.decode_jpeg(content, "RGB", buffer=out)
        image, _ = _open(content, name, MAX_PIXELS)
        pixels = np.asarray(image.convert("RGB"))
    if out is None:
        return pixels
    _check_buffer(out, pixels.shape, name)
    np.copyto(out, pixels)
    return out


def _check_buffer(out: np.ndarray | None, shape: tuple[int, ...], name: str) -> None:
    if out is not None and (out.shape != shape or out.dtype != np.uint8 or not out.flags.c_contiguous):
        raise WrongBuffer(f"{name}: out is {out.dtype} {out.shape}; expected contiguous uint8 {shape}")


def encode_png(image: np.ndarray) -> bytes:
    """uint8 (H, W, 3) -> PNG; equal pixels give equal bytes."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=6)
    return buffer.getvalue()


def _encode_jpeg(image: np.ndarray, quality: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=quality, subsampling="4:4:4")
    return buffer.getvalue()


@contextmanager
def _decoding(content: bytes, name: str) -> Iterator[None]:
    """Whatever a decoder makes of hostile bytes leaves as BadImage. Running out of memory is not the image's fault and passes."""
    try:
        yield
    except (BadImage, WrongBuffer, MemoryError):
        raise
    except Exception as error:  # SyntaxError, EOFError, struct.error, OverflowError: all were seen
        format = format_of(content)
        if isinstance(error, Image.DecompressionBombError):
            reason = Reason.TOO_MANY_PIXELS
        elif TEXT_BOMB.search(str(error)):
            reason = Reason.TOO_MANY_BYTES
        elif format is not None and is_cut(content, format):
            reason = Reason.TRUNCATED
        else:
            reason = Reason.DECODE_FAILED
        problem = "no header that Pillow can read" if isinstance(error, UnidentifiedImageError) else error  # its own holds an address
        raise BadImage(reason, f"{name}: {problem}; expected a whole {', '.join(FORMATS)} file") from error


def _open(content: bytes, name: str, max_pixels: int) -> tuple[Image.Image, Format]:
    """Read the header and judge the file by it; nothing is decoded, no room is made for pixels."""
    format = format_of(content)
    if format is None:
        raise BadImage(Reason.FORMAT_UNSUPPORTED, f"{name}: begins with {content[:12]!r}; expected a {', '.join(FORMATS)} file")
    if format == "WEBP":
        _check_pixels(webp_size(content), name, max_pixels)
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    _check_pixels(image.size, name, max_pixels)
    if is_cut(content, format):
        raise BadImage(Reason.TRUNCATED, f"{name}: the {format} file ends at byte {len(content)}, before its end mark; fetch it again")
    if image.mode not in MODES:
        raise BadImage(Reason.MODE_UNSUPPORTED, f"{name}: Pillow reads it as mode {image.mode}; allowed: {', '.join(MODES)}")
    return image, format


def _check_pixels(size: tuple[int, int], name: str, max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise BadImage(Reason.TOO_MANY_PIXELS, f"{name}: {width} x {height} pixels by its header; allowed: up to {max_pixels:,}")


def _check_shape(width: int, height: int, name: str, rules: ImageRules) -> None:
    short, long = sorted((width, height))
    if short < rules.min_side:
        raise BadImage(Reason.TOO_SMALL, f"{name}: {width} x {height} pixels; min_side is {rules.min_side}")
    if long > rules.max_aspect * short:
        aspect = f"{width} x {height} pixels, {long / short:.2f} : 1"
        raise BadImage(Reason.ASPECT, f"{name}: {aspect}; max_aspect is {rules.max_aspect}")


def _upright_rgb(image: Image.Image, format: Format, content: bytes) -> tuple[np.ndarray, list[str]]:
    """Decode the whole first frame -> uint8 (H, W, 3) as it is to be looked at, and what was done to it."""
    changes = []
    if getattr(image, "n_frames", 1) > 1:
        changes.append("first_frame")
    if format == "JPEG" and image.mode in ("L", "RGB"):
        pixels = _decode_jpeg(content, image.size, "GRAY" if image.mode == "L" else "RGB")
        if image.mode == "RGB" and not {"icc_profile", "exif"} & image.info.keys():
            return pixels, changes  # most of all images, without a copy
        decoded = Image.fromarray(pixels.squeeze(-1) if image.mode == "L" else pixels)
        decoded.info = image.info
    else:
        image.load()
        decoded = image
    orientation = _orientation(image)  # after decoding: PNG may hold EXIF behind its pixels
    rgb, coloured = to_srgb(decoded, png_depth(content) if format == "PNG" else 8)
    changes += coloured
    if orientation is None:
        changes.append("exif_ignored")
    elif orientation in UPRIGHT_BY:
        changes.append("oriented")
        rgb = rgb.transpose(UPRIGHT_BY[orientation])
    return np.asarray(rgb), changes


def _orientation(image: Image.Image) -> int | None:
    """1 to 8 by EXIF, 1 where there is none, None where it can't be read."""
    try:
        exif = Image.Exif()
        exif.load(image.info.get("exif", b""))
        orientation = exif.get(ORIENTATION, 1)
    except MemoryError:
        raise
    except Exception:  # as for pixels: broken EXIF raises anything
        return None
    return orientation if orientation in range(1, 9) else None


def _decode_jpeg(content: bytes, size: tuple[int, int], space: str, out: np.ndarray | None = None) -> np.ndarray:
    """uint8 (H, W, 3), or (H, W, 1) for GRAY. The pixels are Pillow's.

    Whatever libjpeg only warns of is an error: it tells the first warning alone, and that may hide one of wrong pixels.
    """
    height, width, _, _ = simplejpeg.decode_jpeg_header(content)
    if (width, height) != size:
        raise ValueError(f"two sizes in one file: {size[0]} x {size[1]} and {width} x {height}")
    return simplejpeg.decode_jpeg(content, space, buffer=out)


def _fit(image: np.ndarray, bucket: Bucket) -> tuple[np.ndarray, list[str]]:
    """Scale both sides alike until the bucket is covered, and cut what sticks out, half at each end."""
    (height, width, _), (across, down) = image.shape, bucket
    if (width, height) == bucket:
        return image, []
    scale = max(across / width, down / height)
    kept_width, kept_height = min(across / scale, width), min(down / scale, height)
    left, top = (width - kept_width) // 2, (height - kept_height) // 2  # whole pixels, so that a mere crop copies them
    box = (left, top, left + kept_width, top + kept_height)
    changes = ["cropped"] if (kept_width, kept_height) != (width, height) else []
    if scale != 1:
        changes.append("resized")
    return np.asarray(Image.fromarray(image).resize(bucket, Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)), changes


def _pixel_hash(image: np.ndarray) -> str:
    digest = xxhash.xxh3_128(f"{image.shape[1]}x{image.shape[0]}".encode())
    digest.update(np.ascontiguousarray(image).data)
    return digest.hexdigest()


def _small_gray(image: np.ndarray) -> np.ndarray:
    """Sums over 32 x 32 equal blocks of a bucket's pixels, whose sides are multiples of 32: what `perceptual_hash` looks at."""
    height, width, _ = image.shape
    wide_enough = np.uint16 if height <= 257 * SIDE else np.uint32
    rows = image.reshape(SIDE, height // SIDE, width * 3).sum(axis=1, dtype=wide_enough)
    return rows.reshape(SIDE, SIDE, -1).sum(axis=2, dtype=np.uint32) / (height * width * 3 // SIDE**2)
