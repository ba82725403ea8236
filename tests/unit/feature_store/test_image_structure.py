"""Images that cost far more than their pixels are refused or lose metadata; good ones keep their pixels."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from feature_store.errors import ImageError
from feature_store.views import decode_image

NOISE = np.random.default_rng(0).integers(0, 256, (24, 30, 3), np.uint8)
SOS = b"\xff\xda"


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg(**options):
    return encoded(Image.fromarray(NOISE), "JPEG", **options)


def progressive(size, scans):
    """A progressive JPEG whose last scan is repeated."""
    data = encoded(Image.new("RGB", size), "JPEG", progressive=True, quality=1)
    last = data[data.rindex(SOS) : -2]
    return data[:-2] + last * (scans - data.count(SOS)) + data[-2:]


def segment(code, content):
    return b"\xff" + bytes([code]) + struct.pack(">H", len(content) + 2) + content


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


GIF_HEAD = b"GIF89a" + struct.pack("<HHBBB", 8, 8, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
GIF_FRAME = (
    b"\x2c" + struct.pack("<HHHHB", 0, 0, 8, 8, 0) + bytes.fromhex("02168c2d99872a1cdc33a00275ec95faa8de608c04914c0100")
)


def png(before=b"", after=b""):
    data = encoded(Image.fromarray(NOISE), "PNG")
    return data[:33] + before + data[33:-12] + after + data[-12:]


def tiff(*tags, order="<", size=400):
    folder = struct.pack(order + "H", len(tags)) + b"".join(struct.pack(order + "HHLL", *tag) for tag in tags)
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HL", 42, 8)
    return (head + folder + bytes(4)).ljust(size, b"\0")


def test_decode_refuses_when_jpeg_scans_repeat():
    with pytest.raises(ImageError, match="JPEG of 900 pixels has more than 100 scans"):
        decode_image(progressive((30, 30), 101))


def test_decode_accepts_as_many_jpeg_scans_as_the_limit():
    assert decode_image(progressive((30, 30), 100)).size == (30, 30)


def test_decode_refuses_when_scans_and_pixels_together_are_beyond_the_largest_image():
    assert decode_image(progressive((300, 300), 20), max_pixels=90_000).size == (300, 300)
    with pytest.raises(ImageError, match="JPEG of 90,000 pixels has more than 20 scans"):
        decode_image(progressive((300, 300), 21), max_pixels=90_000)


def test_decode_refuses_when_scans_repeat_behind_restart_markers_and_tables():
    data = encoded(Image.new("RGB", (30, 30)), "JPEG", progressive=True)
    again = b"\xff\xd0\xff\x00" + data[data.rindex(b"\xff\xc4") : -2]  # a table and a scan
    with pytest.raises(ImageError, match="more than 100 scans"):
        decode_image(data[:-2] + again * 120 + data[-2:])


@pytest.mark.parametrize(
    "data",
    [
        jpeg(progressive=True)[:-2] + b"\xff\xd9" + SOS * 5000,
        jpeg()[:2] + segment(0xE1, b"Exif\0\0" + SOS * 500) + jpeg()[2:],
        jpeg(progressive=True).replace(b"\xff\xc4", segment(0xFE, SOS * 200) + b"\xff\xc4"),
    ],
    ids=["after the end", "in Exif", "in comments"],
)
def test_decode_accepts_jpeg_when_bytes_of_a_scan_marker_are_elsewhere(data):
    assert decode_image(data).size == (30, 24)


@pytest.mark.parametrize(
    "extra",
    [segment(0xE1, b"Exif\0\0" + b"a" * 60) * 60_000, segment(0xE2, b"a" * 60_000) * 300, b"\xab" * 4_000_000,
     b"\xff" * 4_000_000, segment(0xE2, b"MPF\0II*\0\x08\0\0\0" + b"\xff" * 90), b"\xff\x00" * 4_000_000],
    ids=["Exif", "profile", "bytes that are no marker", "fill bytes", "MPO index", "stuffed bytes"],
)  # fmt: skip
def test_decode_gives_the_same_pixels_when_jpeg_has_costly_metadata(extra):
    data = jpeg()
    np.testing.assert_array_equal(decode_image(data[:20] + extra + data[20:]), decode_image(data))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_decode_gives_pillows_pixels_when_jpeg_has_colour_segments(mode):
    data = encoded(Image.fromarray(NOISE).convert(mode), "JPEG", quality=90, comment=b"x", icc_profile=b"y" * 200)
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(decode_image(data), image.convert("RGB"))


@pytest.mark.parametrize("kind", ["MPO", "JPEG"])
def test_decode_takes_first_picture_when_jpeg_holds_several(kind):
    second = Image.new("RGB", (8, 8))
    options = {"save_all": True, "append_images": [second]} if kind == "MPO" else {}
    data = encoded(Image.fromarray(NOISE), kind, **options) + encoded(second, "JPEG")
    np.testing.assert_array_equal(decode_image(data), decode_image(jpeg()))


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (jpeg()[:2] + segment(0xFE, b"") * 70_000 + jpeg()[2:], "JPEG segments"),
        (jpeg()[:2] + segment(0xDB, bytes(65)) * 70_000 + jpeg()[2:], "JPEG segments"),
        (GIF_HEAD + b"\x21\xfe\x01a\0" * 70_000 + GIF_FRAME + b";", "GIF extensions"),
        (GIF_HEAD + b"\x21\xfe" + b"\x01a" * 70_000 + b"\0" + GIF_FRAME + b";", "GIF comment blocks"),
        (png(before=chunk(b"prIv", b"") * 70_000), "PNG chunks"),
        (png(after=chunk(b"prIv", b"") * 70_000), "PNG chunks"),
        (png(before=chunk(b"IDAT", b"") * 70_000), "PNG chunks"),
        (tiff((256, 4, 1, 1), (257, 4, 1, 70_000), (273, 4, 70_000, 200), size=300_000), "values in TIFF tag 273"),
        (tiff((258, 3, 70_000, 200), order=">", size=300_000), "values in TIFF tag 258"),
    ],
)
def test_decode_refuses_when_an_image_has_too_many_parts(data, what):
    with pytest.raises(ImageError, match=f"more than 65,536 {what}"):
        decode_image(data)


@pytest.mark.parametrize("order", ["<", ">"])
def test_decode_refuses_when_tiff_tags_overlap(order):
    overlapping = tiff(*((tag, 7, 900, 100) for tag in range(1000, 1010)), order=order, size=2000)
    with pytest.raises(ImageError, match="TIFF tags claim more bytes than the file has"):
        decode_image(overlapping)


def big_tiff(*tags, order="<", size=400, version=43):
    folder = struct.pack(order + "Q", len(tags)) + b"".join(struct.pack(order + "HHQQ", *tag) for tag in tags)
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HHHQ", version, 8, 0, 16)
    return (head + folder + bytes(8)).ljust(size, b"\0")


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ([(tag, 7, 900, 100) for tag in range(1000, 1010)], "TIFF tags claim more bytes than the file has"),
        ([(273, 16, 70_000, 200)], "more than 65,536 values in TIFF tag 273"),
        ([(34665, 16, 1, 16)], "more than 65,536 TIFF tags"),  # a folder that holds itself
    ],
)
def test_decode_refuses_when_tags_of_a_big_tiff_are_beyond_the_limits(tags, message, order):
    with pytest.raises(ImageError, match=message):
        decode_image(big_tiff(*tags, order=order, size=2000 if "claim" in message else 600_000))


@pytest.mark.parametrize("kind", [3, 8, 4, 9, 11, 13, 5, 10, 12, 16, 17, 18])
def test_decode_counts_the_bytes_of_every_type_of_tiff_value(kind):
    size = {3: 2, 8: 2, 4: 4, 9: 4, 11: 4, 13: 4}.get(kind, 8)
    fitting, beyond = (tiff((1000, kind, 1000 // size + more, 100), size=1000) for more in (0, 1))
    with pytest.raises(ImageError, match="TIFF tags claim more"):
        decode_image(beyond)
    with pytest.raises(ImageError, match="not an image|cannot be decoded"):  # it has no pixels either
        decode_image(fitting)


def test_decode_refuses_when_tags_of_a_tiff_folder_inside_overlap():
    inner = struct.pack("<H", 3) + b"".join(struct.pack("<HHLL", tag, 7, 900, 100) for tag in (1, 2, 3)) + bytes(4)
    data = tiff((34665, 4, 1, 1000), size=1000) + inner.ljust(1000, b"\0")
    with pytest.raises(ImageError, match="TIFF tags claim more bytes"):
        decode_image(data)


def test_decode_refuses_when_tiff_folders_form_a_ring():
    with pytest.raises(ImageError, match="more than 65,536 TIFF tags"):
        decode_image(tiff((34665, 4, 1, 8)))


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"])
@pytest.mark.parametrize("big", [False, True])
def test_decode_gives_pillows_pixels_when_tiff_is_good(compression, big):
    data = encoded(Image.fromarray(NOISE), "TIFF", compression=compression, big_tiff=big)
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(decode_image(data), image.convert("RGB"))


def test_decode_gives_pillows_pixels_when_gif_has_comments_and_a_small_transparent_frame():
    control = b"\x21\xf9\x04\x01\0\0\x01\0"  # colour 1 is transparent, and what lies around the frame has it
    head = b"GIF89a" + struct.pack("<HHBBB", 16, 16, 0x80, 0, 0) + b"\0\0\0\xff\x80\x40"
    comments = b"\x21\xfe\x03abc\0" * 100
    plain, full = (head + extra + GIF_FRAME + b";" for extra in (control, comments + control + comments))
    with Image.open(io.BytesIO(plain)) as image:
        expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(decode_image(full), expected)
    assert {tuple(colour) for colour in expected.reshape(-1, 3)} == {(0, 0, 0), (255, 128, 64)}


SLOW = 5 << 20


@pytest.mark.parametrize(
    "data",
    [
        b"P6\n#" + b"a" * SLOW + b"\n8 8 255\n" + bytes(192),
        b"P6\n" + b" " * SLOW + b"8 8 255\n" + bytes(192),
        b"P6 2000 2000 254\n" + bytes(SLOW * 3),
        b"P6 1400 1300 65535\n" + bytes(SLOW * 3),
        b"P3 2000 2000 255\n" + b"0 " * SLOW,
        b"P1 2000 4000\n" + b"1" * SLOW,
        b"BM" + bytes(12) + struct.pack("<IiiHHII", 40, 64, 64, 1, 8, 1, SLOW) + b"\0\2\0\0" * (SLOW // 4),
        b"BM" + bytes(12) + struct.pack("<IiiHHII", 40, 64, 64, 1, 4, 2, SLOW) + b"\0\2\0\0" * (SLOW // 4),
    ],
    ids=["comment", "spaces", "odd maximum", "16 bits", "plain text", "plain bits", "run lengths", "of 4 bits"],
)
def test_decode_refuses_when_a_large_file_has_only_a_slow_decoder(data):
    with pytest.raises(ImageError, match="at most 4,194,304 are accepted; save it as PNG"):
        decode_image(data)


@pytest.mark.parametrize("header", [b"P6\n# made by\n1800 1900\n255\n", b"P5 2000 2000 65535\n", b"P5 3000 3000 255\n",
                                    b"P4 8000 6000\n"])  # fmt: skip
def test_decode_accepts_large_ppm_when_its_decoder_is_fast(header):
    assert decode_image(header + bytes(11_000_000)).mode == "RGB"


def test_decode_accepts_plain_text_when_it_has_as_many_bytes_as_the_limit():
    data = b"P1 4000 1000 ".ljust(4 << 20, b"0")
    assert decode_image(data).size == (4000, 1000)
    with pytest.raises(ImageError, match="has 4,194,305 bytes, at most 4,194,304"):
        decode_image(data + b"0")
