"""Codecs by name, and bound to the values of a store."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from feature_store.errors import InputError
from feature_store.format.codecs.base import ZSTD_SUFFIX, Codec, CodecArray, Parts, Statistics
from feature_store.format.codecs.floats import Bfloat16Codec, Float16Codec, Float32Codec
from feature_store.format.codecs.group_quantise import Int4Codec, Int6Codec
from feature_store.format.codecs.quantise import Int8ChannelCodec, Int8Codec
from feature_store.format.codecs.top_k import TopKCodec
from feature_store.format.manifest import Manifest

DEFAULT_TAP_CODEC = "int8"
"""The smallest whose error of every loss term is at most 1e-3, see docs/decisions/0004-default-codec.md."""

DEFAULT_LOGITS_CODEC = "f16"

MOST_ROW_BYTES = 1 << 30

CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        Float32Codec(),
        Float16Codec(),
        Bfloat16Codec(),
        Int8ChannelCodec(),
        Int8Codec(),
        Int6Codec(),
        Int4Codec(),
    )
}
"""Tap codecs, the most exact first; each also exists with ``+zstd``. Logits also know ``top<k>``."""


def get_codec(name: str) -> Codec:
    """Codec by name: one of CODECS or ``top<k>``, optionally followed by ``+zstd``.

    Raises:
        InputError: Unknown name.
    """
    base = name.removesuffix(ZSTD_SUFFIX)
    top = re.fullmatch(r"top([1-9]\d{0,5})", base)
    codec = TopKCodec(k=int(top[1])) if top else CODECS.get(base)
    if codec is None:
        raise InputError(
            f"unknown codec {name!r}; expected one of {', '.join(CODECS)}, or top<k> for logits; "
            f"add {ZSTD_SUFFIX} to compress what it stores"
        )
    return replace(codec, zstd=name.endswith(ZSTD_SUFFIX))


@dataclass(frozen=True)
class BoundCodec:
    """The codec of one stored value, bound to its shape and statistics.

    Attributes:
        path: The value: ``taps/<name>`` or ``logits``.
        codec: Its codec.
        shape: One row's shape, (N, C) of a tap or (K,) of logits.
        statistics: What the codec learnt from a first sample; None if it needs none.
    """

    path: str
    codec: Codec
    shape: tuple[int, ...]
    statistics: Statistics | None = None

    @classmethod
    def learn(cls, path: str, codec: Codec, sample: np.ndarray) -> "BoundCodec":
        """Bound to the shape and, if the codec needs any, the statistics of a sample [n, *shape]."""
        return cls(path, codec, sample.shape[1:], _arrays(codec.calibrate(sample)))

    @property
    def parts(self) -> tuple[CodecArray, ...]:
        """The arrays it is stored in."""
        return self.codec.parts(self.shape)

    @property
    def paths(self) -> dict[str, str]:
        """Path of each array by suffix: ``taps/<name>``, ``taps/<name>.scale``."""
        return {part.suffix: part_path(self.path, part) for part in self.parts}

    def encode(self, values: np.ndarray) -> dict[str, np.ndarray]:
        """Rows [n, *shape] as stored, by suffix; see Codec.encode."""
        return self.codec.encode(values, self.statistics)

    def decode(self, parts: Parts) -> np.ndarray:
        """Float32 values [n, *shape]; see Codec.decode."""
        return self.codec.decode(parts, self.shape, self.statistics)

    def max_error(self, values: np.ndarray) -> np.ndarray:
        """The stated error of each value; see Codec.max_error."""
        return self.codec.max_error(values, self.statistics)


def part_path(path: str, part: CodecArray) -> str:
    """Path of a part's array inside the store."""
    return f"{path}.{part.suffix}" if part.suffix else path


