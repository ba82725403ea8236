"""Codecs int6, int4: quantised per group of channels.

Values are standardised per channel, scaled per group of channels, and packed into 4 or 6 bits.

Shape legend: n rows, N tokens, C channels, G groups of channels.
"""

from abc import ABC
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from feature_store.format.codecs.base import Codec, CodecArray, Parts, Statistics, blocks
from feature_store.format.codecs.quantise import (
    FLOAT32_SLACK,
    ROUND_UP,
    SUBNORMAL,
    channel_statistics,
    float16_at_least,
    inverse,
    standard,
    standardised,
    tap_shape,
)

GROUP = 32
"""Channels that share a scale: c, c + G, c + 2G... for group c < G."""


@dataclass(frozen=True)
class GroupCodec(Codec, ABC):
    """b bits a value, one byte a group of 32 channels, one float16 a token.

    z = (x - mean_c) / std_c, as in int8. Group g of token t has the step s_tg = T_t * u_tg with T_t float16 and u_tg
    from -127 to 127, signed so that the group's largest |z| becomes the code -2^(b-1): the one code more that two's
    complement has below zero is put to use. q = round(z / s), at most 2^(b-1) - 1. x is read back as
    mean_c + std_c * (s_tg * q).
    """

    calibrated: ClassVar[bool] = True
    bits: ClassVar[int]

    @property
    def least(self) -> int:
        """The smallest code, -2^(b-1); codes are stored less this."""
        return -(1 << (self.bits - 1))

    def parts(self, shape: tuple[int, ...]) -> tuple[CodecArray, ...]:
        """See Codec."""
        tokens, channels = tap_shape(self.name, shape)
        encoding = {
            "encoding": "value = mean[channel] + std[channel] * (code * scale[token] * "
            "group[token, channel % groups]), "
            f"code = stored {self.bits} bits - {-self.least}; see FORMAT.md for their order"
        }
        return (
            CodecArray(
                "", np.dtype("u1"), (tokens, self._row_bytes(channels)), ("token", "byte"), 0, self.zstd, encoding
            ),
            CodecArray("group", np.dtype("i1"), (tokens, -(-channels // GROUP)), ("token", "group")),
            CodecArray("scale", np.dtype("<f2"), (tokens,), ("token",), np.nan),
        )

    def calibrate(self, values: np.ndarray) -> dict[str, list[float]]:
        """See Codec."""
        return channel_statistics(self, values)

    def encode(self, values: np.ndarray, statistics: Statistics | None = None) -> dict[str, np.ndarray]:
        """See Codec."""
        mean, std = standard(statistics, self.name)
        inverse_std = inverse(std)
        rows = {
            part.suffix: np.empty((len(values), *part.row_shape), part.dtype) for part in self.parts(values.shape[1:])
        }
        for block in blocks(values):
            z = standardised(values[block], mean, inverse_std)
            step = _extremes(z) / np.float32(self.least)
            scale = float16_at_least(np.abs(step).max(axis=-1) / np.float32(127))
            if not np.isfinite(scale).all():
                raise self.cannot_hold(values)
            units = np.ceil(np.abs(step) * inverse(scale)[..., None])
            group = np.copysign(np.minimum(units, 127), step).astype(np.int8)
            z *= per_channel(inverse(steps(group, scale)), z.shape[-1])
            np.rint(z, out=z)
            np.minimum(z, -self.least - 1, out=z)
            z -= self.least
            rows[""][block], rows["group"][block], rows["scale"][block] = self._pack(z.astype(np.uint8)), group, scale
        return rows

    def decode(self, parts: Parts, shape: tuple[int, ...], statistics: Statistics | None = None) -> np.ndarray:
        """See Codec."""
        mean, std = standard(statistics, self.name)
        values = np.empty((len(parts[""]), *shape), np.float32)
        for block in blocks(values):
            out = values[block]
            codes = self._unpack(parts[""][block], shape[-1])
            np.subtract(codes, np.float32(-self.least), out=out, dtype=np.float32)
            out *= per_channel(steps(parts["group"][block], parts["scale"][block]), shape[-1])
            out *= std
            out += mean
        return values

    def max_error(self, values: np.ndarray, statistics: Statistics | None = None) -> np.ndarray:
        """See Codec: one step (only the largest of the other sign is cut; all others are within half a step)."""
        mean, std = (array.astype(np.float64) for array in standard(statistics, self.name))
        z = (values - mean) / std
        largest = per_channel(np.abs(_extremes(z)), z.shape[-1])
        unit = np.abs(z).max(axis=-1, keepdims=True) / -self.least / 127 * ROUND_UP + SUBNORMAL
        step = largest / -self.least + unit
        return std * step + FLOAT32_SLACK * (np.abs(values) + np.abs(mean) + std * largest)

    def _row_bytes(self, channels: int) -> int:
        return -(-channels // 2) + (-(-channels // 4) if self.bits == 6 else 0)

    def _pack(self, codes: np.ndarray) -> np.ndarray:
        """[..., C] to bytes: all low four bits, then all high two."""
        low = pack(codes & 15, 4)
        return np.concatenate([low, pack(codes >> 4, 2)], axis=-1) if self.bits == 6 else low

    def _unpack(self, packed: np.ndarray, channels: int) -> np.ndarray:
        half = -(-channels // 2)
        codes = unpack(packed[..., :half], 4, channels)
        if self.bits == 6:
            codes |= unpack(packed[..., half:], 2, channels) << 4
        return codes


@dataclass(frozen=True)
class Int6Codec(GroupCodec):
    """Three quarters of a byte a value, see GroupCodec."""

    base_name: ClassVar[str] = "int6"
    bits: ClassVar[int] = 6


@dataclass(frozen=True)
class Int4Codec(GroupCodec):
    """Half a byte a value, see GroupCodec."""

    base_name: ClassVar[str] = "int4"
    bits: ClassVar[int] = 4


def pack(codes: np.ndarray, width: int) -> np.ndarray:
    """Codes [..., C] of a few bits as bytes [..., m], m = ceil(C * width / 8).

    Byte j holds channels j, j + m, j + 2m..., from its lowest bits up: so that whole runs of channels are unpacked at
    once.
    """
    per_byte = 8 // width
    m = -(-codes.shape[-1] // per_byte)
    packed = np.zeros((*codes.shape[:-1], m), np.uint8)
    for k in range(per_byte):
        run = codes[..., k * m : (k + 1) * m]
        packed[..., : run.shape[-1]] |= run << (k * width)
    return packed


def unpack(packed: np.ndarray, width: int, channels: int) -> np.ndarray:
    """Inverse of pack: uint8 [..., C]."""
    m = packed.shape[-1]
    codes = np.empty((*packed.shape[:-1], channels), np.uint8)
    for k in range(8 // width):
        run = codes[..., k * m : (k + 1) * m]
        np.right_shift(packed[..., : run.shape[-1]], k * width, out=run)
        run &= (1 << width) - 1
    return codes


def per_channel(groups: np.ndarray, channels: int) -> np.ndarray:
    """Values [..., G] of groups, repeated for each of their channels: [..., C]."""
    return np.tile(groups, GROUP)[..., :channels]


def steps(group: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Step of each group, s_tg = T_t * u_tg: [..., N, G]."""
    return group.astype(np.float32) * scale.astype(np.float32)[..., None]


def _extremes(z: np.ndarray) -> np.ndarray:
    """Value of largest magnitude per group, with its sign: [..., G]."""
    groups = -(-z.shape[-1] // GROUP)
    missing = groups * GROUP - z.shape[-1]
    padded = np.pad(z, [(0, 0)] * (z.ndim - 1) + [(0, missing)]) if missing else z
    runs = padded.reshape(*z.shape[:-1], GROUP, groups)
    high, low = runs.max(axis=-2), runs.min(axis=-2)
    return np.where(high >= -low, high, low)
