"""FeatureBrowser: colours, most probable classes, nearest rows of a row.

Shape legend: n rows, N tokens, C channels, K classes.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from feature_store.errors import InputError
from feature_store.format.addressing import RowId, row_ids
from feature_store.format.manifest import InputInfo
from feature_store.inputs.options import DEFAULT, TarOptions
from feature_store.source import FeatureBatch
from feature_store.store import Store
from feature_store.tools.features import ColourMap, replay_row
from feature_store.tools.row_subset import pick, sampled_shards

if TYPE_CHECKING:
    # its webdataset imports torch, which cached rows do without
    from feature_store.inputs.unit_tars import UnitSources, UnitTars

TAP = "stage4"
_ROWS = 512  # that any row is compared with
_PAINTED = 64  # of them that decide what the colours mean


@dataclass(frozen=True)
class Prediction:
    """A predicted class and its probability."""

    label: int
    probability: float


@dataclass(frozen=True)
class Neighbour:
    """A row and its cosine similarity, 1 for the same features."""

    row: RowId
    key: str
    similarity: float


@dataclass(frozen=True)
class ReferenceRows:
    """Some rows of a store.

    Attributes:
        rows: Where they are.
        keys: Their sample keys.
        mean: Of each channel of the pooled features [C].
        spread: Standard deviation of each [C].
        directions: The rows' pooled features, standardised per channel and of length 1: [n, C]. A few channels of a
            transformer are so heavy that without it every row is like every other.
        colours: Map of features to colours.
        committed: Units times views that were committed then.
    """

    rows: list[RowId]
    keys: list[str]
    mean: np.ndarray
    spread: np.ndarray
    directions: np.ndarray
    colours: ColourMap
    committed: int

    @classmethod
    def of(cls, store: Store) -> "ReferenceRows":
        """A sample of a store, the same for the same store.

        Raises:
            InputError: No unit is committed.
        """
        rng = np.random.default_rng(0)
        shards = sampled_shards(store, rng)
        rows = row_ids(np.concatenate([pick(shard, -(-_ROWS // len(shards)), rng) for shard in shards]))
        features = _features(store, rows)
        pooled = features.mean(axis=1)
        mean, spread = pooled.mean(axis=0), pooled.std(axis=0)
        spread = np.where(spread > 0, spread, 1)
        painted = features[:: -(-len(rows) // _PAINTED)]
        keys = [store.keys(row.unit)[row.position] for row in rows]
        return cls(
            rows,
            keys,
            mean,
            spread,
            _unit_length((pooled - mean) / spread),
            ColourMap.fit(painted),
            store.committed.places,
        )

    def neighbours(self, row: RowId, features_NC: np.ndarray, count: int) -> list[Neighbour]:
        """Nearest rows of other samples, the most similar first."""
        direction = _unit_length((features_NC.mean(axis=0) - self.mean)[None] / self.spread)[0]
        similarities = self.directions @ direction
        order = np.argsort(-similarities, kind="stable").tolist()
        others = (at for at in order if self.rows[at][:2] != row[:2])
        seen: set[str] = set()
        found = []
        for at in others:
            if self.keys[at] not in seen and len(found) < count:
                seen.add(self.keys[at])
                found.append(Neighbour(self.rows[at], self.keys[at], float(similarities[at])))
        return found


class FeatureBrowser:
    """Looks at rows of a store that may change.

    Args:
        store: The store as it is now.
        tars: Its tars, for the views' pixels: paths, patterns, URLs; none for no pixels.
        options: Options for opening them.
        inputs: Inputs in the store's manifest.
    """

    def __init__(
        self,
        store: Callable[[], Store],
        tars: Sequence[str] = (),
        options: TarOptions = DEFAULT,
        inputs: InputInfo | None = None,
    ) -> None:
        self._store = store
        self._tars = _units(tars, options, inputs) if tars else None
        self._sample: tuple[str, ReferenceRows] | None = None
        self._lock = threading.Lock()

    @property
    def has_pixels(self) -> bool:
        """Whether it can show views."""
        return self._tars is not None

    def sample(self) -> ReferenceRows:
        """Rows to compare with; drawn again when the store has grown to twice its size, or some of them were withdrawn.

        Raises:
            InputError: No unit is committed.
        """
        store = self._store()
        with self._lock:
            if self._sample is None or self._is_outdated(*self._sample, store):
                self._sample = store.manifest.identity(), ReferenceRows.of(store)
            return self._sample[1]

    @staticmethod
    def _is_outdated(identity: str, sample: ReferenceRows, store: Store) -> bool:
        shards = {(row.unit, row.view) for row in sample.rows}
        return (
            identity != store.manifest.identity()
            or store.committed.places >= 2 * sample.committed
            or not all(store.is_committed(*shard) for shard in shards)
        )

    def read(self, row: RowId) -> FeatureBatch:
        """The row's features and logits.

        Raises:
            UncommittedError, QuarantinedError, CorruptStoreError: See ZarrSource.read.
        """
        return self._store().source([TAP]).read([row])

    def colours(self, row: RowId) -> np.ndarray:
        """The row's features as colours, uint8 [H, W, 3] of the teacher's grid."""
        features = self.read(row).taps[TAP].astype(np.float32)
        grid = self._store().manifest.split.output_grid
        return np.round(self.sample().colours.paint(features, grid)[0] * 255).astype(np.uint8)

    def pixels(self, row: RowId) -> np.ndarray:
        """The row's view, uint8 [H, W, 3], compared with what the teacher saw.

        Raises:
            InputError: The tar is not at hand.
            MismatchError: It is another one, or its pixels come out differently.
        """
        store = self._store()
        store.committed.require(row)
        if self._tars is None:
            name = store.manifest.tars[row.unit].name
            raise InputError(f"tar {name} is not among those the service was given; start it with --tars")
        return replay_row(store, self._tars.find(store, row.unit), row)


def predictions(logits_K: np.ndarray, count: int) -> list[Prediction]:
    """The most probable classes."""
    exponents = np.exp(logits_K.astype(np.float64) - float(logits_K.max()))
    probabilities = exponents / exponents.sum()
    order = np.argsort(-probabilities, kind="stable")[:count].tolist()
    return [Prediction(label, float(probabilities[label])) for label in order]


def _features(store: Store, rows: Sequence[RowId]) -> np.ndarray:
    return store.source([TAP]).read(rows).taps[TAP].astype(np.float32)


def _unit_length(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1)


def _units(tars: Sequence[str], options: TarOptions, inputs: InputInfo | None) -> "UnitTars | UnitSources":
    from feature_store.inputs.unit_tars import open_units

    return open_units(tars, options, inputs)
