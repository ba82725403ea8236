"""Views of rows: replayed from a store, or drawn."""

from collections import OrderedDict
from typing import Any, NamedTuple, Protocol

import numpy as np

from feature_store.errors import InputError, MismatchError
from feature_store.format.addressing import RowId
from feature_store.inputs.base import Sample, SampleSource
from feature_store.store import Store
from feature_store.views import ViewParams, ViewPolicy, apply_view, check_pixels, decode_image, draw_view, replay_view

CHECKED_ROWS = 8  # rows at the start of every unit and view whose pixels are checked even if not all are


class ViewSupplier(Protocol):
    """Says which view of a sample a row is, and whether what was made of it is right.

    Attributes:
        size: (H, W) of a view, in pixels.
        skips_unreadable: Whether a sample whose image cannot be decoded is left out; otherwise it is an error.
    """

    size: tuple[int, int]
    skips_unreadable: bool

    def read(self, tar: Any, row: RowId) -> Sample:
        """The sample whose image the row's view is made of; ``tar`` is the source of the row's unit.

        Raises:
            ImageError: It has no usable image or label.
        """
        ...

    def pixels(self, row: RowId, sample: Sample) -> np.ndarray:
        """The row's view, uint8 [H, W, 3].

        Raises:
            ImageError: The image cannot be decoded.
        """
        ...

    def check(self, row: RowId, sample: Sample, pixels: np.ndarray) -> None:
        """Refuse a sample or a view that is not the one meant.

        Raises:
            MismatchError: The label or the pixels differ from those of the teacher's pass.
        """
        ...


class _StoredUnit(NamedTuple):
    params: list[ViewParams | None]
    pixel_crcs: np.ndarray
    labels: np.ndarray
    pillow: str | None  # version that made the pixels


class StoredViews:
    """Replays the parameters a store holds; nothing is drawn again."""

    skips_unreadable = False  # what the teacher's pass could not read is quarantined and never asked for

    def __init__(self, store: Store, *, check_all: bool = True, units_in_memory: int = 16) -> None:
        """Replay a store.

        Args:
            store: The store.
            check_all: Check the pixels of every row; otherwise of the first CHECKED_ROWS of each unit and view. A CRC
                takes 0.05 ms, making a 224-pixel view 2 to 4.
            units_in_memory: Units whose parameters are kept; should cover the units that are shuffled together.
        """
        self.size, self._encoding = store.manifest.policy.size, store.manifest.view_encoding
        self._store, self._check_all, self._limit = store, check_all, units_in_memory
        self._units: OrderedDict[tuple[int, int], _StoredUnit] = OrderedDict()

    def read(self, tar: SampleSource, row: RowId) -> Sample:
        """The source sample."""
        return tar.read(row.position)

    def pixels(self, row: RowId, sample: Sample) -> np.ndarray:
        """The view the teacher saw, made again from the stored parameters."""
        image = decode_image(sample.image)
        return replay_view(image, self.params(row, sample.key, image.size), self.size, self._encoding)

    def params(self, row: RowId, key: str, source_size: tuple[int, int]) -> ViewParams:
        """Stored parameters of the row's view, for a source image of (width, height) pixels.

        Raises:
            InputError: The sample is quarantined.
        """
        params = self._unit(row).params[row.position]
        if params is None:
            raise InputError(f"sample {key!r} (unit {row.unit}) is quarantined in the store: it has no views")
        return params

    def check(self, row: RowId, sample: Sample, pixels: np.ndarray) -> None:
        """Compare the label and the CRC of the pixels."""
        unit = self._unit(row)
        if sample.label != unit.labels[row.position]:
            raise MismatchError(
                f"label of sample {sample.key!r}",
                expected=int(unit.labels[row.position]),
                got=sample.label,
                remedy="train on the images the store was written from, or write a new store",
            )
        if self._check_all or row.position < CHECKED_ROWS:
            check_pixels(pixels, int(unit.pixel_crcs[row.position]), sample.key, row.view, unit.pillow)

    def _unit(self, row: RowId) -> _StoredUnit:
        at = row.unit, row.view
        if at not in self._units:
            self._units[at] = self._load(*at)
        self._units.move_to_end(at)
        if len(self._units) > self._limit:
            self._units.popitem(last=False)
        return self._units[at]

    def _load(self, unit: int, view: int) -> _StoredUnit:
        store = self._store
        pillow = store.committed.record(unit, view).software.get("pillow")
        return _StoredUnit(store.view_params(unit, view), store.pixel_crcs(unit, view), store.labels(unit), pillow)


class DrawnViews:
    """Draws views from a policy and a seed, for runs without a store and for evaluation."""

    skips_unreadable = True

    def __init__(self, policy: ViewPolicy, seed: int = 0) -> None:
        self.size = policy.size
        self._policy, self._seed = policy, seed

    def read(self, tar: SampleSource, row: RowId) -> Sample:
        """The source sample."""
        return tar.read(row.position)

    def pixels(self, row: RowId, sample: Sample) -> np.ndarray:
        """The view drawn for this key and view index."""
        image = decode_image(sample.image)
        return apply_view(image, self.params(row, sample.key, image.size), self.size)

    def params(self, row: RowId, key: str, source_size: tuple[int, int]) -> ViewParams:
        """Parameters drawn for this key and view: what a store with this policy and seed would hold."""
        return draw_view(self._policy, self._seed, key, row.view, source_size)

    def check(self, row: RowId, sample: Sample, pixels: np.ndarray) -> None:
        """Nothing to compare with: there was no earlier pass."""
