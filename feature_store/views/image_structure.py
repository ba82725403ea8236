"""Limits on an encoded image's structure, checked before it is decoded.

A file of a few megabytes can cost minutes or gigabytes at any number of pixels: JPEG scans that repeat, millions
of empty blocks, metadata that overlaps. Each format is walked as its decoder would; the time is that of a memory scan.
"""

import re
import struct
from collections.abc import Iterator

from feature_store.errors import ImageError

# Pillow takes microseconds and up to 0.5 kB for each; the largest images of cameras have some thousands.
MAX_BLOCKS = 65_536
# libtiff's limit for JPEG; encoders write 1 to 20.
MAX_SCANS = 100
# A scan costs 0.5 to 20 ns per pixel: the largest image may have 20, a smaller one more.
SCANS_OF_LARGEST = 20
# What Pillow decodes in Python, 0.2 to 0.5 us per byte: plain PPM, PPM whose maximum is not 255, BMP with run lengths.
MAX_SLOW_BYTES = 4 << 20

_STANDALONE = frozenset({0x01, *range(0xD0, 0xD8)})  # JPEG markers without a length: TEM, RST0 to RST7
_METADATA = frozenset({*range(0xE1, 0xEE), 0xEF, 0xFE})  # APPn and COM; JFIF (E0) and Adobe (EE) tell of colours
_FRAME = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})  # SOFn: not DHT, JPG, DAC
_SOS, _EOI = 0xDA, 0xD9
_MARKER = re.compile(rb"\xff[^\x00\xff]")
_MARKER_IN_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # restarts belong to a scan
_SPACE = rb"(?>(?:\s|#[^\r\n]*[\r\n])+)"
_SIZE = (_SPACE + rb"\d+") * 2
_FAST_PPM = re.compile(rb"(?:P4%b|P[56]%b%b255|P5%b%b65535)\s" % (_SIZE, _SIZE, _SPACE, _SIZE, _SPACE))
_TIFF_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_TIFF_FOLDERS = (34665, 34853, 40965)  # Exif, GPS, interoperability


def bounded_image(data: bytes, max_pixels: int) -> bytes:
    """An image whose decoding cost is bounded by its pixels and bytes: the same, or without metadata.

    Args:
        data: The encoded image, of any format.
        max_pixels: Pixels of the largest image accepted.

    Raises:
        ImageError: Its structure is beyond a limit.
    """
    if data.startswith(b"\xff\xd8\xff"):
        return _jpeg(data, max_pixels)
    if data.startswith((b"GIF87a", b"GIF89a")):
        return _gif(data)
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        _check_png(data)
    elif data.startswith((b"II", b"MM")):
        _check_tiff(data)
    elif data.startswith((b"P", b"BM")):
        _check_slow(data)
    return data


def _jpeg(data: bytes, max_pixels: int) -> bytes:
    kept, pixels = [data[:2]], 0
    for code, start, end in _jpeg_segments(data, 2, _MARKER):
        if code == _SOS:
            _check_scans(data, start, pixels, max_pixels)
            return b"".join([*kept, memoryview(data)[start:]])
        if code in _FRAME and end - start >= 9:
            height, width = struct.unpack_from(">HH", data, start + 5)
            pixels = max(pixels, height * width)
        if code not in _METADATA:
            kept.append(data[start:end])
    raise ImageError("image is truncated or damaged: the JPEG has no scan")


