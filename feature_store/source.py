"""FeatureSource: the protocol of everything that gives teacher features by row."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np

from feature_store.format.addressing import Rows


@dataclass(frozen=True)
class FeatureBatch:
    """Teacher outputs for B rows, in the order asked for.

    Attributes:
        rows: The B addresses: int64 [B, 3], unit, position and view of each.
        taps: Array [B, N, C] per tap name, in the dtype the source holds.
        logits: Teacher logits [B, classes], or None if the teacher has no classifier.
        encoded: Instead of taps, for a source asked not to decode them: the codec's arrays by suffix, per tap name.
    """

    rows: np.ndarray
    taps: dict[str, np.ndarray]
    logits: np.ndarray | None
    encoded: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)


@runtime_checkable
class FeatureSource(Protocol):
    """Gives teacher features by row.

    A cached source looks rows up; a live source computes them from the view's pixels. Both take the same
    arguments, so that a trainer does not know which one it has.
    """

    needs_pixels: bool

    def read(
        self,
        rows: Rows,
        taps: Sequence[str] | None = None,
        *,
        pixels: np.ndarray | None = None,
        decode: bool = True,
    ) -> FeatureBatch:
        """Features of the given rows.

        Args:
            rows: Addresses, RowIds or integers [B, 3]; any order, repeats allowed.
            taps: Tap names; None for all the source holds.
            pixels: The rows' view pixels, uint8 [B, H, W, 3]. Required when ``needs_pixels``.
            decode: False leaves taps of a source that holds them encoded as they are, in ``encoded``.

        Raises:
            UncommittedError: A row was never committed.
            QuarantinedError: A row's sample was quarantined.
            CorruptStoreError: Committed bytes are missing or damaged.
            InputError: Unknown tap, or pixels missing for a live source.
        """
        ...

    def iter_unit(
        self, unit: int, view: int, taps: Sequence[str] | None = None, *, batch_size: int = 256
    ) -> Iterator[FeatureBatch]:
        """All readable rows of one unit and view in position order, in batches."""
        ...
