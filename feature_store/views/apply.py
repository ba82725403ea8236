"""The view contract: the exact pixels of a sample's v-th augmented view.

A view's parameters are drawn once, when the store is written, and stored beside the features; the trainer
replays the stored ones and never draws again. The steps are always: crop, resize, flip, RandAugment, erase.
Pillow does the pixel work, so its version matters: a CRC-32 of each view's pixels tells when it does.
"""

import zlib

import numpy as np
import PIL
from PIL import Image

from feature_store.errors import InputError, MismatchError
from feature_store.views.augment import FILL, apply_op
from feature_store.views.draws import Box, ViewParams

_INTERPOLATIONS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}

# Noise of erased boxes: ImageNet's mean and standard deviation per RGB channel, in whole 8-bit steps.
_NOISE_MEAN = np.array(FILL, np.int32)
_NOISE_STD = np.array([58, 57, 57], np.int32)


def apply_view(
    image: Image.Image, params: ViewParams, size: int | tuple[int, int], *, out: np.ndarray | None = None
) -> np.ndarray:
    """The view's pixels; the same function for the teacher and for the student.

    The crop is cut out, then resized, as torchvision does it: no pixel outside the crop has influence.

    Args:
        image: The source in RGB, as decode_image gives it.
        params: Parameters of the view.
        size: Side or (H, W) of the view, in pixels.
        out: Where to put them, uint8 [H, W, 3]; default a new array.

    Returns:
        uint8 array [H, W, 3].

    Raises:
        InputError: The image is not RGB, a box does not fit, or an operation or interpolation is unknown.
    """
    height, width = (size, size) if isinstance(size, int) else size
    _require_applicable(image, params, width, height)
    left, top, w, h = map(int, params.crop)
    resample = _INTERPOLATIONS[params.interpolation]
    view = image.crop((left, top, left + w, top + h)).resize((width, height), resample)
    if params.flip:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for op, magnitude in zip(params.ops, params.magnitudes, strict=True):
        view = apply_op(view, int(op), float(magnitude), resample)  # a numpy float32 would round differently
    pixels = np.empty((height, width, 3), np.uint8) if out is None else out
    pixels[:] = np.asarray(view)
    _erase(pixels, params.erase, params.noise_seed)
    return pixels


def pixel_crc(pixels: np.ndarray) -> int:
    """CRC-32 of a view's bytes [H, W, 3] in row-major order."""
    return zlib.crc32(np.ascontiguousarray(pixels))


def check_pixels(pixels: np.ndarray, expected_crc: int, key: str, view: int, written_with: str | None) -> None:
    """Refuse a replayed view whose pixels are not those the teacher saw.

    Args:
        pixels: The replayed view, uint8 [H, W, 3].
        expected_crc: The stored CRC-32.
        key: The sample's key.
        view: View index v.
        written_with: Version of Pillow that wrote the row; None if its record does not say.

    Raises:
        MismatchError: The CRC differs.
    """
    got = pixel_crc(pixels)
    if got == expected_crc:
        return
    if written_with == PIL.__version__:
        remedy = "the source image or its decoding libraries changed: use the tars and environment of the store"
    elif written_with is None:
        remedy = "use the tars and environment of the store, whose commit record names no version of Pillow"
    else:
        remedy = f"install pillow=={written_with}"
    raise MismatchError(
        f"pixels of sample {key!r}, view {view}",
        expected=f"CRC-32 {expected_crc:08x} by Pillow {written_with or 'of unknown version'}",
        got=f"CRC-32 {got:08x} by Pillow {PIL.__version__}",
        remedy=f"{remedy}, or train from materialised views, which need no replay",
    )


def _require_applicable(image: Image.Image, params: ViewParams, width: int, height: int) -> None:
    if image.mode != "RGB":
        raise InputError(f"image has mode {image.mode}, expected RGB; pass what decode_image gives")
    if params.interpolation not in _INTERPOLATIONS:
        raise InputError(
            f"interpolation is {params.interpolation!r}, expected one of {', '.join(_INTERPOLATIONS)}; "
            "use the release that wrote the store"
        )
    if not _fits(params.crop, *image.size) or min(params.crop[2:]) < 1:
        raise InputError(
            f"crop {params.crop} does not fit an image of {image.size} px (left, top, width, height); "
            "the view was drawn for another image: use the tars the store was written from"
        )
    if not _fits(params.erase, width, height):
        raise InputError(
            f"erased box {params.erase} does not fit a view of {(width, height)} px "
            "(left, top, width, height); use the view size of the store's policy"
        )


def _fits(box: Box, width: int, height: int) -> bool:
    left, top, w, h = map(int, box)  # numpy's small integers would overflow
    return min(left, top, w, h) >= 0 and left + w <= width and top + h <= height


def _erase(pixels: np.ndarray, box: Box, noise_seed: int) -> None:
    left, top, width, height = map(int, box)
    if width:
        pixels[top : top + height, left : left + width] = _noise(int(noise_seed), height, width)


def _noise(seed: int, height: int, width: int) -> np.ndarray:
    """Near-normal noise around ImageNet's mean, uint8 [height, width, 3], the same on every machine.

    Integers only: the sum of 12 uniform bytes has mean 1530 and standard deviation 256, near enough normal.
    """
    count = 12 * height * width * 3
    words = np.random.Philox(key=seed).random_raw(-(-count // 8))
    uniform_bytes = words.astype("<u8").view(np.uint8)[:count].reshape(12, height, width, 3)
    deviation = uniform_bytes.sum(axis=0, dtype=np.int32) - 1530
    return np.clip(_NOISE_MEAN + (deviation * _NOISE_STD + 128) // 256, 0, 255).astype(np.uint8)
