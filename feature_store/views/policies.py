"""View policies of the released schedules."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from feature_store.errors import InputError
from feature_store.parsing import Natural, Number, Text


@dataclass(frozen=True)
class ViewPolicy:
    """Augmentation parameters from which views are drawn.

    Attributes:
        name: Name of the policy; a label, without influence on the pixels.
        size: (H, W) of a view, in pixels.
        crop: ``random`` (random resized crop) or ``center`` (the middle, the same for every view).
        interpolation: ``bilinear`` or ``bicubic``; of the resize and of RandAugment's geometric operations.
        scale: Range of a random crop's area, as part of the image's.
        ratio: Range of a random crop's width / height; drawn uniformly on a log scale.
        crop_pct: Part of the image a center crop keeps: resize to size / crop_pct, then crop to size.
        flip: Probability of a left-right flip.
        num_ops: RandAugment operations per view; 0 switches it off.
        op_probability: Probability that a chosen operation is applied.
        level: RandAugment's mean level, from 0 to max_level.
        max_level: The level at which every operation is at its strongest.
        level_std: Standard deviation of the level around its mean; drawn levels are clipped to 0..max_level.
        erase: Probability that a box is erased, that is filled with noise.
        erase_area: Range of the erased area, as part of the view's.
        erase_ratio: Range of the erased box's height / width; drawn uniformly on a log scale.

    Raises:
        InputError: A value is of the wrong kind or out of range.
    """

    name: Text
    size: tuple[Natural, Natural]
    crop: Text = "random"
    interpolation: Text = "bicubic"
    scale: tuple[Number, Number] = (0.08, 1.0)
    ratio: tuple[Number, Number] = (3 / 4, 4 / 3)
    crop_pct: Number = 0.875
    flip: Number = 0.5
    num_ops: Natural = 0
    op_probability: Number = 0.5
    level: Number = 0.0
    max_level: Number = 10.0
    level_std: Number = 0.5
    erase: Number = 0.0
    erase_area: tuple[Number, Number] = (0.02, 1 / 3)
    erase_ratio: tuple[Number, Number] = (0.3, 1 / 0.3)

    def __post_init__(self) -> None:
        for name, (is_valid, expected) in _RULES.items():
            value = getattr(self, name)
            if not is_valid(value):
                raise InputError(f"view policy field {name} is {value!r}, expected {expected}; correct it")
        if self.level > self.max_level:
            raise InputError(
                f"view policy field level is {self.level}, expected at most max_level = {self.max_level}; correct it"
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON form, inverse of from_dict."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "ViewPolicy":
        """Read the JSON form.

        Raises:
            InputError: An unknown or missing field, or a bad value.
        """
        known = {field.name for field in fields(cls)}
        unknown, missing = sorted(data.keys() - known), sorted({"name", "size"} - data.keys())
        if unknown:
            raise InputError(
                f"view policy has unknown field {', '.join(unknown)}, expected {', '.join(sorted(known))}; "
                "remove it, or use the release that wrote it"
            )
        if missing:
            raise InputError(f"view policy lacks field {', '.join(missing)}; add it")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**values)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_size(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(_is_whole(side) and side > 0 for side in value)


def _is_probability(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_range(value: Any) -> bool:
    pair = isinstance(value, tuple) and len(value) == 2 and all(_is_number(end) for end in value)
    return pair and 0 < value[0] <= value[1]


_PROBABILITY = (_is_probability, "a number from 0 to 1")
_PART_RANGE = (lambda v: _is_range(v) and v[1] <= 1, "two numbers, 0 < low <= high <= 1")
_RATIO_RANGE = (_is_range, "two numbers, 0 < low <= high")

_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "name": (lambda v: isinstance(v, str) and v != "", "a name"),
    "size": (_is_size, "(height, width), whole numbers from 1"),
    "crop": (lambda v: v in ("random", "center"), "'random' or 'center'"),
    "interpolation": (lambda v: v in ("bilinear", "bicubic"), "'bilinear' or 'bicubic'"),
    "scale": _PART_RANGE,
    "ratio": _RATIO_RANGE,
    "crop_pct": (lambda v: _is_probability(v) and v > 0, "a number over 0, at most 1"),
    "flip": _PROBABILITY,
    "num_ops": (lambda v: _is_whole(v) and 0 <= v <= 16, "a whole number from 0 to 16"),
    "op_probability": _PROBABILITY,
    "level": (lambda v: _is_number(v) and v >= 0, "a number from 0"),
    "max_level": (lambda v: _is_number(v) and v > 0, "a number over 0"),
    "level_std": (lambda v: _is_number(v) and v >= 0, "a number from 0"),
    "erase": _PROBABILITY,
    "erase_area": _PART_RANGE,
    "erase_ratio": _RATIO_RANGE,
}

PolicyName = Literal["rrc_flip", "a1", "a2", "a3", "center"]

# The released schedules' augmentations (T1 and T2; A1; A2; A3) and the one for evaluation.
POLICIES: dict[str, dict[str, Any]] = {
    "rrc_flip": {"interpolation": "bilinear"},
    "a1": {"num_ops": 2, "level": 7.0, "max_level": 8.0, "erase": 0.25},
    "a2": {"num_ops": 2, "level": 9.0, "max_level": 10.0, "erase": 0.25},
    "a3": {"num_ops": 2, "level": 12.0, "max_level": 15.0, "erase": 0.25},
    "center": {"crop": "center", "flip": 0.0},
}


def view_policy(name: str, size: int | tuple[int, int], **overrides: Any) -> ViewPolicy:
    """A named policy for views of a size.

    Args:
        name: ``rrc_flip`` (T1, T2), ``a1``, ``a2``, ``a3`` or ``center`` (evaluation).
        size: Side or (H, W) of a view, in pixels.
        **overrides: Fields of ViewPolicy to set differently.

    Raises:
        InputError: Unknown name or field, or a bad value.
    """
    if name not in POLICIES:
        raise InputError(f"view policy {name!r} is unknown, expected one of {', '.join(POLICIES)}")
    height_width = (size, size) if isinstance(size, int) else size
    return ViewPolicy.from_dict({"name": name, "size": height_width, **POLICIES[name], **overrides})