def bound_codecs(manifest: Manifest) -> dict[str, BoundCodec]:
    """Codec of every tap and of the logits, by path.

    Raises:
        InputError: An unknown codec.
    """
    found = {}
    for name, tap in manifest.taps.items():
        codec, path = get_codec(tap.codec), f"taps/{name}"
        found[path] = BoundCodec(path, codec, (tap.tokens, tap.channels), _arrays(tap.statistics))
    if manifest.logits_codec is not None:
        codec = get_codec(manifest.logits_codec)
        found["logits"] = BoundCodec("logits", codec, (manifest.teacher.num_classes,))
    return found


def calibrated(manifest: Manifest, features: Mapping[str, np.ndarray]) -> Manifest:
    """The manifest with the statistics its tap codecs need, learnt from a first sample; the same sample, the same ones.

    Call it once, before ``Store.create``; a job that goes on with a store takes the store's own statistics, see
    ``Manifest.with_statistics_of``.

    Args:
        manifest: What will be stored.
        features: Some rows [n, N, C] of every tap whose codec needs statistics; a few hundred are enough.

    Raises:
        InputError: A tap's sample is missing, has another shape or holds values that are not finite.
    """
    taps = dict(manifest.taps)
    for name, tap in manifest.taps.items():
        codec = get_codec(tap.codec)
        if not codec.calibrated:
            continue
        sample = features.get(name)
        if sample is None or sample.ndim != 3 or sample.shape[1:] != (tap.tokens, tap.channels) or not len(sample):
            raise InputError(
                f"codec {tap.codec} of tap {name} learns from a first sample of shape [n, {tap.tokens}, "
                f"{tap.channels}], got {None if sample is None else list(sample.shape)}; pass some readable rows"
            )
        taps[name] = replace(tap, statistics=codec.calibrate(sample))
    return replace(manifest, taps=taps)


def needs_calibration(manifest: Manifest) -> tuple[str, ...]:
    """Taps whose codec needs statistics the manifest does not have yet."""
    return tuple(
        name for name, tap in manifest.taps.items() if get_codec(tap.codec).calibrated and tap.statistics is None
    )


def require_calibrated(manifest: Manifest) -> None:
    """Refuse to make a store whose codecs lack their statistics.

    Raises:
        InputError: Names the tap and what to do.
    """
    for name in needs_calibration(manifest):
        raise InputError(
            f"codec {manifest.taps[name].codec} of tap {name} needs statistics of a first sample, the manifest has "
            "none; make the manifest with feature_store.format.codecs.registry.calibrated"
        )


def require_decodable(manifest: Manifest) -> None:
    """Refuse a manifest whose values could not be decoded, or not held in memory.

    Raises:
        InputError: A codec that is unknown or does not fit its value, statistics that are missing or make no sense,
            or a row larger than a gigabyte.
    """
    for path, value in bound_codecs(manifest).items():
        for part in value.parts:
            if (size := part.dtype.itemsize * prod(part.row_shape)) > MOST_ROW_BYTES:
                raise InputError(
                    f"the store's manifest makes no sense: a row of {part_path(path, part)} has {size:,} bytes, "
                    f"expected at most {MOST_ROW_BYTES:,}; it was not written by this format"
                )
        if value.codec.calibrated:
            _require_statistics(path, value)


def _require_statistics(path: str, value: BoundCodec) -> None:
    channels = value.shape[-1]
    for name in ("mean", "std"):
        numbers = (value.statistics or {}).get(name, np.empty(0, np.float32))
        wrong = ~np.isfinite(numbers) | ((numbers <= 0) if name == "std" else False)
        if numbers.shape != (channels,) or wrong.any():
            got = f"{len(numbers)} numbers" if not wrong.any() else f"{numbers[wrong][0]} at channel {wrong.argmax()}"
            raise InputError(
                f"the store's manifest makes no sense: {name} in the statistics of {path} has {got}, expected "
                f"{channels} finite {'positive ' if name == 'std' else ''}float32; it was not written by this format"
            )


def _arrays(statistics: Mapping[str, list[float]] | None) -> Statistics | None:
    if statistics is None:
        return None
    with np.errstate(over="ignore"):  # require_decodable refuses what is infinite then
        return {name: np.array(values, np.float32) for name, values in statistics.items()}
