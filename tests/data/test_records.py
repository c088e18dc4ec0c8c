import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from data.config import PartConfig
from data.records import BadImage, decode_image, encode_png
from data.sources import read_record

PIXELS = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def png_claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises width x height pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + b"\0\0\0\0IDAT"


def test_an_image_comes_back_as_it_was_encoded():
    np.testing.assert_array_equal(decode_image(encode_png(PIXELS), "x"), PIXELS)
    assert encode_png(PIXELS) == encode_png(PIXELS.copy())


@pytest.mark.parametrize("size", [(8000, 8000), (12000, 12000), (20000, 20000), (2**31 - 1, 1)])
def test_a_bomb_is_refused_by_its_header(size):
    with pytest.raises(BadImage, match="the bomb"):
        decode_image(png_claiming(*size), "the bomb")


def test_an_image_cut_short_anywhere_is_refused_by_name():
    whole = encode_png(PIXELS)
    for end in range(0, len(whole) - 20, len(whole) // 50):  # the last bytes are an end mark without pixels
        with pytest.raises(BadImage, match="row 7"):
            decode_image(whole[:end], "row 7")


def test_other_formats_are_refused():
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, format="GIF")
    for content in (buffer.getvalue(), b"%PDF-1.7", b"%!PS-Adobe-3.0 EPSF-3.0", b"<svg/>", b""):
        with pytest.raises(BadImage):
            decode_image(content, "x")


def test_a_key_is_sixteen_hex_digits_of_the_content():
    part = PartConfig(source="drawn", task="image_edit", split="train", samples=2, licence="CC0-1.0")
    first, again, other = (read_record("edits", part, i) for i in (0, 0, 1))
    assert first.key == again.key != other.key
    assert len(first.key) == 16
    assert set(first.key) <= set("0123456789abcdef")
