"""Collects one unit's rows from the batches they are computed in.

Shape legend: b samples of a batch, V views, n samples of a unit, N tokens, C channels.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from feature_store.codecs import get_codec
from feature_store.manifest import Manifest
from feature_store.views import ViewParams
from feature_store.writer import UnitData
from teacher_service.decoding import Batch


class UnitRows:
    """One unit's rows while its batches come in, already in the stored dtypes.

    Args:
        manifest: The store's.
        keys: The unit's n sample keys.
    """

    def __init__(self, manifest: Manifest, keys: Sequence[str]) -> None:
        rows = (manifest.num_views, len(keys))
        self._codecs = {name: get_codec(tap.codec) for name, tap in manifest.taps.items()}
        self._taps = {
            name: np.zeros((*rows, tap.tokens, tap.channels), self._codecs[name].dtype)
            for name, tap in manifest.taps.items()
        }
        self._logits_codec = get_codec(manifest.logits_codec) if manifest.logits_codec else None
        self._logits = (
            np.zeros((*rows, manifest.teacher.num_classes), self._logits_codec.dtype) if self._logits_codec else None
        )
        self._keys, self._labels = list(keys), np.full(len(keys), -1, np.int64)
        self._quarantined: dict[int, str] = {}
        self._params: list[list[ViewParams | None]] = [[] for _ in range(manifest.num_views)]
        self._pixel_crc = np.zeros(rows, np.uint32)

    def add(self, batch: Batch, taps: Mapping[str, np.ndarray], logits: np.ndarray | None) -> None:
        """Take one batch, in order, with the teacher's outputs [b * V, ...].

        Raises:
            InputError: A value is not finite or too large for its codec.
        """
        span = slice(batch.start, batch.start + len(batch))
        for name, values in taps.items():
            self._taps[name][:, span] = self._by_view(self._codecs[name].encode(values))
        if self._logits is not None and self._logits_codec is not None:
            self._logits[:, span] = self._by_view(self._logits_codec.encode(np.asarray(logits)))
        self._labels[span], self._pixel_crc[:, span] = batch.labels, batch.pixel_crc
        self._quarantined |= batch.quarantined
        for params, more in zip(self._params, batch.params, strict=True):
            params.extend(more)

    def _by_view(self, values: np.ndarray) -> np.ndarray:
        """[b * V, ...] to [V, b, ...]."""
        return values.reshape(-1, len(self._params), *values.shape[1:]).swapaxes(0, 1)

    def data(self) -> UnitData:
        """The finished unit."""
        return UnitData(
            keys=self._keys,
            labels=self._labels,
            quarantined=self._quarantined,
            params=self._params,
            pixel_crc=self._pixel_crc,
            taps=self._taps,
            logits=self._logits,
        )
