"""What JPEG, PNG and WebP files say of themselves, read from their bytes before a decoder sees them."""

import struct
from typing import Literal

Format = Literal["JPEG", "PNG", "WEBP"]
FORMATS: tuple[Format, ...] = ("JPEG", "PNG", "WEBP")
JPEG_BEGIN, JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
PNG_BEGIN = b"\x89PNG\r\n\x1a\n"


def format_of(content: bytes) -> Format | None:
    """By the first bytes, whatever the file is called; a file cut inside them counts as what it begins."""
    if content[:3] == JPEG_BEGIN[: len(content)]:
        return "JPEG"
    if content[:8] == PNG_BEGIN[: len(content)]:
        return "PNG"
    if content[:4] == b"RIFF"[: len(content)] and content[8:12] == b"WEBP"[: max(len(content) - 8, 0)]:
        return "WEBP"
    return None


def webp_size(content: bytes) -> tuple[int, int]:
    """Width and height a WebP header claims, (0, 0) where it is broken. Pillow tells them only after making room for the pixels."""
    chunk = content[12:16] if len(content) >= 30 else b""
    if chunk == b"VP8X":
        return int.from_bytes(content[24:27], "little") + 1, int.from_bytes(content[27:30], "little") + 1
    if chunk == b"VP8L":
        bits = int.from_bytes(content[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if chunk == b"VP8 ":
        width, height = struct.unpack_from("<HH", content, 26)
        return width & 0x3FFF, height & 0x3FFF
    return 0, 0


def png_depth(content: bytes) -> int:
    """Bits a channel of a PNG; Pillow's modes tell 8 from 16 only where the image is gray."""
    return content[24] if len(content) > 24 else 8


def is_cut(content: bytes, format: Format) -> bool:
    """Whether the file ends before its own structure does. A decoder may pass one: no pixel lies in PNG's end mark."""
    if format == "PNG":
        return _png_is_cut(content)
    if format == "WEBP":
        return len(content) < 12 or int.from_bytes(content[4:8], "little") + 8 > len(content)
    return _jpeg_is_cut(content)


def _png_is_cut(content: bytes) -> bool:
    at = len(PNG_BEGIN)
    while at + 12 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, at)
        if kind == b"IEND":
            return False
        at += 12 + length
    return True


def _jpeg_is_cut(content: bytes) -> bool:
    """No end mark after the first scan; a thumbnail inside a segment before it has an end mark of its own."""
    at = 2
    for _ in range(10_000):  # a whole file has some dozens of segments
        at = content.find(b"\xff", at)
        if at < 0 or at + 4 > len(content):
            return True
        marker = content[at + 1]
        if marker == 0xDA:  # scans follow
            return content.rfind(JPEG_END) < at
        alone = marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD9
        at += 1 if alone else 2 + int.from_bytes(content[at + 2 : at + 4], "big")
    return True
