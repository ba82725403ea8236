"""Store: one open store."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from feature_store.backends.base import ObjectStore
from feature_store.backends.local import LocalObjects
from feature_store.backends.open import open_objects
from feature_store.commits import index as commit_index
from feature_store.commits import orphans as orphans
from feature_store.commits.locks import exclusive, lock_name
from feature_store.commits.log import CommitLog, load_commits, load_store
from feature_store.commits.record import FOLDER, CommitRecord, already_committed, decode_record, parse_record_path
from feature_store.commits.root import ROOT
from feature_store.errors import InputError
from feature_store.format.addressing import decode_keys
from feature_store.format.codecs.bound import require_calibrated
from feature_store.format.layout import StoreLayout
from feature_store.format.manifest import Manifest
from feature_store.read.blocks import read_blocks
from feature_store.read.key_index import KeyIndex
from feature_store.read.reader import ObjectReader, ZarrSource
from feature_store.views import ViewParams
from feature_store.write.create import skeleton
from feature_store.write.extend import grow
from feature_store.write.unit import EncodedUnit, write_unit

if TYPE_CHECKING:
    import torch

    from feature_store.teacher.split import LaterBlocks


def open_store(url: str | Path) -> "Store":
    """Open an existing store.

    Args:
        url: A path, ``file://``, ``s3://``, ``gs://`` or ``http(s)://``.

    Raises:
        InputError: Not a store, of another format version, or on a file system this build cannot reach.
        CorruptStoreError: The manifest or a commit record is damaged.
    """
    return open_store_in(open_objects(url))


def open_store_in(objects: ObjectStore) -> "Store":
    """Open the store whose objects these are; see open_store."""
    layout, committed, problems = load_store(objects)
    if problems:
        raise problems[0].error
    return Store(objects, layout, committed)


class Store:
    """An open store. Make one with open_store or Store.create.

    Attributes:
        objects: Where it is.
        layout: Its arrays, codecs and object addresses.
        manifest: Its manifest.
        committed: Which rows may be read.
    """

    def __init__(self, objects: ObjectStore, layout: StoreLayout, committed: CommitLog) -> None:
        self.objects, self.layout, self.committed = objects, layout, committed
        self.manifest = layout.manifest
        self._reader = ObjectReader(objects, layout.capacity)

    @classmethod
    def create(cls, path: str | Path, manifest: Manifest, blocks: Mapping[str, ArrayLike]) -> "Store":
        """Make an empty store: metadata, the later blocks and, last, the root with the manifest.

        Interrupted before that it is no store yet, and the same call completes it.

        Args:
            path: Directory or URL to make.
            manifest: Its manifest. A larger capacity or key width than its tars need leaves room to grow.
            blocks: The later blocks' tensors, see ``feature_store.teacher.bundle``.

        Raises:
            InputError: There is something else already, a tar does not fit the capacity, or a codec lacks its
                statistics.
        """
        manifest.require_room()
        require_calibrated(manifest)
        objects = open_objects(path)
        parts = skeleton(manifest, blocks)
        if isinstance(objects, LocalObjects) and objects.root.is_file():
            raise InputError(f"{path} already exists and is a file; choose another path or remove it")
        if any(found == ROOT or found not in parts for found in orphans.whole_objects(objects)):
            raise InputError(f"{path} already exists; open it, choose another path or remove it")
        for name, payload in parts.items():
            if name == ROOT:
                objects.sync([*parts])
            try:
                objects.put(name, payload, new=name == ROOT)
            except FileExistsError as error:
                raise InputError(
                    f"another process made {path} meanwhile; open it, or run the same command again to continue it"
                ) from error
        objects.sync([ROOT])
        layout = StoreLayout(manifest)
        return cls(objects, layout, CommitLog(layout))

    @property
    def path(self) -> Path:
        """Directory of a local store.

        Raises:
            InputError: It is somewhere else.
        """
        if not isinstance(self.objects, LocalObjects):
            raise InputError(f"{self.objects.url} is not a local directory; copy the store or mount it for this")
        return self.objects.root

    def source(self, taps: Sequence[str] | None = None) -> ZarrSource:
        """Features by row; taps None for all."""
        return ZarrSource(self.objects, self.layout, self.committed, taps)

    def later_blocks(self, device: "str | torch.device" = "cpu") -> "LaterBlocks":
        """The teacher's later blocks, built from the store alone.

        Raises:
            MismatchError: The stored blocks are not those the manifest names.
            CorruptStoreError: They are damaged or incomplete.
        """
        from feature_store.teacher.bundle import build_later_blocks

        return build_later_blocks(self.manifest, read_blocks(self.objects), device)

    def rows(self, keys: Sequence[str], view: int) -> np.ndarray:
        """Addresses of samples by key, in the order given: int64 [n, 3], unit, position and view of each.

        Raises:
            InputError: A key no committed unit holds.
        """
        return self._key_index.rows(keys, view)

    @cached_property
    def _key_index(self) -> KeyIndex:
        units = self.committed.units
        return KeyIndex(((unit, self._unit_values("key", unit)) for unit in units), self.manifest.key_width)

    def committed_views(self, unit: int) -> set[int]:
        """Committed views of a unit."""
        return self.committed.views(unit)

    def is_committed(self, unit: int, view: int) -> bool:
        """Whether a unit's view may be read."""
        return view in self.committed_views(unit)

    def keys(self, unit: int) -> list[str]:
        """Sample keys of a committed unit in tar order, quarantined ones included."""
        if unit not in self._keys:
            self._keys[unit] = decode_keys(self._unit_values("key", unit))
        return self._keys[unit]

    @cached_property
    def _keys(self) -> dict[int, list[str]]:
        return {}

    def labels(self, unit: int) -> np.ndarray:
        """Labels of a committed unit: int64 [n]; -1 where quarantined without one."""
        return self._unit_values("label", unit)

    def quarantined(self, unit: int) -> dict[int, str]:
        """Reason per position of a committed unit that is quarantined in any of its views, written together or not."""
        views = sorted(self.committed.views(unit), reverse=True) or [0]  # the record of none says so
        reasons = {at: why for view in views for at, why in self.committed.record(unit, view).quarantined.items()}
        return dict(sorted(reasons.items()))

    def view_params(self, unit: int, view: int) -> list[ViewParams | None]:
        """Stored parameters of a unit's views, for replay; None where quarantined."""
        values = {name: self._view_values(f"view/{name}", unit, view) for name in self._param_names}
        quarantined = self.committed.record(unit, view).quarantined
        samples = self.manifest.tars[unit].samples
        return [None if i in quarantined else self._params(values, i) for i in range(samples)]

    def _params(self, values: dict[str, np.ndarray], i: int) -> ViewParams:
        return ViewParams(
            crop=tuple(values["crop"][i].tolist()),
            flip=bool(values["flip"][i]),
            ops=tuple(values["ops"][i].tolist()) if "ops" in values else (),
            magnitudes=tuple(values["magnitude"][i].tolist()) if "magnitude" in values else (),
            erase=tuple(values["erase"][i].tolist()),
            noise_seed=int(values["noise_seed"][i]),
            interpolation=self.manifest.policy.interpolation,
        )

    @property
    def _param_names(self) -> list[str]:
        paths = [path.removeprefix("view/") for path in self.layout.arrays if path.startswith("view/")]
        return [name for name in paths if name != "pixel_crc"]

    def pixel_crcs(self, unit: int, view: int) -> np.ndarray:
        """CRC-32 of the view's pixels per sample: uint32 [n]; 0 where quarantined."""
        return self._view_values("view/pixel_crc", unit, view)

    def write_unit(self, unit: int, first_view: int, data: EncodedUnit) -> None:
        """Write and commit V views of a unit, see ``feature_store.write.unit``.

        Any number of processes may write at once. Of two that write the same, one does so whole.

        Raises:
            InputError: The data does not have the layout's shapes and dtypes.
            ResourceError: Another process is writing this unit now.
            CommittedError: Another one has committed such a view since; nothing was overwritten.
            MismatchError: The unit's keys or labels are not those committed with its other views.
        """
        self.manifest.require_unit(unit)
        views = range(first_view, first_view + len(data.params))
        name = self.manifest.tars[unit].name
        refusal = f"another process is writing unit {unit} ({name}) of {self.objects.url}; continue with another unit"
        with exclusive(self.objects, lock_name(unit), refusal):
            others = self._records_now(unit)
            for path in others:
                _, first, last = parse_record_path(path) or (unit, 0, -1)
                if first < views.stop and last >= views.start:
                    raise already_committed(unit, name, path)
            self._forget_index(unit, views)
            record = write_unit(self.objects, self.layout, unit, first_view, data, self._shared_proofs(others))
        self.committed.replace(record)
        self.__dict__.pop("_key_index", None)

    def _records_now(self, unit: int) -> list[str]:
        """Paths of a unit's records, also those committed since the store was opened."""
        found = self.objects.list(f"{FOLDER}u{unit:05d}-")
        return [path for path in found if parse_record_path(path) is not None]

    def _shared_proofs(self, records: Sequence[str]) -> dict[str, Any]:
        """Proofs of the unit's objects that belong to no view, from one of its records if it has any."""
        if not records:
            return {}
        record = decode_record(records[0], self.objects.get(records[0]).tobytes())
        paths = [spec.object_path(record.unit) for spec in self.layout.per_unit]
        return {path: record.proof(path) for path in paths}

    def _forget_index(self, unit: int, views: range) -> None:
        """A record of this name was removed after it was indexed: the index must not pass for the new one."""
        if self.committed.is_indexed(unit, views):
            with suppress(FileNotFoundError):  # another writer was first
                self.objects.delete(commit_index.PATH)

    def write_commit_index(self) -> int:
        """Write the commit index again, from the records themselves, so that opening stays fast; call it occasionally.

        Returns:
            How many records it covers.
        """
        committed, _ = load_commits(self.objects, self.layout)
        return commit_index.write_index(self.objects, self.layout, committed.records)

    def grow(self, manifest: Manifest) -> "Store":
        """Add the views and tars of a manifest that the store lacks; see ``Manifest.growth_from``.

        Stores that are open already, and their writers, keep their old manifest. Safe to interrupt and to repeat.

        Raises:
            MismatchError: More than views and tars differs, or a new tar does not fit.
            ResourceError: Another process is growing the store.
        """
        grow(self.objects, manifest)
        return open_store_in(self.objects)

    def remove_orphans(self) -> list[str]:
        """Delete orphan objects; units being written now are left alone. See orphans."""
        return orphans.remove(self.objects, self.layout)

    def withdraw_unit(self, unit: int) -> None:
        """Make a committed unit one that was never written; see orphans.withdraw. Open the store again after it.

        A store opened before finds the unit's objects missing; do not call it while the store is read.

        Raises:
            ResourceError: A process is writing the unit.
        """
        orphans.withdraw(self.objects, unit)

    def _first_record(self, unit: int) -> CommitRecord:
        return self.committed.record(unit, min(self.committed.views(unit), default=0))

    def _unit_values(self, name: str, unit: int) -> np.ndarray:
        record, spec = self._first_record(unit), self.layout.arrays[name]
        return self._reader.chunk(spec, record)[: record.samples]

    def _view_values(self, name: str, unit: int, view: int) -> np.ndarray:
        record = self.committed.record(unit, view)
        return self._reader.chunk(self.layout.arrays[name], record, view)[: record.samples]
