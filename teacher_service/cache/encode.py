"""Encoding of features: a unit's batches become one EncodedUnit.

Shape legend: b samples of a batch, V views, n samples of a unit, N tokens, C channels.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from functools import partial

import numpy as np

from feature_store.format.layout import StoreLayout
from feature_store.views import ViewParams
from feature_store.write.unit import EncodedUnit
from teacher_service.cache.decode import ViewBatch

PIECE_SAMPLES = 8  # of a batch, encoded by one thread at a time


class UnitEncoder:
    """Encodes one unit's batches as they come in, so that little memory is held.

    Args:
        layout: The store's.
        keys: The unit's n sample keys.
        num_views: Views of the unit's task, V.
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
        self._jpegs = [[b""] * len(keys) for _ in range(num_views)]
        self._pixel_crc = np.zeros(rows, np.uint32)
        self._missing = len(keys)

    def add(self, batch: ViewBatch, features: Mapping[str, np.ndarray], pool: Executor | None = None) -> None:
        """Encode one batch's features [b * V, ...], by codec name; a pool's threads share the work.

        Raises:
            InputError: A value is not finite or too large for its codec.
        """
        span = slice(batch.start, batch.start + len(batch))
        step = PIECE_SAMPLES if pool else len(batch)
        pieces = [range(start, min(start + step, len(batch))) for start in range(0, len(batch), step)]
        list((pool.map if pool else map)(partial(self._encode, batch.start, features), pieces))
        self._labels[span], self._pixel_crc[:, span] = batch.labels, batch.pixel_crc
        self._quarantined |= batch.quarantined
        for params, more in zip(self._params, batch.params, strict=True):
            params[span] = more
        for jpegs, more in zip(self._jpegs, batch.jpegs, strict=False):  # without materialised views there are none
            jpegs[span] = more
        self._missing -= len(batch)

    def _encode(self, first: int, features: Mapping[str, np.ndarray], piece: range) -> None:
        """Encode some of a batch's samples; first is the position of the batch's first one."""
        views, span = len(self._params), slice(first + piece.start, first + piece.stop)
        for name, codec in self._codecs.items():
            values = features[name][piece.start * views : piece.stop * views]
            for suffix, encoded in codec.encode(values).items():
                self._features[name][suffix][:, span] = self._by_view(encoded)

    @property
    def whole(self) -> bool:
        """Whether all batches were added."""
        return not self._missing

    def _by_view(self, values: np.ndarray) -> np.ndarray:
        """[b * V, ...] to [V, b, ...]."""
        return values.reshape(-1, len(self._params), *values.shape[1:]).swapaxes(0, 1)

    def views(self) -> list[dict[str, tuple[bytes, int]]]:
        """JPEG and label by sample key, of each materialised view; quarantined samples have none."""
        labels = self._labels.tolist()
        return [
            {key: (jpeg, label) for key, jpeg, label in zip(self._keys, view, labels, strict=True) if jpeg}
            for view in self._jpegs
        ]

    def unit(self) -> EncodedUnit:
        """The whole unit."""
        return EncodedUnit(
            keys=self._keys,
            labels=self._labels,
            quarantined=self._quarantined,
            params=self._params,
            pixel_crc=self._pixel_crc,
            features=self._features,
        )
