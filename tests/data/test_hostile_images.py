import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.config import ImageRules
from data.images import BadImage, decode_image, prepare_image
from data.records import Reason
from tests.data.encoded import BUCKETS, NOISE, RULES, SMOOTH, encode, prepare, refusal

SAMPLES = Path(__file__).resolve().parents[3] / "shared" / "samples"


def png_claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises width x height pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + b"\0\0\0\0IDAT"


def webp_claiming(width: int, height: int) -> bytes:
    chunk = b"VP8X" + struct.pack("<I", 10) + bytes(4) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF" + struct.pack("<I", len(chunk) + 4) + b"WEBP" + chunk


def jpeg_claiming(width: int, height: int) -> bytes:
    whole = encode(NOISE, "JPEG")
    at = whole.index(b"\xff\xc0") + 5
    return whole[:at] + struct.pack(">HH", height, width) + whole[at + 4 :]


@pytest.mark.parametrize("size", [(8000, 8000), (12000, 12000), (20000, 20000), (2**31 - 1, 1)])
def test_a_bomb_is_refused_by_its_header(size: tuple[int, int]):
    assert refusal(png_claiming(*size)) is Reason.TOO_MANY_PIXELS
    with pytest.raises(BadImage, match="the bomb"):
        decode_image(png_claiming(*size), "the bomb")


