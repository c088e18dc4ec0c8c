import io
import math

import numpy as np
import pytest
from PIL import Image, ImageCms

from data.images import buckets, decode_image, encode_png, nearest_bucket, prepare_image
from tests.data.encoded import BUCKETS, NOISE, RULES, encode, prepare


@pytest.mark.parametrize(
    "content",
    [
        encode(NOISE),
        encode(NOISE, "JPEG", quality=80),
        encode(NOISE, "JPEG", progressive=True),
        encode(NOISE[:, :, 0], "JPEG"),
        encode(NOISE[:, :, 0]),
        encode(NOISE, "WEBP", lossless=True),
        encode(NOISE, icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()),
    ],
    ids=["png", "jpeg", "progressive", "gray jpeg", "gray png", "webp", "srgb profile"],
)
def test_an_image_that_fits_keeps_its_bytes(content: bytes):
    image = prepare(content)
    assert image.content == content and image.changes == () and image.sha256 == image.found_sha256
    assert (image.width, image.height) == (image.found_width, image.found_height) == (64, 64)
    assert prepare(content, lossless=True).content == content
    np.testing.assert_array_equal(decode_image(content, "x"), np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))


def test_what_the_format_is_says_the_content_not_the_name():
    assert prepare_image(encode(NOISE, "JPEG"), "photo.png", RULES, BUCKETS).extension == "jpg"


def test_equal_bytes_give_equal_results_and_no_metadata_survives_encoding():
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a secret place"
    for format, extension in [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "png")]:
        content = encode(NOISE, format, exif=exif)
        first, again = prepare(content), prepare(content)
        assert first == again and first.extension == extension
        assert b"secret" in content and b"secret" not in first.content
        assert not Image.open(io.BytesIO(first.content)).getexif()


def test_lossless_never_passes_through_a_lossy_encoder():
    content = encode(Image.fromarray(NOISE).resize((65, 64)), "JPEG")
    image = prepare(content, lossless=True)
    assert image.extension == "png" and image.changes == ("cropped",)
    np.testing.assert_array_equal(decode_image(image.content, "x"), decode_image(content, "x")[:, :64])
    assert prepare(content).extension == "jpg"


def test_jpeg_is_encoded_without_halving_its_colours():
    image = Image.open(io.BytesIO(prepare(encode(Image.fromarray(NOISE).resize((96, 96)), "JPEG")).content))
    assert {layer[1:3] for layer in image.layer} == {(1, 1)}


# Decoding


def test_a_png_comes_back_as_it_was_encoded():
    np.testing.assert_array_equal(decode_image(encode_png(NOISE), "x"), NOISE)
    assert encode_png(NOISE) == encode_png(NOISE.copy())


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_decoding_fills_the_buffer_it_is_given(format: str):
    content, out = encode(NOISE, format), np.zeros((64, 64, 3), np.uint8)
    decoded = decode_image(content, "x", out)
    assert np.shares_memory(decoded, out)
    np.testing.assert_array_equal(out, decode_image(content, "x"))
    for wrong in (np.zeros((64, 63, 3), np.uint8), np.zeros((64, 64, 3)), np.zeros((64, 128, 3), np.uint8)[:, ::2]):
        with pytest.raises(ValueError, match="expected contiguous uint8"):
            decode_image(content, "x", wrong)


def test_a_cmyk_jpeg_is_decoded_too():
    content = encode(Image.fromarray(NOISE).convert("CMYK"), "JPEG")
    np.testing.assert_array_equal(decode_image(content, "x"), np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))


# Buckets


@pytest.mark.parametrize("image_size", [64, 256, 512, 1024])
def test_buckets_have_the_area_the_multiple_and_the_square(image_size: int):
    sizes = buckets(image_size)
    assert (image_size, image_size) in sizes and {(h, w) for w, h in sizes} == set(sizes)
    for width, height in sizes:
        assert width % 32 == 0 and height % 32 == 0 and max(width / height, height / width) <= 4
        assert abs(width * height / image_size**2 - 1) <= 16 / max(width, height)
    for side in (1, 64, 333, 4000):
        assert nearest_bucket(side, side, sizes) == (image_size, image_size)
    with pytest.raises(ValueError, match="multiple of 32"):
        buckets(100)


def test_both_sides_are_scaled_alike_within_one_percent():
    dice = np.random.default_rng(2)
    for width, height in dice.integers(100, 700, (40, 2)):
        across, down = np.meshgrid(np.arange(width), np.arange(height))
        ramps = np.stack([across, down, down], axis=-1) * [255 / width, 255 / height, 0]
        image = prepare_image(encode(ramps.round().astype(np.uint8)), "x", RULES, buckets(128))
        seen = decode_image(image.content, "x")[8:-8, 8:-8].astype(float)
        right = np.polyfit(np.arange(seen.shape[1]), seen[:, :, 0].mean(0), 1)[0]
        downwards = np.polyfit(np.arange(seen.shape[0]), seen[:, :, 1].mean(1), 1)[0]
        assert abs(right * width / (downwards * height) - 1) < 0.01, (width, height)
        middle = seen[:, :, :2].mean((0, 1)) / 255 * (width, height)
        assert np.abs(middle - (width / 2, height / 2)).max() < 3, "cropped off centre"


# Sameness


def photo(seed: int, size: int = 256) -> Image.Image:
    """A picture with a photograph's 1/f spectrum."""
    spectrum = np.fft.rfft2(np.random.default_rng(seed).standard_normal((size, size, 3)), axes=(0, 1))
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    frequency[0, 0] = math.inf
    pixels = np.fft.irfft2(spectrum / frequency[:, :, None], axes=(0, 1))
    return Image.fromarray(np.uint8(np.clip(pixels / pixels.std() * 50 + 128, 0, 255)))


def test_a_recompressed_smaller_copy_looks_the_same_and_others_do_not():
    found = [prepare(encode(photo(seed), "JPEG")) for seed in range(30)]
    copies = [prepare(encode(photo(seed).resize((192, 192)), "JPEG", quality=60)) for seed in range(30)]
    apart = [[(a.perceptual_hash ^ b.perceptual_hash).bit_count() for b in copies] for a in found]
    same, others = np.diag(apart), np.array(apart)[~np.eye(30, dtype=bool)]
    assert np.median(same) == 0 and same.max() <= 4
    assert np.percentile(others, 1) > 20 and others.min() > 8


def test_pixel_hash_sees_upright_pixels_and_their_size_whatever_the_file():
    assert prepare(encode(NOISE)).pixel_hash == prepare(encode(NOISE, "WEBP", lossless=True)).pixel_hash
    assert prepare(encode(NOISE[:32])).pixel_hash != prepare(encode(NOISE[:32].reshape(64, 32, 3))).pixel_hash
