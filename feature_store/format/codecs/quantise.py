"""Codecs int8, int8-channel: quantised per token or per channel.

Values are standardised per channel and scaled per token (int8), or affine per channel of a row (int8-channel).

A few channels of a transformer's features carry most of their energy. A scale per token alone would spend its whole
range on them; so every codec here first takes each channel's own location and spread away.

Shape legend: n rows, N tokens, C channels, G groups of channels.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from feature_store.errors import InputError
from feature_store.format.codecs.base import Codec, CodecArray, Parts, Statistics, blocks

FLOAT32_SLACK = 2.0**-20  # roundings of float32 arithmetic, relative to the largest number involved
SUBNORMAL = 2.0**-24  # the step of float16 near zero
ROUND_UP = 1 + 2.0**-10  # float16 scales are rounded up
_LEAST_SPREAD = 0.01  # of a channel, relative to the others': dead channels must not blow up the scale


def float16_at_least(values: np.ndarray) -> np.ndarray:
    """The least float16 that is not below; infinite where there is none."""
    with np.errstate(over="ignore"):
        rounded = values.astype("<f2")
        return np.where(rounded < values, np.nextafter(rounded, np.float16(np.inf)), rounded).astype("<f2")


def inverse(scale: np.ndarray) -> np.ndarray:
    """1 / scale as float32, 0 where the scale is 0."""
    scale = scale.astype(np.float32)
    return np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)


def standard(statistics: Statistics | None, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation [C] per channel."""
    if statistics is None:
        raise InputError(
            f"codec {name} needs per-channel statistics of a first sample, the manifest has none; "
            "make the manifest with feature_store.format.codecs.registry.calibrated"
        )
    return np.asarray(statistics["mean"], np.float32), np.asarray(statistics["std"], np.float32)


def channel_statistics(codec: Codec, values: np.ndarray) -> dict[str, list[float]]:
    """Mean and standard deviation of a sample [n, N, C] per channel, as the manifest keeps them."""
    if not np.isfinite(values).all():
        raise codec.cannot_hold(values)
    tokens = values.reshape(-1, values.shape[-1])
    mean, std = tokens.mean(axis=0, dtype=np.float64), tokens.std(axis=0, dtype=np.float64)
    least = _LEAST_SPREAD * np.sqrt(np.mean(std**2))
    # below float32's normal numbers 1 / std would overflow: such a sample is constant for every codec
    std = np.maximum(std, least) if least >= np.finfo(np.float32).tiny else np.ones_like(std)
    # six digits: the manifest stays readable, and the last bits of a sum do not matter
    return {name: [float(f"{x:.6g}") for x in vector] for name, vector in (("mean", mean), ("std", std))}


def standardised(values: np.ndarray, mean: np.ndarray, inverse_std: np.ndarray) -> np.ndarray:
    """Standardised values z = (x - mean_c) / std_c [..., C] as float32; infinite where float32 overflows."""
    with np.errstate(over="ignore"):
        z = np.subtract(values, mean, dtype=np.float32)
        z *= inverse_std
    return z


