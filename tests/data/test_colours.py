import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from data.images import decode_image
from data.records import Reason
from tests.data.encoded import NOISE, SMOOTH, encode, pixels_of, prepare, refusal


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_all_eight_orientations_show_the_same_pixels(format: str):
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(format, {})
    upright = np.concatenate([SMOOTH, SMOOTH])  # 64 x 128, which no bucket holds as it is
    shown = pixels_of(encode(upright, format, **options)).astype(int)
    turn = Image.Transpose
    undone = [turn.FLIP_LEFT_RIGHT, turn.ROTATE_180, turn.FLIP_TOP_BOTTOM, turn.TRANSPOSE, turn.ROTATE_90, turn.TRANSVERSE, turn.ROTATE_270]
    for orientation, undo in enumerate(undone, start=2):
        exif = Image.Exif()
        exif[0x0112] = orientation
        content = encode(Image.fromarray(upright).transpose(undo), format, exif=exif, **options)
        assert ImageOps.exif_transpose(Image.open(io.BytesIO(content))).size == (64, 128)
        image = prepare(content)
        assert (image.found_width, image.found_height) == (64, 128) and image.changes[0] == "oriented"
        assert np.abs(decode_image(image.content, "x") - shown).max() <= (6 if format == "JPEG" else 0)
    exif[0x0112] = 1
    assert prepare(encode(NOISE, format, exif=exif)).changes == ()


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_impossible_orientation_leaves_the_pixels_and_is_told(orientation: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = prepare(encode(NOISE, exif=exif))
    assert image.changes == ("exif_ignored",)
    np.testing.assert_array_equal(decode_image(image.content, "x"), NOISE)


def test_broken_exif_and_broken_profiles_leave_the_pixels_and_are_told():
    image = prepare(encode(NOISE, exif=b"Exif\0\0no tags at all", icc_profile=b"no profile at all"))
    assert image.changes == ("icc_ignored", "exif_ignored")
    np.testing.assert_array_equal(decode_image(image.content, "x"), NOISE)
    assert prepare(encode(NOISE, "JPEG", icc_profile=bytes(10_000_000))).changes == ("icc_ignored",)
    assert refusal(encode(NOISE, icc_profile=bytes(10_000_000))) is Reason.TOO_MANY_BYTES  # packed to a thousandth of what it unpacks to


def test_a_profile_of_another_kind_of_colour_is_ignored():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    gray = srgb.replace(b"RGB XYZ ", b"GRAYXYZ ").replace(b"rTRC", b"kTRC")
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    assert prepare(encode(NOISE, icc_profile=gray)).changes == prepare(encode(NOISE, icc_profile=lab)).changes == ("icc_ignored",)
    assert prepare(encode(NOISE[:, :, 0], icc_profile=gray)).changes == ()
    assert prepare(encode(Image.fromarray(NOISE).convert("CMYK"), "JPEG", icc_profile=srgb)).changes == ("icc_ignored", "cmyk_to_rgb")


def test_a_profile_is_followed_to_srgb():
    swapped = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, blue = swapped.index(b"rXYZ"), swapped.index(b"bXYZ")
    swapped[red : red + 4], swapped[blue : blue + 4] = b"bXYZ", b"rXYZ"  # its red primary is blue light
    image = prepare(encode(SMOOTH, icc_profile=bytes(swapped)))
    assert image.changes == ("icc_to_srgb",)
    assert np.abs(decode_image(image.content, "x").astype(int) - SMOOTH[:, :, ::-1]).max() <= 2
    assert "icc_profile" not in Image.open(io.BytesIO(image.content)).info


def test_sixteen_bits_become_eight_by_the_high_byte():
    gradient = (np.arange(64 * 64, dtype=np.uint16) * 16).reshape(64, 64)
    content = encode(gradient)
    assert Image.open(io.BytesIO(content)).mode.startswith("I;16")
    assert prepare(content).changes == ("sixteen_bit_scaled", "gray_to_rgb")
    np.testing.assert_array_equal(pixels_of(content), np.repeat((gradient >> 8).astype(np.uint8)[:, :, None], 3, axis=2))


def test_what_is_transparent_becomes_white():
    half = np.dstack([NOISE, np.full((64, 64), 128, np.uint8)])
    expected = NOISE * (128 / 255) + 255 * (127 / 255)
    assert np.abs(pixels_of(encode(half)) - expected).max() <= 1
    assert prepare(encode(half)).changes == ("alpha_over_white",)
    gray = encode(half[:, :, [0, 3]])
    assert np.abs(pixels_of(gray) - expected[:, :, :1]).max() <= 1

    palette = Image.new("P", (64, 64), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.paste(0, (0, 0, 64, 32))
    content = encode(palette, transparency=0)
    assert prepare(content).changes == ("palette_to_rgb", "alpha_over_white")
    assert pixels_of(content)[0, 0].tolist() == [255] * 3 and pixels_of(content)[63, 0].tolist() == [10, 20, 30]

    key = encode(Image.new("RGB", (64, 64), (1, 2, 3)), transparency=(1, 2, 3))
    assert (pixels_of(key) == 255).all()


@pytest.mark.parametrize(
    "depth, kind, value", [(4, 0, 5), (16, 0, 0x1234), (16, 2, 0x1234)], ids=["gray of 4", "gray of 16", "colour of 16"]
)
def test_a_transparent_colour_is_scaled_like_the_pixels(depth: int, kind: int, value: int):
    channels = 3 if kind == 2 else 1
    row = b"\x55" * 32 if depth == 4 else struct.pack(">H", value) * channels * 64
    header = b"IHDR" + struct.pack(">IIBBBBB", 64, 64, depth, kind, 0, 0, 0)
    chunks = [header, b"tRNS" + struct.pack(">H", value) * channels, b"IDAT" + zlib.compress((b"\0" + row) * 64), b"IEND"]
    content = b"".join(struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    assert (pixels_of(b"\x89PNG\r\n\x1a\n" + content) == 255).all()


def test_cmyk_becomes_rgb():
    colour = Image.new("CMYK", (64, 64), (255, 0, 0, 0))
    image = prepare(encode(colour, "JPEG", quality=100))
    assert image.changes == ("cmyk_to_rgb",) and image.extension == "jpg"
    assert np.abs(decode_image(image.content, "x").astype(int) - [0, 255, 255]).max() <= 3


def test_a_mode_without_a_rule_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("data.images.MODES", ("RGB",))
    assert refusal(encode(NOISE[:, :, 0])) is Reason.MODE_UNSUPPORTED


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_of_an_animation_the_first_frame_is_taken(format: str):
    frames = [Image.fromarray(NOISE), Image.fromarray(255 - NOISE), Image.fromarray(SMOOTH)]
    content = encode(frames[0], format, save_all=True, append_images=frames[1:], **({"lossless": True} if format == "WEBP" else {}))
    assert prepare(content).changes == ("first_frame",)
    np.testing.assert_array_equal(pixels_of(content), NOISE)
