"""RandAugment's operations against timm's, their stored numbers, and unknown numbers."""

import numpy as np
import pytest
from PIL import Image
from timm.data import auto_augment as timm_ops

from feature_store.errors import InputError
from feature_store.views.augment import CHOICES, FILL, Op, apply_op, magnitude_of

TIMM_NAMES = {
    Op.AUTO_CONTRAST: "AutoContrast",
    Op.EQUALIZE: "Equalize",
    Op.INVERT: "Invert",
    Op.ROTATE: "Rotate",
    Op.POSTERIZE: "PosterizeIncreasing",
    Op.SOLARIZE: "SolarizeIncreasing",
    Op.SOLARIZE_ADD: "SolarizeAdd",
    Op.COLOR: "ColorIncreasing",
    Op.CONTRAST: "ContrastIncreasing",
    Op.BRIGHTNESS: "BrightnessIncreasing",
    Op.SHARPNESS: "SharpnessIncreasing",
    Op.SHEAR_X: "ShearX",
    Op.SHEAR_Y: "ShearY",
    Op.TRANSLATE_X: "TranslateXRel",
    Op.TRANSLATE_Y: "TranslateYRel",
}


def picture(width=48, height=40):
    ramp = np.arange(height * width * 3, dtype=np.uint32).reshape(height, width, 3)
    return Image.fromarray((ramp * 7 % 251 // 2 + ramp % 97).astype(np.uint8))


def test_op_numbers_stay_fixed_when_stores_exist():
    assert [(op.name, int(op)) for op in Op] == [
        ("NONE", 0), ("AUTO_CONTRAST", 1), ("EQUALIZE", 2), ("INVERT", 3), ("ROTATE", 4), ("POSTERIZE", 5),
        ("SOLARIZE", 6), ("SOLARIZE_ADD", 7), ("COLOR", 8), ("CONTRAST", 9), ("BRIGHTNESS", 10),
        ("SHARPNESS", 11), ("SHEAR_X", 12), ("SHEAR_Y", 13), ("TRANSLATE_X", 14), ("TRANSLATE_Y", 15),
    ]  # fmt: skip


def test_choices_are_timms_increasing_set_when_listed():
    assert {TIMM_NAMES[op] for op in CHOICES} == set(timm_ops._RAND_INCREASING_TRANSFORMS)


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("strength", [0.0, 0.3, 0.875, 0.99])
@pytest.mark.parametrize("op", CHOICES)
def test_operation_equals_timms_when_level_and_sign_agree(op, strength, negative, monkeypatch):
    monkeypatch.setattr(timm_ops, "_randomly_negate", lambda value: -value if negative else value)
    level_to_argument = timm_ops.LEVEL_TO_ARG[TIMM_NAMES[op]]
    arguments = level_to_argument(10 * strength, {}) if level_to_argument else ()
    resample = Image.Resampling.BICUBIC
    expected = timm_ops.NAME_TO_OP[TIMM_NAMES[op]](picture(), *arguments, fillcolor=FILL, resample=resample)
    got = apply_op(picture(), op, magnitude_of(op, strength, negative), resample)
    # the magnitude's rounding to float32 may move a value across a rounding edge by one step
    np.testing.assert_allclose(np.asarray(got, int), np.asarray(expected, int), rtol=0, atol=1)


@pytest.mark.parametrize("op", [op for op in CHOICES if magnitude_of(op, 1.0, False) > magnitude_of(op, 1.0, True)])
def test_magnitude_changes_sign_only_when_negative(op):
    assert magnitude_of(op, 0.7, True) == -magnitude_of(op, 0.7, False) < 0
    assert str(magnitude_of(op, 0.0, True)) == "0.0"


@pytest.mark.parametrize("op", CHOICES)
def test_operation_is_possible_when_strength_is_highest(op):
    image = apply_op(picture(), op, magnitude_of(op, 1.0, True), Image.Resampling.BILINEAR)
    assert (image.mode, image.size) == ("RGB", (48, 40))
    assert len(image.getcolors(48 * 40) or ()) > 1  # an image is left, not one colour


def test_apply_op_shows_fill_colour_when_outside_comes_in():
    shifted = apply_op(picture(), Op.TRANSLATE_X, 0.25, Image.Resampling.BILINEAR)
    assert shifted.getpixel((47, 20)) == FILL
    assert shifted.getpixel((0, 0)) == picture().getpixel((12, 0))


def test_apply_op_changes_nothing_when_number_is_none():
    assert apply_op(picture(), 0, 0.0, Image.Resampling.BICUBIC).tobytes() == picture().tobytes()


def test_apply_op_refuses_when_number_is_unknown():
    with pytest.raises(InputError, match="number 16 is unknown, this build knows 0 to 15"):
        apply_op(picture(), 16, 0.0, Image.Resampling.BICUBIC)
