"""decode_image: every pixel mode with its colours, every kind of damage with its reason, no warnings."""

import contextlib
import io
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from feature_store.errors import ImageError, InputError
from feature_store.views import decode_image

NOISE = np.random.default_rng(0).integers(0, 256, (24, 30, 3), dtype=np.uint8)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def colour_of(data):
    image = decode_image(data)
    assert image.mode == "RGB"
    assert image.info == {}
    return image.getpixel((0, 0))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM", "TIFF"])
def test_decode_keeps_every_pixel_when_format_is_lossless(kind):
    np.testing.assert_array_equal(np.asarray(decode_image(encoded(Image.fromarray(NOISE), kind))), NOISE)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0, "quality": 95}])
def test_decode_equals_pillow_when_image_is_jpeg(options):
    data = encoded(Image.fromarray(NOISE), "JPEG", **options)
    np.testing.assert_array_equal(np.asarray(decode_image(data)), np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize(
    ("image", "colour"),
    [
        (Image.new("L", (4, 3), 77), (77, 77, 77)),
        (Image.new("1", (4, 3), 1), (255, 255, 255)),
        (Image.new("LA", (4, 3), (77, 10)), (77, 77, 77)),
        (Image.new("RGBA", (4, 3), (10, 20, 30, 0)), (10, 20, 30)),
    ],
)
def test_decode_keeps_colour_and_drops_alpha_when_mode_is_not_rgb(image, colour):
    assert colour_of(encoded(image)) == colour


@pytest.mark.parametrize("transparency", [None, 0, bytes([0, 128, 255])])
def test_decode_uses_palette_when_image_has_one(transparency):
    image = Image.new("P", (4, 3), 1)
    image.putpalette([1, 2, 3, 40, 50, 60, 7, 8, 9])
    options = {} if transparency is None else {"transparency": transparency}
    assert colour_of(encoded(image, **options)) == (40, 50, 60)


@pytest.mark.parametrize(("mode", "transparency"), [("L", 77), ("RGB", (77, 77, 77))])
def test_decode_keeps_colour_when_it_is_declared_transparent(mode, transparency):
    colour = 77 if mode == "L" else (77, 77, 77)
    assert colour_of(encoded(Image.new(mode, (4, 3), colour), transparency=transparency)) == (77, 77, 77)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_decode_converts_when_image_is_cmyk(kind):
    red, green, blue = colour_of(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), kind))  # red ink
    assert red > 245
    assert max(green, blue) < 10


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
@pytest.mark.parametrize(("value", "expected"), [(0, 0), (255, 1), (32896, 128), (40000, 156), (65535, 255)])
def test_decode_scales_when_image_has_16_bits(kind, value, expected):
    image = Image.fromarray(np.full((3, 4), value, np.uint16))
    assert colour_of(encoded(image, kind)) == (expected,) * 3


def test_decode_scales_when_16_bits_are_big_endian():
    data = encoded(Image.frombytes("I;16B", (2, 1), struct.pack(">HH", 40000, 65535)), "TIFF")
    assert np.asarray(decode_image(data))[0, :, 0].tolist() == [156, 255]


@pytest.mark.parametrize("value", [-1, 65536])
def test_decode_refuses_when_integers_exceed_16_bits(value):
    data = encoded(Image.fromarray(np.full((3, 4), value, np.int32)), "TIFF")
    with pytest.raises(ImageError, match=f"values {value} to {value}, expected 0 to 65535"):
        decode_image(data)


@pytest.mark.parametrize(("values", "message"), [([-1, 7], "-1 to 7"), ([7, 65536], "7 to 65536")])
def test_decode_refuses_when_a_single_integer_exceeds_16_bits(values, message):
    data = encoded(Image.fromarray(np.array([values], np.int32)), "TIFF")
    with pytest.raises(ImageError, match=f"values {message}, expected"):
        decode_image(data)


def test_decode_scales_when_32_bit_integers_are_within_16_bits():
    data = encoded(Image.fromarray(np.array([[0, 40000, 65535]], np.int32)), "TIFF")
    assert np.asarray(decode_image(data))[0].tolist() == [[0] * 3, [156] * 3, [255] * 3]


@pytest.mark.parametrize(("kind", "colour"), [(0, (100, 50, 20)), (1, (199, 99, 39)), (2, (100, 50, 20))])
def test_decode_keeps_colours_when_a_tiff_has_a_fourth_sample(kind, colour):
    """One that means nothing, alpha the colours are multiplied with, alpha they are not."""
    data = encoded(Image.new("RGBA", (4, 3), (100, 50, 20, 128)), "TIFF")
    at = data.index(struct.pack("<HHL", 338, 3, 1))  # ExtraSamples
    changed = data[: at + 8] + struct.pack("<H", kind) + data[at + 10 :]
    assert colour_of(changed) == colour


