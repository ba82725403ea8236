"""Codec: how rows of one shape become arrays.

Shape legend: n rows, N tokens, C channels.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from feature_store.errors import InputError, Remedy

Parts = Mapping[str, np.ndarray]
"""Arrays [n, ...] of encoded rows by suffix: ``""`` is the array itself, ``scale`` the one beside it."""

Statistics = Mapping[str, np.ndarray]
"""Per-channel numbers [C] a codec learnt from a first sample; float32."""

ZSTD_SUFFIX = "+zstd"

_BLOCK_BYTES = 1 << 19  # of float32 worked on at a time, so that it stays in a core's own cache


@dataclass(frozen=True)
class CodecArray:
    """One array of a codec.

    Attributes:
        suffix: The array's name after the value's: ``""`` for ``taps/stage4``, ``scale`` for ``taps/stage4.scale``.
        dtype: Little-endian numpy dtype.
        row_shape: Shape of one row.
        dimensions: Names of its axes.
        fill: Value of unwritten rows; such that they decode to NaN where the codec can.
        zstd: Whether each row is compressed.
        attributes: Metadata for foreign clients, kept as the array's zarr attributes.
    """

    suffix: str
    dtype: np.dtype
    row_shape: tuple[int, ...]
    dimensions: tuple[str, ...]
    fill: Any = 0
    zstd: bool = False
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Codec(ABC):
    """Encoding of values of one row shape as arrays, with its inverse.

    Attributes:
        zstd: Whether the largest array is compressed as well, row by row, without loss.
    """

    zstd: bool = False

    base_name: ClassVar[str]
    calibrated: ClassVar[bool] = False
    """Whether encode and decode need statistics."""
    plain: ClassVar[bool] = False
    """Whether the stored array holds the values themselves, so that decoding is a matter of dtype."""

    @property
    def name(self) -> str:
        """Name in the manifest."""
        return self.base_name + ZSTD_SUFFIX * self.zstd

    @abstractmethod
    def parts(self, shape: tuple[int, ...]) -> tuple[CodecArray, ...]:
        """The arrays rows of a shape are stored in; the first has suffix ``""``.

        Raises:
            InputError: The codec cannot hold this shape.
        """

    def calibrate(self, values: np.ndarray) -> dict[str, list[float]] | None:
        """Statistics [C] of a first sample [n, N, C], for the manifest; None if the codec needs none.

        Raises:
            InputError: A value is not finite.
        """
        return None

    @abstractmethod
    def encode(self, values: np.ndarray, statistics: Statistics | None = None) -> dict[str, np.ndarray]:
        """Rows [n, *shape] as stored, by suffix.

        Raises:
            InputError: A value is not finite, or too large for the codec.
        """

    @abstractmethod
    def decode(self, parts: Parts, shape: tuple[int, ...], statistics: Statistics | None = None) -> np.ndarray:
        """Float32 values [n, *shape] of stored rows."""

    @abstractmethod
    def max_error(self, values: np.ndarray, statistics: Statistics | None = None) -> np.ndarray:
        """The stated error: the largest possible |decode(encode(x)) - x| of each value, broadcastable to them."""

    def cannot_hold(self, values: np.ndarray) -> InputError:
        """Error for values the codec cannot hold."""
        return InputError(
            f"the teacher gave values that codec {self.name} cannot hold (largest magnitude "
            f"{float(np.abs(values).max()):g}); choose codec f32, or check the teacher for NaN",
            remedy=Remedy.EXACT_CODEC,
        )


def axes(shape: tuple[int, ...]) -> tuple[str, ...]:
    """Names of a row's axes: tokens and channels of a tap, classes of logits."""
    return {1: ("class",), 2: ("token", "channel")}[len(shape)]


def blocks(values: np.ndarray) -> Iterator[slice]:
    """Spans of rows that fit the cache."""
    rows = max(1, _BLOCK_BYTES // max(1, 4 * int(np.prod(values.shape[1:]))))
    return (slice(start, start + rows) for start in range(0, len(values), rows))
