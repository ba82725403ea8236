"""Decodes image bytes to RGB, or gives the reason of a refusal."""

import io
import threading
import warnings

import numpy as np
from PIL import Image, ImageFile

from feature_store.errors import ImageError, InputError
from feature_store.views.image_structure import bounded_image

# Pillow knows more formats, some of which start other programs (EPS); these are what image tars hold.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF")
MAX_PIXELS = 178_956_970  # where Pillow itself refuses: 0.5 GB as RGB

_CONVERTIBLE = frozenset({"1", "L", "P", "PA", "LA", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"})


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode one image to RGB, the same way wherever pixels are needed.

    Alpha and palette transparency are dropped and the colour beneath is kept, as torchvision's loader does.
    16-bit grey is scaled to 8 bits. Of an animation, the first frame is taken. EXIF orientation is not
    applied: ImageNet's published numbers were made without it.

    Args:
        data: A JPEG, PNG, WebP, BMP, PPM, TIFF or GIF file.
        max_pixels: Refuse images with more pixels than this, before decoding them.

    Raises:
        ImageError: The bytes are no image, are damaged or cut short, or are of a kind that has no one meaning
            in 8-bit RGB, or take more time or memory than their pixels. The message is the reason.
        InputError: Pillow is set to pass truncated images.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise InputError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is true, expected false: images cut short would turn grey unnoticed; "
            "set it to False"
        )
    if not data:
        raise ImageError("image is empty: 0 bytes")
    try:
        bounded = bounded_image(data, max_pixels)
        with _quiet_pillow, Image.open(io.BytesIO(bounded), formats=FORMATS) as image:
            _check_size(image.size, max_pixels)
            image.load()
            return _to_rgb(image)
    except (ImageError, MemoryError):  # memory is the machine's trouble: the image may be good
        raise
    except Image.UnidentifiedImageError as error:
        raise ImageError(
            f"not an image in one of {', '.join(FORMATS)}, or its header is damaged: begins with {data[:8]!r}"
        ) from error
    except Exception as error:  # a damaged file makes Pillow raise nearly anything
        raise ImageError(f"image cannot be decoded: {type(error).__name__}: {error}") from error


def decoding_work(data: bytes, max_pixels: int = MAX_PIXELS) -> int:
    """Pixels a decoder passes over, each once per JPEG scan, from an image's header; 0 if it will be refused anyway."""
    try:
        bounded = bounded_image(data, max_pixels)
        with _quiet_pillow, Image.open(io.BytesIO(bounded), formats=FORMATS) as image:
            scans = bounded.count(b"\xff\xda") if image.format == "JPEG" else 1
            return image.width * image.height * max(1, scans)
    except Exception:  # noqa: BLE001 - a damaged file makes Pillow raise nearly anything
        return 0


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    if size[0] * size[1] > max_pixels:
        raise ImageError(f"image has {size[0]} x {size[1]} pixels, at most {max_pixels:,} are accepted")


def _to_rgb(image: Image.Image) -> Image.Image:
    image.info.clear()  # a transparent colour named here would make convert() treat that colour differently
    if image.mode == "RGB":
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _scale_16_bit(np.asarray(image))
    if image.mode in ("RGBa", "La"):  # colours are premultiplied by alpha
        image = image.convert(image.mode.upper())
    if image.mode not in _CONVERTIBLE:
        raise ImageError(f"image mode {image.mode} has no one meaning in RGB; convert it to 8 bits")
    return image.convert("RGB")


def _scale_16_bit(values: np.ndarray) -> Image.Image:
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise ImageError(f"integer image has values {low} to {high}, expected 0 to 65535 (16 bits)")
    grey = (values.astype(np.uint32) * 255 + 32767) // 65535
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


class _QuietPillow:
    """Ignores Pillow's warnings while any thread decodes: filters belong to the process, not to a thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._filters = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._filters.__exit__(None, None, None)


_quiet_pillow = _QuietPillow()
