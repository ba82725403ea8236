"""Codecs bound to the values of a store."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from feature_store.errors import InputError
from feature_store.format.arrays import ArraySpec
from feature_store.format.codecs.base import Codec, CodecArray, Parts, Statistics
from feature_store.format.codecs.registry import get_codec
from feature_store.format.manifest import Manifest

LOGITS = "logits"
MOST_ROW_BYTES = 1 << 30


@dataclass(frozen=True)
class BoundCodec:
    """The codec of one stored value, bound to its shape and statistics.

    Attributes:
        name: The tap's, or ``logits``.
        codec: Its codec.
        shape: One row's shape, (N, C) of a tap or (K,) of logits.
        statistics: Statistics of the codec from a calibration batch; None if it needs none.
    """

    name: str
    codec: Codec
    shape: tuple[int, ...]
    statistics: Statistics | None = None

    @classmethod
    def learn(cls, name: str, codec: Codec, sample: np.ndarray) -> "BoundCodec":
        """Bound to the shape and, if the codec needs any, the statistics of a sample [n, *shape]."""
        return cls(name, codec, sample.shape[1:], _arrays(codec.calibrate(sample)))

    @property
    def parts(self) -> tuple[CodecArray, ...]:
        """The arrays it is stored in."""
        return self.codec.parts(self.shape)

    @property
    def arrays(self) -> dict[str, ArraySpec]:
        """The sharded arrays it is stored in, by suffix; the largest first."""
        return {
            part.suffix: ArraySpec(
                self.array_path(part.suffix), part.dtype, part.row_shape, True, True, part.fill, part.dimensions,
                part.zstd, part.attributes,
            )
            for part in self.parts
        }  # fmt: skip

    def array_path(self, suffix: str) -> str:
        """Path of a part's array: ``taps/<name>``, ``taps/<name>.scale``, ``logits``."""
        path = self.name if self.name == LOGITS else f"taps/{self.name}"
        return f"{path}.{suffix}" if suffix else path

    def encode(self, values: np.ndarray) -> dict[str, np.ndarray]:
        """Rows [..., *shape] as stored, [..., *row_shape] by suffix; see Codec.encode."""
        leading = values.shape[: values.ndim - len(self.shape)]
        parts = self.codec.encode(values.reshape(-1, *self.shape), self.statistics)
        return {suffix: part.reshape(*leading, *part.shape[1:]) for suffix, part in parts.items()}

    def decode(self, parts: Parts) -> np.ndarray:
        """Float32 values [n, *shape]; see Codec.decode."""
        return self.codec.decode(parts, self.shape, self.statistics)

    def max_error(self, values: np.ndarray) -> np.ndarray:
        """The stated error of each value; see Codec.max_error."""
        return self.codec.max_error(values, self.statistics)


def bind_codecs(manifest: Manifest) -> dict[str, BoundCodec]:
    """Codec of every tap by name, and of the logits as ``logits``; a store's are ``StoreLayout.codecs``.

    Raises:
        InputError: An unknown codec, or a tap named ``logits``.
    """
    if LOGITS in manifest.taps:
        raise InputError(f"the store's manifest has a tap named {LOGITS!r}, which means the logits; rename the tap")
    found = {}
    for name, tap in manifest.taps.items():
        found[name] = BoundCodec(name, get_codec(tap.codec), (tap.tokens, tap.channels), _arrays(tap.statistics))
    if manifest.logits_codec is not None:
        found[LOGITS] = BoundCodec(LOGITS, get_codec(manifest.logits_codec), (manifest.teacher.num_classes,))
    return found


def calibrated(manifest: Manifest, features: Mapping[str, np.ndarray]) -> Manifest:
    """The manifest with the statistics its tap codecs need, learnt from a first sample; the same sample, the same ones.

    Call it once, before ``Store.create``; a job that continues a store takes the store's own statistics, see
    ``Manifest.with_statistics_of``.

    Args:
        manifest: Manifest of the store to write.
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
            "none; make the manifest with feature_store.format.codecs.bound.calibrated"
        )


def require_decodable(manifest: Manifest) -> None:
    """Refuse a manifest whose values could not be decoded, or not held in memory.

    Raises:
        InputError: A codec that is unknown or does not fit its value, statistics that are missing or not valid,
            or a row larger than a gigabyte.
    """
    for bound in bind_codecs(manifest).values():
        for part in bound.parts:
            if (size := part.dtype.itemsize * prod(part.row_shape)) > MOST_ROW_BYTES:
                path = bound.array_path(part.suffix)
                raise InputError(
                    f"the store's manifest is not valid: a row of {path} has {size:,} bytes, "
                    f"expected at most {MOST_ROW_BYTES:,}; it was not written by this format"
                )
        if bound.codec.calibrated:
            _require_statistics(bound)


def _require_statistics(bound: BoundCodec) -> None:
    channels, path = bound.shape[-1], bound.array_path("")
    for name in ("mean", "std"):
        numbers = (bound.statistics or {}).get(name, np.empty(0, np.float32))
        wrong = ~np.isfinite(numbers) | ((numbers <= 0) if name == "std" else False)
        if numbers.shape != (channels,) or wrong.any():
            got = f"{len(numbers)} numbers" if not wrong.any() else f"{numbers[wrong][0]} at channel {wrong.argmax()}"
            raise InputError(
                f"the store's manifest is not valid: {name} in the statistics of {path} has {got}, expected "
                f"{channels} finite {'positive ' if name == 'std' else ''}float32; it was not written by this format"
            )


def _arrays(statistics: Mapping[str, list[float]] | None) -> Statistics | None:
    if statistics is None:
        return None
    with np.errstate(over="ignore"):  # require_decodable refuses what is infinite then
        return {name: np.array(values, np.float32) for name, values in statistics.items()}
