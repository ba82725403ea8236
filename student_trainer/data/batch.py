"""Training batches: views with the teacher's cached features.

Shape legend: B rows of a batch, H W pixels of a view, N tokens, C channels, K classes.
"""

from collections.abc import Sequence, Set
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from feature_store.errors import ImageError, InputError, UncommittedError
from feature_store.format.addressing import RowId
from feature_store.inputs.base import SampleSource
from feature_store.inputs.unit_tars import tar_changed, unit_tar
from feature_store.source import FeatureSource
from feature_store.store import Store
from feature_store.teacher.torch_codecs import as_tensor
from student_trainer.data.labels import require_label
from student_trainer.data.materialised import UnitSource
from student_trainer.data.replayed import ViewSupplier

_SHOWN = 5  # names listed in an error message


class RawFeatures(NamedTuple):
    """One teacher's features as a source gave them.

    Attributes:
        taps: Parts [B, ...] of each tap by suffix, to be decoded on the trainer's device; values alone under ``""``.
        logits: Teacher logits [B, K], or None.
    """

    taps: dict[str, dict[str, Tensor]]
    logits: Tensor | None


class Batch(NamedTuple):
    """One batch as a worker made it.

    Attributes:
        rows: int64 [B, 3]: unit, position, view.
        pixels: uint8 [B, H, W, 3].
        labels: int64 [B]; NO_LABEL (-1) for samples without one.
        features: Of each teacher; empty if none are read.
        unreadable: ``tar/key: reason`` of samples left out; always empty when a store is replayed.
    """

    rows: Tensor
    pixels: Tensor
    labels: Tensor
    features: tuple[RawFeatures, ...]
    unreadable: list[str]

    def row_ids(self) -> list[RowId]:
        """The rows as addresses."""
        return [RowId(*row) for row in self.rows.tolist()]


class ViewDataset(Dataset[Batch]):
    """Random access to batches of rows: ``dataset[rows]`` is a Batch.

    One worker makes one whole batch, so that cached features are read in one go and in parallel with training.
    """

    def __init__(
        self,
        tars: Sequence[UnitSource],
        views: ViewSupplier,
        *,
        num_classes: int | None = None,
        sources: Sequence[FeatureSource] = (),
        optional_labels: bool = False,
    ) -> None:
        """Join images, views and features.

        Args:
            tars: One per unit, in unit order, of the kind the views are read from.
            views: Which view each row is, and its pixels.
            num_classes: Refuse labels that reach this; None to accept any.
            sources: Give the features put into the batches, each all of its taps; one for each teacher.
            optional_labels: Whether a sample may have no label.
        """
        self.tars, self.views, self.num_classes, self.sources = tuple(tars), views, num_classes, tuple(sources)
        self._optional_labels = optional_labels

    def __getitem__(self, rows: Sequence[RowId]) -> Batch:
        """The batch of these rows, in this order.

        Raises:
            InputError: An image cannot be read although it was cached, or a label is out of range.
            MismatchError: A label or view differs from what the teacher saw.
        """
        kept: list[RowId] = []
        pixels: list[np.ndarray] = []
        labels: list[int] = []
        unreadable: list[str] = []
        for row in rows:
            try:
                view, label = self._view(row)
            except ImageError as error:
                unreadable.append(self._leave_out(row, error))
            else:
                kept.append(row)
                pixels.append(view)
                labels.append(label)
        stacked = np.stack(pixels) if pixels else np.zeros((0, *self.views.size, 3), np.uint8)
        kept_rows = np.array(kept, np.int64).reshape(-1, 3)
        return Batch(
            torch.from_numpy(kept_rows),
            torch.from_numpy(stacked),
            torch.tensor(labels, dtype=torch.int64),
            tuple(_read(source, kept_rows, stacked) for source in self.sources),
            unreadable,
        )

    def _view(self, row: RowId) -> tuple[np.ndarray, int]:
        sample = self.views.read(self.tars[row.unit], row)
        if self.num_classes is not None:
            name, optional = self.tars[row.unit].name, self._optional_labels
            require_label(sample.label, self.num_classes, "", sample.key, name, optional=optional)
        pixels = self.views.pixels(row, sample)
        self.views.check(row, sample, pixels)
        return pixels, sample.label

    def _leave_out(self, row: RowId, error: ImageError) -> str:
        tar = self.tars[row.unit]
        if self.views.skips_unreadable:
            return f"{tar.name}/{tar.keys[row.position]}: {error}"
        raise InputError(
            f"sample {tar.keys[row.position]!r} of {tar.url} was readable when the store was written but is not now: "
            f"{error}; restore it as it was then"
        ) from error