def tap_shape(codec: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """(N, C) of a row, which must be a tap's."""
    if len(shape) != 2:
        raise InputError(f"{codec} is a codec of taps [tokens, channels], got rows of shape {list(shape)}; use f16")
    return shape[0], shape[1]


@dataclass(frozen=True)
class Int8Codec(Codec):
    """One byte a value, one float16 a token: z = (x - mean_c) / std_c, q = round(z / s_t), s_t = max_c |z| / 127.

    Mean and std come from a first sample and live in the manifest. The scale is rounded up to float16, so that no
    code is clipped at any value. x is read back as mean_c + std_c * (s_t * q).
    """

    base_name: ClassVar[str] = "int8"
    calibrated: ClassVar[bool] = True

    def parts(self, shape: tuple[int, ...]) -> tuple[CodecArray, ...]:
        """See Codec."""
        tokens, _ = tap_shape(self.name, shape)
        encoding = {"encoding": "value = mean[channel] + std[channel] * (scale[token] * code); see the manifest"}
        return (
            CodecArray("", np.dtype("i1"), shape, ("token", "channel"), 0, self.zstd, encoding),
            CodecArray("scale", np.dtype("<f2"), (tokens,), ("token",), np.nan),
        )

    def calibrate(self, values: np.ndarray) -> dict[str, list[float]]:
        """See Codec."""
        return channel_statistics(self, values)

    def encode(self, values: np.ndarray, statistics: Statistics | None = None) -> dict[str, np.ndarray]:
        """See Codec."""
        mean, std = standard(statistics, self.name)
        inverse_std = inverse(std)
        codes, scale = np.empty(values.shape, np.int8), np.empty(values.shape[:-1], "<f2")
        for block in blocks(values):
            z = standardised(values[block], mean, inverse_std)
            largest = np.maximum(z.max(axis=-1), -z.min(axis=-1))
            scale[block] = float16_at_least(largest / np.float32(127))
            if not np.isfinite(scale[block]).all():
                raise self.cannot_hold(values)
            z *= inverse(scale[block])[..., None]
            codes[block] = np.rint(z, out=z)
        return {"": codes, "scale": scale}

    def decode(self, parts: Parts, shape: tuple[int, ...], statistics: Statistics | None = None) -> np.ndarray:
        """See Codec."""
        mean, std = standard(statistics, self.name)
        codes, scale = parts[""], parts["scale"].astype(np.float32)[..., None]
        values = np.empty(codes.shape, np.float32)
        for block in blocks(values):
            out = values[block]
            np.multiply(codes[block], scale[block], out=out, dtype=np.float32)
            out *= std
            out += mean
        return values

    def max_error(self, values: np.ndarray, statistics: Statistics | None = None) -> np.ndarray:
        """See Codec: half a step, std_c * max_c |z| / 254, and float32's own roundings."""
        mean, std = (array.astype(np.float64) for array in standard(statistics, self.name))
        largest = np.abs((values - mean) / std).max(axis=-1, keepdims=True)
        step = largest / 127 * ROUND_UP + SUBNORMAL
        return 0.5 * std * step + FLOAT32_SLACK * (np.abs(values) + np.abs(mean) + std * largest)


@dataclass(frozen=True)
class Int8ChannelCodec(Codec):
    """One byte a value, two float16 a channel of each row: q = round((x - low_c) / s_c), s_c = (max_t x - low_c) / 255.

    Needs no statistics and is twice as exact as int8, for 4 / N bytes more a value. The offset low is rounded down and
    the scale up to float16, so that no code is clipped. x is read back as low_c + s_c * q.
    """

    base_name: ClassVar[str] = "int8-channel"

    def parts(self, shape: tuple[int, ...]) -> tuple[CodecArray, ...]:
        """See Codec."""
        _, channels = tap_shape(self.name, shape)
        encoding = {"encoding": "value = offset[channel] + scale[channel] * code"}
        return (
            CodecArray("", np.dtype("u1"), shape, ("token", "channel"), 0, self.zstd, encoding),
            CodecArray("scale", np.dtype("<f2"), (channels,), ("channel",), np.nan),
            CodecArray("offset", np.dtype("<f2"), (channels,), ("channel",), np.nan),
        )

    def encode(self, values: np.ndarray, statistics: Statistics | None = None) -> dict[str, np.ndarray]:
        """See Codec."""
        per_channel = (len(values), values.shape[-1])
        codes = np.empty(values.shape, np.uint8)
        scale, offset = np.empty(per_channel, "<f2"), np.empty(per_channel, "<f2")
        for block in blocks(values):
            x = values[block].astype(np.float32, copy=False)
            offset[block] = -float16_at_least(-x.min(axis=-2))
            low, high = offset[block].astype(np.float32), x.max(axis=-2)
            scale[block] = np.inf if np.isinf(low).any() else float16_at_least((high - low) / np.float32(255))
            if not np.isfinite(scale[block]).all():
                raise self.cannot_hold(values)
            z = x - low[:, None]
            z *= inverse(scale[block])[:, None]
            codes[block] = np.rint(z, out=z)
        return {"": codes, "scale": scale, "offset": offset}

    def decode(self, parts: Parts, shape: tuple[int, ...], statistics: Statistics | None = None) -> np.ndarray:
        """See Codec."""
        codes = parts[""]
        scale, offset = (parts[name].astype(np.float32)[:, None] for name in ("scale", "offset"))
        values = np.empty(codes.shape, np.float32)
        for block in blocks(values):
            out = values[block]
            np.multiply(codes[block], scale[block], out=out, dtype=np.float32)
            out += offset[block]
        return values

    def max_error(self, values: np.ndarray, statistics: Statistics | None = None) -> np.ndarray:
        """See Codec: half a step, (max_t x - min_t x) / 510, and the roundings of float16 offsets and scales."""
        low, high = (edge(values.astype(np.float64), axis=-2, keepdims=True) for edge in (np.min, np.max))
        rounded_low = low - np.abs(low) * 2.0**-10 - SUBNORMAL
        step = (high - rounded_low) / 255 * ROUND_UP + SUBNORMAL
        return 0.5 * step + FLOAT32_SLACK * (np.abs(low) + np.abs(high))
