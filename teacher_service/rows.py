"""Collects one unit's rows from the batches they are computed in.

Shape legend: b samples of a batch, V views, n samples of a unit, N tokens, C channels.
"""

import threading
from collections.abc import Mapping, Sequence

import numpy as np

from feature_store.codecs.registry import value_codecs
from feature_store.manifest import Manifest
from feature_store.views import ViewParams
from feature_store.writer import UnitData
from teacher_service.decoding import Batch


class UnitRows:
    """One unit's rows while its batches come in, already encoded, so that they take little memory.

    Several threads may add batches, in any order.

    Args:
        manifest: The store's.
        keys: The unit's n sample keys.
        num_views: Views that are collected, V.
    """

    def __init__(self, manifest: Manifest, keys: Sequence[str], num_views: int) -> None:
        rows = (num_views, len(keys))
        self._codecs = value_codecs(manifest)
        self._values = {
            path: {part.suffix: np.full((*rows, *part.row_shape), part.fill, part.dtype) for part in codec.parts}
            for path, codec in self._codecs.items()
        }
        self._keys, self._labels = list(keys), np.full(len(keys), -1, np.int64)
        self._quarantined: dict[int, str] = {}
        self._params: list[list[ViewParams | None]] = [[None] * len(keys) for _ in range(num_views)]
        self._pixel_crc = np.zeros(rows, np.uint32)
        self._missing, self._lock = len(keys), threading.Lock()

    def add(self, batch: Batch, taps: Mapping[str, np.ndarray], logits: np.ndarray | None) -> None:
        """Take one batch with the teacher's outputs [b * V, ...].

        Raises:
            InputError: A value is not finite or too large for its codec.
        """
        span = slice(batch.start, batch.start + len(batch))
        outputs = {f"taps/{name}": values for name, values in taps.items()} | {"logits": logits}
        for path, codec in self._codecs.items():
            for suffix, encoded in codec.encode(np.asarray(outputs[path])).items():
                self._values[path][suffix][:, span] = self._by_view(encoded)
        self._labels[span], self._pixel_crc[:, span] = batch.labels, batch.pixel_crc
        for params, more in zip(self._params, batch.params, strict=True):
            params[span] = more
        with self._lock:
            self._quarantined |= batch.quarantined
            self._missing -= len(batch)

    @property
    def whole(self) -> bool:
        """Whether no batch is missing."""
        return not self._missing

    def _by_view(self, values: np.ndarray) -> np.ndarray:
        """[b * V, ...] to [V, b, ...]."""
        return values.reshape(-1, len(self._params), *values.shape[1:]).swapaxes(0, 1)

    def data(self) -> UnitData:
        """The finished unit."""
        return UnitData(
            keys=self._keys,
            labels=self._labels,
            quarantined=dict(sorted(self._quarantined.items())),
            params=self._params,
            pixel_crc=self._pixel_crc,
            taps={path.removeprefix("taps/"): parts for path, parts in self._values.items() if path != "logits"},
            logits=self._values.get("logits"),
        )