def test_decode_raises_memory_errors_as_they_are(monkeypatch):
    """The image may be good: it must not be quarantined."""

    def load(_):
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(MemoryError):
        decode_image(encoded(Image.fromarray(NOISE), "BMP"))


@pytest.mark.parametrize(("mode", "colour"), [("F", 0.5), ("LAB", (50, 10, 10))])
def test_decode_refuses_and_names_mode_when_it_has_no_rgb_meaning(mode, colour):
    with pytest.raises(ImageError, match=f"mode {mode} has no one meaning"):
        decode_image(encoded(Image.new(mode, (4, 3), colour), "TIFF"))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_decode_takes_first_frame_when_image_is_animated(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert colour_of(data) == (255, 0, 0)


def test_decode_leaves_orientation_when_exif_asks_for_a_turn():
    image = Image.new("RGB", (8, 4))
    exif = image.getexif()
    exif[0x0112] = 6  # turn by 90 degrees
    assert decode_image(encoded(image, "JPEG", exif=exif)).size == (8, 4)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}), ("BMP", {}), ("PPM", {}),
     ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("GIF", {})],
)  # fmt: skip
def test_decode_raises_or_is_whole_when_image_is_cut_anywhere(kind, options):
    data = encoded(Image.fromarray(NOISE), kind, **options)
    whole = np.asarray(decode_image(data))
    refused = 0
    for length in range(0, len(data), 7):
        try:
            pixels = np.asarray(decode_image(data[:length]))
        except ImageError:
            refused += 1
        else:  # only bytes after the last pixel were cut off
            assert length > 0.95 * len(data)
            np.testing.assert_array_equal(pixels, whole)
    assert refused > 0.95 * len(data) / 7


@given(position=st.integers(0, 10_000), value=st.integers(0, 255))
@settings(max_examples=150, deadline=None)
def test_decode_gives_image_or_image_error_when_a_byte_is_damaged(position, value):
    for kind in ("PNG", "GIF", "BMP"):
        data = bytearray(encoded(Image.fromarray(NOISE), kind))
        data[position % len(data)] = value
        with contextlib.suppress(ImageError):
            assert decode_image(bytes(data), max_pixels=1_000_000).mode == "RGB"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty: 0 bytes"),
        (b"<!DOCTYPE html><html>", "not an image in one of JPEG, .* begins with b'<!DOCTYP'"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image in one of"),
        (encoded(Image.fromarray(NOISE))[:300], "cannot be decoded: OSError: .*truncated"),
    ],
)
def test_decode_says_what_was_wrong_when_bytes_are_no_image(data, reason):
    with pytest.raises(ImageError, match=reason):
        decode_image(data)


def png_chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


@pytest.mark.parametrize("side", [9_000, 13_000, 60_000])  # below Pillow's limits, where it warns, where it refuses
def test_decode_refuses_before_decoding_when_image_is_a_bomb(side):
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(bytes(1000)))
    with pytest.raises(ImageError, match=rf"{side} x {side} pixels, at most|exceeds limit"):
        decode_image(bomb, max_pixels=1_000_000)


def test_decode_refuses_when_pixels_exceed_the_limit_by_one():
    with pytest.raises(ImageError, match="30 x 24 pixels, at most 719 are accepted"):
        decode_image(encoded(Image.fromarray(NOISE)), max_pixels=719)


def test_decode_accepts_when_pixels_equal_the_limit():
    assert decode_image(encoded(Image.fromarray(NOISE)), max_pixels=720).size == (30, 24)


def test_decode_refuses_to_start_when_pillow_passes_truncated_images(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(InputError, match="LOAD_TRUNCATED_IMAGES is true, expected false") as caught:
        decode_image(encoded(Image.fromarray(NOISE)))
    assert not isinstance(caught.value, ImageError)  # or every sample of the run would be quarantined


def test_decode_restores_warning_filters_when_threads_decode(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)  # NOISE's 720 pixels make Pillow warn
    data = encoded(Image.fromarray(NOISE))
    before = list(warnings.filters)
    with ThreadPoolExecutor(4) as threads:
        sizes = {image.size for image in threads.map(decode_image, [data] * 200)}
    assert sizes == {(30, 24)}
    assert warnings.filters == before
    with pytest.raises(Image.DecompressionBombWarning):
        Image.open(io.BytesIO(data))