def _read(source: FeatureSource, rows: np.ndarray, pixels: np.ndarray) -> RawFeatures:
    features = source.read(rows, pixels=pixels, decode=False)
    logits = None if features.logits is None else torch.from_numpy(features.logits)
    parts = {tap: {"": values} for tap, values in features.taps.items()} | features.encoded
    return RawFeatures(
        {tap: {name: as_tensor(part) for name, part in some.items()} for tap, some in parts.items()}, logits
    )


def match_tars(store: Store, tars: Sequence[SampleSource]) -> list[SampleSource]:
    """The sources of the store's units in order, found by the hash of their headers: names need not differ.

    Raises:
        InputError: A source is missing, or one is given that the store does not know, or twice.
        MismatchError: A source, or the keys in it, changed since the store was written.
    """
    infos, given = store.manifest.tars, {tar.header_sha256: tar for tar in tars}
    known = {info.header_sha256: info for info in infos}
    unknown = {tar.name: tar for tar in tars if tar.header_sha256 not in known}
    lacking = [(unit, info.name) for unit, info in enumerate(infos) if info.header_sha256 not in given]
    for unit, name in lacking:
        if name in unknown:
            unit_tar(store, unit, unknown[name])  # says what differs
    missing = {f"{name} (unit {unit})" for unit, name in lacking}
    _require_none(missing, "tars of the store are missing", "add them to --tars")
    _require_none(unknown.keys(), "tars are not in the store", "leave them out, or cache them with teacher-service")
    _require_none(
        {tar.url for tar in tars if given[tar.header_sha256] is not tar},
        "tars are given twice, under several names", "give each once",
    )  # fmt: skip
    matched = [unit_tar(store, unit, given[info.header_sha256]) for unit, info in enumerate(infos)]
    for unit, tar in enumerate(matched):
        _require_keys(store.keys(unit), tar)
    return matched


def _require_keys(keys: Sequence[str], tar: SampleSource) -> None:
    for position, (expected, got) in enumerate(zip(keys, tar.keys, strict=True)):
        if expected != got:
            raise tar_changed(tar, f"keys[{position}]", expected, got)


def require_views(store: Store, num_views: int) -> None:
    """Refuse a store whose units do not all hold views 0..num_views-1.

    Raises:
        UncommittedError: Names the first units and the views they lack.
    """
    lacking = []
    for unit, info in enumerate(store.manifest.tars):
        views = sorted(set(range(num_views)) - store.committed_views(unit))
        if views:
            lacking.append(f"{info.name} (views {', '.join(map(str, views))})")
    if lacking:
        raise UncommittedError(
            f"{len(lacking)} of {len(store.manifest.tars)} units lack views: {_some(lacking)}; run the same "
            "`teacher-service cache` command again to finish the store, or use fewer with --num-views"
        )


def training_positions(
    tars: Sequence[UnitSource], *, store: Store | None = None, keys: frozenset[str] | None = None
) -> list[np.ndarray]:
    """Positions to train on per unit: all that are not quarantined, or those of the chosen keys.

    Raises:
        InputError: A chosen key is in no tar.
    """
    if keys is not None:
        present = {key for tar in tars for key in tar.keys}
        _require_none(keys - present, "keys of --keys-file are in no tar", "correct the file")
    units = []
    for unit, tar in enumerate(tars):
        left_out = store.quarantined(unit) if store is not None else {}
        chosen = (p for p, key in enumerate(tar.keys) if p not in left_out and (keys is None or key in keys))
        units.append(np.fromiter(chosen, np.int64))
    return units


def read_keys(path: Path) -> frozenset[str]:
    """Sample keys from a text file, one per line; blank lines do not count.

    Raises:
        InputError: The file cannot be read or holds no key.
    """
    try:
        keys = frozenset(line.strip() for line in path.read_text().splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--keys-file {path} cannot be read: {error}") from error
    if not keys:
        raise InputError(f"--keys-file {path} holds no key; expected one sample key per line")
    return keys


def _require_none(names: Set[str], what: str, remedy: str) -> None:
    if names:
        raise InputError(f"{len(names)} {what}: {_some(sorted(names))}; {remedy}")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
