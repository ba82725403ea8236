"""Codecs float32, float16, bfloat16."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from feature_store.format.codecs.base import Codec, CodecArray, Parts, Statistics, axes, blocks


@dataclass(frozen=True)
class FloatCodec(Codec):
    """Plain IEEE floats of one dtype: float32 is exact, float16 rounds to nearest."""

    plain: ClassVar[bool] = True
    dtype: ClassVar[np.dtype]
    bits: ClassVar[str]
    exponent: ClassVar[int]
    relative_error: ClassVar[float]
    """Largest rounding error of a normal value, relative to it."""
    smallest: ClassVar[float]
    """Largest rounding error of a value too small to be normal."""

    def parts(self, shape: tuple[int, ...]) -> tuple[CodecArray, ...]:
        """See Codec."""
        return (CodecArray("", self.dtype, shape, axes(shape), np.nan, self.zstd),)

    def encode(self, values: np.ndarray, statistics: Statistics | None = None) -> dict[str, np.ndarray]:
        """See Codec."""
        with np.errstate(over="ignore"):
            encoded = np.ascontiguousarray(values, dtype=self.dtype)
        if not all_finite(encoded.view(self.bits), self.exponent):
            raise self.cannot_hold(values)
        return {"": encoded}

    def decode(self, parts: Parts, shape: tuple[int, ...], statistics: Statistics | None = None) -> np.ndarray:
        """See Codec; float32 rows are given as they are, without a copy."""
        return parts[""].astype(np.float32, copy=False)

    def max_error(self, values: np.ndarray, statistics: Statistics | None = None) -> np.ndarray:
        """See Codec."""
        return self.relative_error * np.abs(values.astype(np.float64)) + self.smallest


@dataclass(frozen=True)
class Float32Codec(FloatCodec):
    """Exact."""

    base_name: ClassVar[str] = "f32"
    dtype: ClassVar[np.dtype] = np.dtype("<f4")
    bits: ClassVar[str] = "<u4"
    exponent: ClassVar[int] = 0x7F800000
    relative_error: ClassVar[float] = 0.0
    smallest: ClassVar[float] = 0.0


@dataclass(frozen=True)
class Float16Codec(FloatCodec):
    """Half the size of float32; the range ends at 65504."""

    base_name: ClassVar[str] = "f16"
    dtype: ClassVar[np.dtype] = np.dtype("<f2")
    bits: ClassVar[str] = "<u2"
    exponent: ClassVar[int] = 0x7C00
    relative_error: ClassVar[float] = 2.0**-11
    smallest: ClassVar[float] = 2.0**-25


@dataclass(frozen=True)
class Bfloat16Codec(Codec):
    """The upper half of a float32, rounded to nearest even: float32's range, eight bits of precision.

    zarr v3 has no bfloat16, so the array holds the bit patterns as uint16 and says so in its attributes. A client
    decodes with ``(codes.astype("u4") << 16).view("f4")``.
    """

    base_name: ClassVar[str] = "bf16"
    _nan: ClassVar[int] = 0x7FC0
    _exponent: ClassVar[int] = 0x7F80

    def parts(self, shape: tuple[int, ...]) -> tuple[CodecArray, ...]:
        """See Codec."""
        attributes = {"encoding": "bfloat16 bit patterns: the upper 16 bits of a float32"}
        return (CodecArray("", np.dtype("<u2"), shape, axes(shape), self._nan, self.zstd, attributes),)

    def encode(self, values: np.ndarray, statistics: Statistics | None = None) -> dict[str, np.ndarray]:
        """See Codec."""
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        encoded = np.empty(values.shape, "<u2")
        for block in blocks(values):
            rounded = (bits[block] >> np.uint32(16)) & np.uint32(1)
            rounded += np.uint32(0x7FFF)  # half to even
            rounded += bits[block]
            np.right_shift(rounded, np.uint32(16), out=encoded[block], casting="unsafe")
        # a NaN's payload can carry into the sign and come out as a number, hence both
        if not (all_finite(encoded, self._exponent) and all_finite(bits, Float32Codec.exponent)):
            raise self.cannot_hold(values)
        return {"": encoded}

    def decode(self, parts: Parts, shape: tuple[int, ...], statistics: Statistics | None = None) -> np.ndarray:
        """See Codec."""
        return (parts[""].astype(np.uint32) << np.uint32(16)).view(np.float32)

    def max_error(self, values: np.ndarray, statistics: Statistics | None = None) -> np.ndarray:
        """See Codec."""
        return 2.0**-8 * np.abs(values.astype(np.float64)) + 2.0**-133


def all_finite(bits: np.ndarray, exponent: int) -> bool:
    """Whether no float of these bit patterns has all exponent bits set; faster than numpy's isfinite on float16."""
    mask = bits.dtype.type(exponent)
    return all((bits[block] & mask).max(initial=0) != mask for block in blocks(bits))
