"""Drawing of a view's parameters, a pure function.

Parameters depend only on policy, seed, sample key, view index and image size.
"""

import hashlib
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.random.bit_generator import ISeedSequence

from feature_store.errors import InputError
from feature_store.views.augment import CHOICES, Op, magnitude_of
from feature_store.views.policies import ViewPolicy

Box = tuple[int, int, int, int]  # left, top, width, height
NO_BOX: Box = (0, 0, 0, 0)

# Places of the parameters in the generator's 64-bit words. Each has its own, so that switching one
# augmentation off leaves the others as they were. They are part of what a policy means: never move one.
_CROP = 0  # 10 tries of (area, ratio, left, top)
_FLIP = 40
_ERASE = 41
_NOISE_SEED = 42
_ERASE_BOX = 43  # 10 tries of (area, ratio, left, top)
_OPS = 83  # (which, whether, level, sign) per operation
_TRIES = 10


@dataclass(frozen=True)
class ViewParams:
    """One view, resolved: nothing random is left.

    Attributes:
        crop: (left, top, width, height) in pixels of the source image; always inside it.
        flip: Whether the crop is mirrored left to right.
        ops: Numbers of RandAugment operations in order (see ``feature_store.views.augment.Op``); 0 does nothing.
        magnitudes: One argument per operation, signed, exactly representable as float32.
        erase: (left, top, width, height) in pixels of the view; all 0 if nothing is erased.
        noise_seed: Seed of the erased box's noise, 64 bits; 0 if nothing is erased.
        interpolation: ``bilinear`` or ``bicubic``.
    """

    crop: Box
    flip: bool
    ops: tuple[int, ...]
    magnitudes: tuple[float, ...]
    erase: Box
    noise_seed: int
    interpolation: str


def draw_view(policy: ViewPolicy, seed: int, key: str, view: int, source_size: tuple[int, int]) -> ViewParams:
    """Parameters of one view of one sample, independent of everything but the arguments.

    Args:
        policy: Policy to draw from.
        seed: The store's seed, 64 bits, unsigned.
        key: The sample's key.
        view: View index v.
        source_size: (width, height) of the source image, in pixels.

    Raises:
        InputError: Seed, view or image size out of range.
    """
    if not 0 <= seed < 2**64:
        raise InputError(f"seed is {seed}, expected 0 to 2**64 - 1; choose another")
    if not 0 <= view < 2**64 or min(source_size) < 1:
        raise InputError(f"got view {view} of an image of {source_size} px, expected view >= 0 and sides >= 1")
    words = _words(seed, key, view, _OPS + 4 * policy.num_ops)
    erase = _draw_erase(policy, words)
    ops = [_draw_op(policy, *words[_OPS + 4 * i : _OPS + 4 * i + 4]) for i in range(policy.num_ops)]
    return ViewParams(
        crop=_draw_crop(policy, words, *source_size),
        flip=_uniform(words[_FLIP]) < policy.flip,
        ops=tuple(int(op) for op, _ in ops),
        magnitudes=tuple(magnitude for _, magnitude in ops),
        erase=erase,
        noise_seed=words[_NOISE_SEED] if erase != NO_BOX else 0,
        interpolation=policy.interpolation,
    )


def _words(seed: int, key: str, view: int, count: int) -> list[int]:
    """The view's own raw words. Across releases, numpy guarantees a bit generator's raw output, not distributions."""
    name = struct.pack("<QQ", seed, view) + key.encode()  # fixed width, then the rest: no two triples collide
    digest = hashlib.blake2b(name, digest_size=16, person=b"scalekd-view-v1").digest()
    key_words = _Key(np.frombuffer(digest, "<u8"))
    generator = np.random.Philox(key_words)  # pyright: ignore[reportArgumentType] - numpy's stubs lack ISeedSequence
    return generator.random_raw(count).tolist()


class _Key(ISeedSequence):
    """A Philox key as numpy's seed: the same words as ``Philox(key=...)``, which first asks the system for others."""

    def __init__(self, words: np.ndarray) -> None:
        self._words = words

    def generate_state(self, n_words: int, dtype: object = np.uint32) -> np.ndarray:
        """The key, uint64 [2]."""
        return self._words


def _uniform(word: int) -> float:
    """A float64 strictly between 0 and 1, from the word's upper 52 bits."""
    return ((word >> 12) + 0.5) * 2.0**-52


def _below(bound: int, word: int) -> int:
    """An integer from 0 to bound - 1."""
    return word * bound >> 64


def _between(bounds: tuple[float, float], word: int) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * _uniform(word)


def _log_between(bounds: tuple[float, float], word: int) -> float:
    return math.exp(_between((math.log(bounds[0]), math.log(bounds[1])), word))


def _tries(words: list[int], start: int) -> Iterator[list[int]]:
    return (words[at : at + 4] for at in range(start, start + 4 * _TRIES, 4))


def _draw_crop(policy: ViewPolicy, words: list[int], width: int, height: int) -> Box:
    """Random resized crop as torchvision and timm make it: ten tries, then a middle crop."""
    if policy.crop == "center":
        return _center_crop(policy, width, height)
    for area_word, ratio_word, left, top in _tries(words, _CROP):
        area = width * height * _between(policy.scale, area_word)
        ratio = _log_between(policy.ratio, ratio_word)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return _below(width - w + 1, left), _below(height - h + 1, top), w, h
    return _fallback_crop(policy, width, height)


def _fallback_crop(policy: ViewPolicy, width: int, height: int) -> Box:
    """The largest middle crop of an allowed ratio."""
    narrowest, widest = policy.ratio
    if width / height < narrowest:
        return _middle(width, height, width, round(width / narrowest))
    if width / height > widest:
        return _middle(width, height, round(height * widest), height)
    return _middle(width, height, width, height)


def _center_crop(policy: ViewPolicy, width: int, height: int) -> Box:
    """In source pixels, the box that "resize to size / crop_pct, then crop the middle to size" keeps."""
    view_height, view_width = policy.size
    source_per_view = policy.crop_pct * min(width / view_width, height / view_height)
    return _middle(width, height, round(view_width * source_per_view), round(view_height * source_per_view))


def _middle(width: int, height: int, w: int, h: int) -> Box:
    w, h = min(max(w, 1), width), min(max(h, 1), height)
    return (width - w) // 2, (height - h) // 2, w, h


def _draw_op(policy: ViewPolicy, which: int, whether: int, level: int, sign: int) -> tuple[Op, float]:
    if _uniform(whether) >= policy.op_probability:
        return Op.NONE, 0.0
    op = CHOICES[_below(len(CHOICES), which)]
    drawn = policy.level + policy.level_std * NormalDist().inv_cdf(_uniform(level))
    strength = min(max(drawn, 0.0), policy.max_level) / policy.max_level
    return op, magnitude_of(op, strength, negative=_uniform(sign) < 0.5)


def _draw_erase(policy: ViewPolicy, words: list[int]) -> Box:
    """Random erasing's box (arXiv:1708.04896) as timm draws it: smaller than the view, ten tries."""
    if _uniform(words[_ERASE]) >= policy.erase:
        return NO_BOX
    height, width = policy.size
    for area_word, ratio_word, left, top in _tries(words, _ERASE_BOX):
        area = width * height * _between(policy.erase_area, area_word)
        ratio = _log_between(policy.erase_ratio, ratio_word)
        w, h = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < w < width and 0 < h < height:
            return _below(width - w + 1, left), _below(height - h + 1, top), w, h
    return NO_BOX