def test_bombs_are_refused_before_there_is_room_for_their_pixels(tmp_path: Path):
    (tmp_path / "zeros.png").write_bytes(encode(Image.new("L", (7200, 7200))))
    program = (
        "import resource, sys; from tests.data.test_hostile_images import *\n"
        "bombs = [png_claiming(12000, 12000), webp_claiming(16383, 16383), jpeg_claiming(65000, 65000), webp_claiming(9000, 9000),\n"
        "         (Path(sys.argv[1]) / 'zeros.png').read_bytes()]\n"
        "prepare(encode(NOISE, 'WEBP')); before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert [refusal(bomb, RULES) for bomb in bombs] == [Reason.TOO_MANY_PIXELS] * 5\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=root, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 20_000, f"{done.stdout} kB were claimed"


def test_a_bomb_of_text_is_refused():
    content = encode(NOISE)
    chunk = b"zTXtComment\0\0" + zlib.compress(bytes(20_000_000))
    bomb = content[:33] + struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + content[33:]
    assert refusal(bomb) is Reason.TOO_MANY_BYTES


CUT = {"jpeg": ("JPEG", {}), "progressive": ("JPEG", {"progressive": True}), "png": ("PNG", {}), "webp": ("WEBP", {})}


@pytest.mark.parametrize("kind", CUT)
def test_an_image_cut_short_anywhere_is_refused(kind: str):
    format, options = CUT[kind]
    whole = encode(SMOOTH, format, **options)
    reasons = [refusal(whole[:end]) for end in range(1, len(whole))]
    assert set(reasons) <= {Reason.TRUNCATED, Reason.DECODE_FAILED}
    assert reasons.count(Reason.TRUNCATED) > 0.9 * len(reasons)
    for end in range(0, len(whole), 7):
        with pytest.raises(BadImage, match="row 7"):
            decode_image(whole[:end], "row 7")


def test_damage_inside_a_whole_file_is_no_truncation():
    png = bytearray(encode(NOISE))
    png[len(png) // 2] ^= 1
    jpeg = encode(NOISE, "JPEG")
    emptied = jpeg[: len(jpeg) // 2] + bytes(200) + jpeg[len(jpeg) // 2 + 200 :]
    assert refusal(bytes(png)) is Reason.DECODE_FAILED and refusal(emptied) is Reason.DECODE_FAILED


def test_a_jpeg_that_two_decoders_size_differently_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("simplejpeg.decode_jpeg_header", lambda content: (64, 65, "YCbCr", "420"))
    assert refusal(encode(NOISE, "JPEG")) is Reason.DECODE_FAILED


def test_flipped_bits_end_in_an_image_or_a_reason():
    for format in ("JPEG", "PNG", "WEBP"):
        whole, dice = encode(SMOOTH, format), np.random.default_rng(1)
        for at in dice.integers(0, len(whole), 300):
            flipped = bytearray(whole)
            flipped[at] ^= 1 << dice.integers(8)
            try:
                prepare(bytes(flipped))
            except BadImage as error:
                assert error.reason.ending in ("quarantined", "dropped")


def test_other_formats_are_refused():
    for content in (encode(NOISE, "GIF"), b"%PDF-1.7", b"%!PS-Adobe-3.0 EPSF-3.0", b"<svg/>", b"<html>", b"PK\3\4"):
        assert refusal(content) is Reason.FORMAT_UNSUPPORTED
        with pytest.raises(BadImage):
            decode_image(content, "x")
    assert refusal(b"") is Reason.ZERO_BYTES


def test_each_limit_has_its_reason():
    content = encode(NOISE[:40])
    assert refusal(content, ImageRules(max_bytes=len(content) - 1)) is Reason.TOO_MANY_BYTES
    assert refusal(content, ImageRules(max_pixels=64 * 40 - 1)) is Reason.TOO_MANY_PIXELS
    assert refusal(content, ImageRules(min_side=41)) is Reason.TOO_SMALL
    assert refusal(content, ImageRules(min_side=1, max_aspect=1.5)) is Reason.ASPECT
    exact = ImageRules(max_bytes=len(content), max_pixels=64 * 40, min_side=40, max_aspect=1.6)
    assert prepare(content, exact).found_height == 40


def test_running_out_of_memory_is_not_the_images_fault(monkeypatch: pytest.MonkeyPatch):
    def fail(*args: object, **options: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(MemoryError):
        prepare(encode(NOISE))


def test_a_refusal_crosses_to_another_process_with_its_reason():
    error = BadImage(Reason.ASPECT, "row 7: too long")
    again = type(error)(*error.args)
    assert (again.reason, str(again)) == (Reason.ASPECT, "row 7: too long") and error.__reduce__()[1] == error.args


EXPECTED = {
    "truncated/thumbor_BlueSquare_truncated.jpg": Reason.TRUNCATED,
    "truncated/skimage_truncated.jpg": Reason.TRUNCATED,
    "truncated/sharp_corrupt-header.jpg": Reason.TRUNCATED,
    "truncated/pillow_broken.png": Reason.TRUNCATED,
    "truncated/pillow_broken_data_stream.png": Reason.TRUNCATED,
    "truncated/thumbor_image_invalid_1byte.jpg": Reason.FORMAT_UNSUPPORTED,
    "bomb/pillow_png_decompression_dos.png": Reason.TOO_MANY_BYTES,
    "bomb/pillow_decompression_bomb.gif": Reason.FORMAT_UNSUPPORTED,
    "bomb/pillow_reallybig.bmp": Reason.FORMAT_UNSUPPORTED,
    "jpeg_bad/pillow_jpeg_ff00_header.jpg": Reason.DECODE_FAILED,
    "extreme_shape/thumbor_940x2.png": Reason.ASPECT,
    "extreme_shape/thumbor_1x1.png": ("resized",),
    "color_mode/sharp_full-transparent.png": ("palette_to_rgb", "alpha_over_white", "resized"),
    "color_mode/thumbor_cmyk.jpg": ("cmyk_to_rgb", "resized"),
    "color_mode/thumbor_grayscale-icc.jpg": ("icc_to_srgb", "resized", "gray_to_rgb"),
    "animated/pillow_frame_size.mpo": ("first_frame", "icc_to_srgb", "cropped", "resized"),
    "jpeg_bad/pillow_invalid-exif.jpg": ("exif_ignored", "resized"),
    "exif_orientation/pillow_hopper_orientation_5.webp": ("oriented", "resized"),
    "names/image": ("cropped", "resized"),
    "bit_depth/Nikon-D300-12bit_srgb8_dt.png": (),
}


def test_every_file_met_in_the_wild_ends_in_an_image_or_a_reason():
    if not SAMPLES.is_dir():
        pytest.skip("shared samples are absent")
    files = [file for folder in ("odd_images", "photos") for file in sorted((SAMPLES / folder).rglob("*")) if file.is_file()]
    ends: dict[str, object] = {}
    for file in files:
        try:
            image = prepare_image(file.read_bytes(), file.name, RULES, BUCKETS)
        except BadImage as error:
            ends[str(file)] = error.reason
        else:
            assert decode_image(image.content, file.name).shape == (image.height, image.width, 3)
            ends[str(file)] = image.changes
    assert len(ends) == len(files) > 200
    assert {name: ends[str(SAMPLES / "odd_images" / name)] for name in EXPECTED} == EXPECTED


def test_photographs_in_eight_orientations_look_alike():
    if not SAMPLES.is_dir():
        pytest.skip("shared samples are absent")
    files = sorted((SAMPLES / "odd_images" / "exif_orientation").glob("pillow_hopper_orientation_*"))
    hashes = [prepare(file.read_bytes()).perceptual_hash for file in files]
    assert len(files) == 8 and max((a ^ b).bit_count() for a in hashes for b in hashes) <= 4