def _check_scans(data: bytes, start: int, pixels: int, max_pixels: int) -> None:
    most = min(MAX_SCANS, SCANS_OF_LARGEST * max_pixels // max(1, pixels))
    if data.count(b"\xff\xda", start) <= most:  # these bytes may also be in metadata or after the end
        return
    scans = 0
    for code, _, _ in _jpeg_segments(data, start, _MARKER_IN_SCAN):
        scans += code == _SOS
        if scans > most:
            raise ImageError(f"JPEG of {pixels:,} pixels has more than {most} scans; save it as a baseline JPEG")


def _jpeg_segments(data: bytes, at: int, marker: re.Pattern[bytes]) -> Iterator[tuple[int, int, int]]:
    """Marker code, start and end of each segment up to the end of the image; what is no marker is skipped."""
    for _ in range(MAX_BLOCKS):
        if (found := marker.search(data, at)) is None:
            return
        code, start, at = data[found.end() - 1], found.start(), found.end()
        if code == _EOI:
            return
        if code not in _STANDALONE:
            at += int.from_bytes(data[at : at + 2], "big")
            yield code, start, at
    raise _too_many("JPEG segments")


def _gif(data: bytes) -> bytes:
    """The GIF without what stands before its first frame, but for graphic controls."""
    flags = data[10] if len(data) > 10 else 0
    at = 13 + (6 << (flags & 7) if flags & 0x80 else 0)
    kept = [data[:at]]
    for _ in range(MAX_BLOCKS):
        if data[at : at + 1] != b"!":
            return b"".join([*kept, memoryview(data)[at:]]) if data[at : at + 1] == b"," else data[:at]
        start, is_control = at, data[at + 1 : at + 2] == b"\xf9"
        at = _gif_blocks_end(data, at + 2)
        if is_control:
            kept.append(data[start:at])
    raise _too_many("GIF extensions")


def _gif_blocks_end(data: bytes, at: int) -> int:
    for _ in range(MAX_BLOCKS):
        length = data[at] if at < len(data) else 0
        at += 1 + length
        if not length:
            return at
    raise _too_many("GIF comment blocks")


def _check_png(data: bytes) -> None:
    at = 8
    for _ in range(MAX_BLOCKS):
        if at + 8 > len(data) or data[at + 4 : at + 8] == b"IEND":
            return
        at += 12 + int.from_bytes(data[at : at + 4], "big")
    raise _too_many("PNG chunks")


def _check_tiff(data: bytes) -> None:
    order = "<" if data[:1] == b"I" else ">"
    big = data[2:4] in (b"+\0", b"\0+")
    number, entry, first = ("Q", "HHQ", 8) if big else ("L", "HHL", 4)
    try:
        folders = list(struct.unpack_from(order + number, data, first))
        for folder in folders:  # grows
            (count,) = struct.unpack_from(order + ("Q" if big else "H"), data, folder)
            if count > MAX_BLOCKS or len(folders) > MAX_BLOCKS:
                raise _too_many("TIFF tags")
            at, total, step = folder + (8 if big else 2), 0, 20 if big else 12
            for start in range(at, at + count * step, step):
                tag, kind, values = struct.unpack_from(order + entry, data, start)
                size = _TIFF_BYTES.get(kind, 0)
                total += size * values
                if size > 1 and values > MAX_BLOCKS:
                    raise _too_many(f"values in TIFF tag {tag}")
                if total > len(data):
                    raise ImageError("TIFF tags claim more bytes than the file has")
                if tag in _TIFF_FOLDERS:
                    folders += struct.unpack_from(order + number, data, start + (12 if big else 8))
    except struct.error:  # cut short, which its decoder says better
        return


def _check_slow(data: bytes) -> None:
    """Refuse a large file that has no fast decoder, or a header that is no shorter."""
    if len(data) <= MAX_SLOW_BYTES:
        return
    if data.startswith(b"BM"):
        fast = data[30:34] not in (b"\1\0\0\0", b"\2\0\0\0")  # RLE8, RLE4
    else:
        fast = _FAST_PPM.match(data, 0, MAX_BLOCKS) is not None
    if not fast:
        raise ImageError(
            f"BMP with run lengths, or PPM in plain text or with a maximum other than 255, has {len(data):,} bytes, "
            f"at most {MAX_SLOW_BYTES:,} are accepted; save it as PNG"
        )


def _too_many(what: str) -> ImageError:
    return ImageError(f"image has more than {MAX_BLOCKS:,} {what}; save it again")
