"""RandAugment's operations."""

from collections.abc import Callable
from enum import IntEnum

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from feature_store.errors import InputError

FILL = (124, 116, 104)  # ImageNet's mean colour; for pixels from outside the image


class Op(IntEnum):
    """Operations by the number a store holds. Numbers are never reused; a new operation gets a new one."""

    NONE = 0
    AUTO_CONTRAST = 1
    EQUALIZE = 2
    INVERT = 3
    ROTATE = 4
    POSTERIZE = 5
    SOLARIZE = 6
    SOLARIZE_ADD = 7
    COLOR = 8
    CONTRAST = 9
    BRIGHTNESS = 10
    SHARPNESS = 11
    SHEAR_X = 12
    SHEAR_Y = 13
    TRANSLATE_X = 14
    TRANSLATE_Y = 15


CHOICES = tuple(op for op in Op if op is not Op.NONE)

# Largest size of a signed magnitude, reached at the highest level; in the unit of the operation's argument.
_SIGNED_MAXIMUM = {
    Op.ROTATE: 30.0,  # degrees, counter-clockwise
    Op.COLOR: 0.9,  # added to the enhancement factor 1, as for the next three
    Op.CONTRAST: 0.9,
    Op.BRIGHTNESS: 0.9,
    Op.SHARPNESS: 0.9,
    Op.SHEAR_X: 0.3,  # px sideways per px down
    Op.SHEAR_Y: 0.3,  # px down per px sideways
    Op.TRANSLATE_X: 0.45,  # of the image's width
    Op.TRANSLATE_Y: 0.45,  # of the image's height
}


def magnitude_of(op: Op, strength: float, negative: bool) -> float:
    """Argument of an operation at a strength, by timm's "increasing" map (more strength = more change).

    ============================  ==================================================================
    rotate                        ±30 s degrees
    colour, contrast,             ±0.9 s, added to the enhancement factor 1
    brightness, sharpness
    shear x, y                    ±0.3 s
    translate x, y                ±0.45 s of the side
    posterize                     4 - floor(4 s) bits kept, at least 1 (0 is a black image, Pillow 13 refuses it)
    solarize                      256 - floor(256 s): values from here on are inverted
    solarize add                  floor(110 s): added to values under 128
    auto contrast, equalize,      0 (they have none)
    invert
    ============================  ==================================================================

    Args:
        op: The operation.
        strength: s = level / highest level, from 0 to 1.
        negative: Whether a signed magnitude is negative.

    Returns:
        The magnitude, rounded to a float32 so that a store keeps it exactly.
    """
    if op in _SIGNED_MAXIMUM:
        size = float(np.float32(_SIGNED_MAXIMUM[op] * strength))
        return -size if negative and size else size
    if op is Op.POSTERIZE:
        return float(max(1, 4 - int(4 * strength)))
    if op is Op.SOLARIZE:
        return float(256 - int(256 * strength))
    if op is Op.SOLARIZE_ADD:
        return float(int(110 * strength))
    return 0.0


def apply_op(image: Image.Image, op: int, magnitude: float, resample: Image.Resampling) -> Image.Image:
    """The image after one operation; same size and mode.

    Args:
        image: RGB image.
        op: Number of the operation, see Op.
        magnitude: As magnitude_of gives it.
        resample: Interpolation of geometric operations.

    Raises:
        InputError: The number names no operation of this build.
    """
    if op in _AFFINE:
        matrix = _AFFINE[Op(op)](magnitude, *image.size)
        return image.transform(image.size, Image.Transform.AFFINE, matrix, resample, fillcolor=FILL)
    if op == Op.ROTATE:
        return image.rotate(magnitude, resample, fillcolor=FILL)
    if op in _COLOUR:
        return _COLOUR[Op(op)](image, magnitude)
    if op == Op.NONE:
        return image
    raise InputError(
        f"augmentation operation number {op} is unknown, this build knows 0 to {max(Op)}; "
        "use the release that wrote the store"
    )


def _solarize_add(image: Image.Image, amount: float) -> Image.Image:
    table = [min(255, value + int(amount)) if value < 128 else value for value in range(256)]
    return image.point(table * 3)


_AFFINE: dict[Op, Callable[[float, int, int], tuple[float, ...]]] = {
    Op.SHEAR_X: lambda slope, _width, _height: (1, slope, 0, 0, 1, 0),
    Op.SHEAR_Y: lambda slope, _width, _height: (1, 0, 0, slope, 1, 0),
    Op.TRANSLATE_X: lambda part, width, _height: (1, 0, part * width, 0, 1, 0),
    Op.TRANSLATE_Y: lambda part, _width, height: (1, 0, 0, 0, 1, part * height),
}

_COLOUR: dict[Op, Callable[[Image.Image, float], Image.Image]] = {
    Op.AUTO_CONTRAST: lambda image, _: ImageOps.autocontrast(image),
    Op.EQUALIZE: lambda image, _: ImageOps.equalize(image),
    Op.INVERT: lambda image, _: ImageOps.invert(image),
    Op.POSTERIZE: lambda image, bits: ImageOps.posterize(image, int(bits)),
    Op.SOLARIZE: lambda image, threshold: ImageOps.solarize(image, int(threshold)),
    Op.SOLARIZE_ADD: _solarize_add,
    Op.COLOR: lambda image, change: ImageEnhance.Color(image).enhance(1 + change),
    Op.CONTRAST: lambda image, change: ImageEnhance.Contrast(image).enhance(1 + change),
    Op.BRIGHTNESS: lambda image, change: ImageEnhance.Brightness(image).enhance(1 + change),
    Op.SHARPNESS: lambda image, change: ImageEnhance.Sharpness(image).enhance(1 + change),
}
