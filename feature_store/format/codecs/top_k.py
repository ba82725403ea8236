"""Codec top<k>: the k most likely classes of the logits.

The rest of the probability is spread evenly over all other classes.

Shape legend: n rows, K classes, k kept.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from feature_store.errors import InputError
from feature_store.format.codecs.base import Codec, CodecArray, Parts, Statistics


@dataclass(frozen=True)
class TopKCodec(Codec):
    """The k most likely classes and their log-probabilities; all other classes share the rest.

    Decoding gives dense logits, whose softmax (at temperature 1) has the k probabilities exact, but for float32
    rounding, and the rest of the mass spread evenly. The logits' own level, which no softmax sees, is lost.

    Attributes:
        k: Classes kept.
    """

    k: int = 10
    base_name: ClassVar[str] = "top"

    @property
    def name(self) -> str:
        """Name in the manifest: ``top<k>``."""
        return super().name.replace(self.base_name, f"{self.base_name}{self.k}")

    def parts(self, shape: tuple[int, ...]) -> tuple[CodecArray, ...]:
        """See Codec: class indices, and k log-probabilities followed by that of each other class."""
        if len(shape) != 1 or self.k >= shape[0]:
            raise InputError(
                f"codec {self.name} keeps {self.k} of a row's classes, got rows of shape {list(shape)}; it is for "
                "logits with more classes than that: use fewer, or f16"
            )
        index = np.dtype("<u2") if shape[0] <= 2**16 else np.dtype("<u4")
        encoding = {
            "encoding": "class indices, most likely first; beside them in .values their log-probabilities, then that "
            "of each other class"
        }
        return (
            CodecArray("", index, (self.k,), ("rank",), 0, self.zstd, encoding),
            CodecArray("values", np.dtype("<f4"), (self.k + 1,), ("rank",), np.nan),
        )

    def encode(self, values: np.ndarray, statistics: Statistics | None = None) -> dict[str, np.ndarray]:
        """See Codec."""
        index, values_part = (part.dtype for part in self.parts(values.shape[1:]))
        if not np.isfinite(values).all():
            raise self.cannot_hold(values)
        logits = values.astype(np.float64)
        order = np.argsort(-logits, axis=1, kind="stable")  # of equal logits the lower class comes first
        descending = np.take_along_axis(logits, order, axis=1)
        exponents = np.exp(descending - descending[:, :1])
        log_total = descending[:, 0] + np.log(exponents.sum(axis=1))
        with np.errstate(divide="ignore"):
            # summed over the others, not 1 - the sum of the kept: the difference would cancel
            rest = np.log(exponents[:, self.k :].mean(axis=1)) + descending[:, 0] - log_total
        kept = descending[:, : self.k] - log_total[:, None]
        stored = np.column_stack([kept, np.maximum(rest, descending[:, -1] - log_total)])
        return {"": order[:, : self.k].astype(index), "values": stored.astype(values_part)}

    def decode(self, parts: Parts, shape: tuple[int, ...], statistics: Statistics | None = None) -> np.ndarray:
        """See Codec."""
        values = parts["values"]
        logits = np.repeat(values[:, -1:].astype(np.float32), shape[0], axis=1)
        np.put_along_axis(logits, parts[""].astype(np.int64), values[:, :-1], axis=1)
        return logits

    def max_error(self, values: np.ndarray, statistics: Statistics | None = None) -> np.ndarray:
        """See Codec: float32 rounding of the kept classes' log-probabilities; infinite for the others."""
        logits = values.astype(np.float64)
        order = np.argsort(-logits, axis=1, kind="stable")
        span = np.ptp(logits, axis=1, keepdims=True) + np.log(logits.shape[1])
        bound = np.full(logits.shape, np.inf)
        np.put_along_axis(bound, order[:, : self.k], 2.0**-23 * span, axis=1)
        return bound
