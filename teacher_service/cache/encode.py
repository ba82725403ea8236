"""Collects one unit's rows from the batches they are computed in.

Shape legend: b samples of a batch, V views, n samples of a unit, N tokens, C channels.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from functools import partial

import numpy as np

from feature_store.format.layout import StoreLayout
from feature_store.views import ViewParams
from feature_store.write.unit import EncodedUnit
from teacher_service.cache.decode import Batch

PIECE_SAMPLES = 8  # of a batch, encoded by one thread at a time


class UnitRows:
    """One unit's rows while its batches come in, already encoded, so that they take little memory.

    Args:
        layout: The store's.
        keys: The unit's n sample keys.
        num_views: Views that are collected, V.
    """

    def __init__(self, layout: StoreLayout, keys: Sequence[str], num_views: int) -> None:
        rows = (num_views, len(keys))
        self._codecs = layout.codecs
        self._features = {
            name: {suffix: np.full((*rows, *spec.row_shape), spec.fill, spec.dtype) for suffix, spec in parts.items()}
            for name, parts in layout.features.items()
        }
        self._keys, self._labels = list(keys), np.full(len(keys), -1, np.int64)
        self._quarantined: dict[int, str] = {}
        self._params: list[list[ViewParams | None]] = [[None] * len(keys) for _ in range(num_views)]
        self._encoded = [[b""] * len(keys) for _ in range(num_views)]
        self._pixel_crc = np.zeros(rows, np.uint32)
        self._missing = len(keys)

    def add(self, batch: Batch, outputs: Mapping[str, np.ndarray], pool: Executor | None = None) -> None:
        """Take one batch with the teacher's outputs [b * V, ...] by name; a pool's threads share the encoding.

        Raises:
            InputError: A value is not finite or too large for its codec.
        """
        span = slice(batch.start, batch.start + len(batch))
        step = PIECE_SAMPLES if pool else len(batch)
        pieces = [range(start, min(start + step, len(batch))) for start in range(0, len(batch), step)]
        list((pool.map if pool else map)(partial(self._encode, batch.start, outputs), pieces))
        self._labels[span], self._pixel_crc[:, span] = batch.labels, batch.pixel_crc
        self._quarantined |= batch.quarantined
        for params, more in zip(self._params, batch.params, strict=True):
            params[span] = more
        for encoded, jpegs in zip(self._encoded, batch.encoded, strict=False):  # a batch may come without
            encoded[span] = jpegs
        self._missing -= len(batch)

    def _encode(self, first: int, outputs: Mapping[str, np.ndarray], piece: range) -> None:
        """Encode some of a batch's samples; first is the position of the batch's first one."""
        views, span = len(self._params), slice(first + piece.start, first + piece.stop)
        for name, codec in self._codecs.items():
            values = outputs[name][piece.start * views : piece.stop * views]
            for suffix, encoded in codec.encode(values).items():
                self._features[name][suffix][:, span] = self._by_view(encoded)

    @property
    def whole(self) -> bool:
        """Whether no batch is missing."""
        return not self._missing

    def _by_view(self, values: np.ndarray) -> np.ndarray:
        """[b * V, ...] to [V, b, ...]."""
        return values.reshape(-1, len(self._params), *values.shape[1:]).swapaxes(0, 1)

    def views(self) -> list[dict[str, tuple[bytes, int]]]:
        """JPEG and label by sample key, of each materialised view; quarantined samples have none."""
        labels = self._labels.tolist()
        return [
            {key: (jpeg, label) for key, jpeg, label in zip(self._keys, view, labels, strict=True) if jpeg}
            for view in self._encoded
        ]

    def data(self) -> EncodedUnit:
        """The finished unit."""
        return EncodedUnit(
            keys=self._keys,
            labels=self._labels,
            quarantined=self._quarantined,
            params=self._params,
            pixel_crc=self._pixel_crc,
            features=self._features,
        )
