"""Materialised views: read as a cache job wrote them."""

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np

from feature_store.backends.bucket import RemoteObjects
from feature_store.backends.local import LocalObjects
from feature_store.backends.open import open_objects
from feature_store.errors import InputError, MismatchError
from feature_store.format.addressing import RowId
from feature_store.inputs.base import Sample, SampleSource
from feature_store.inputs.copies import copy_object, copy_once
from feature_store.inputs.labels import TarLabels
from feature_store.inputs.tar import Tar
from feature_store.store import Store
from feature_store.views import decode_view, view_tar
from student_trainer.data.replayed import StoredViews

_SHOWN = 5  # names listed in an error message
_OPTIONAL = TarLabels.of("optional", None, ())  # labels are compared with the store's, which may have none


@dataclass(frozen=True)
class StoredUnit:
    """A unit as its store describes it, where a run does not need the source.

    Attributes:
        name: The source's name.
        url: Where its views are.
        header_sha256: The source's.
        keys: Its sample keys by position.
        readable: Those of them that are not quarantined.
    """

    name: str
    url: str
    header_sha256: str
    keys: tuple[str, ...]
    readable: frozenset[str]

    def __len__(self) -> int:
        return len(self.keys)


UnitSource: TypeAlias = SampleSource | StoredUnit


def stored_units(store: Store, url: str) -> list[StoredUnit]:
    """The store's units in order, for views at a folder or URL."""
    units = []
    for unit, info in enumerate(store.manifest.tars):
        keys, quarantined = tuple(store.keys(unit)), store.quarantined(unit)
        readable = frozenset(key for position, key in enumerate(keys) if position not in quarantined)
        units.append(StoredUnit(info.name, url, info.header_sha256, keys, readable))
    return units


def require_view_tars(store: Store, url: str, num_views: int) -> None:
    """Refuse a store without materialised views, and a place that lacks some of views 0..num_views-1.

    Raises:
        InputError: The store's views are not materialised, or tars are missing; a web server cannot list them and is
            found out when one is asked for.
    """
    if store.manifest.view_encoding is None:
        raise InputError(
            f"the store's views are not materialised (its view_encoding is None), so {url} cannot hold them; "
            "give the source --tars, or write a store with `teacher-service cache --views-out`"
        )
    objects = open_objects(url)
    if not objects.lists:
        return
    wanted = {view_tar(unit, view) for unit in range(len(store.manifest.tars)) for view in range(num_views)}
    missing = sorted(wanted - set(objects.list("v")))
    if missing:
        raise InputError(
            f"--views-from {url} lacks {len(missing)} of the store's {len(wanted)} view tars: "
            f"{', '.join(missing[:_SHOWN])}...; give the place --views-out wrote to"
        )


class MaterialisedViews:
    """Reads each view as it was written; the source images are not needed, and no view is drawn or replayed.

    Args:
        stored: The store's views; what is read is checked against them.
        url: Folder or URL of the view tars.
        scratch: Where tars of other machines are copied to, and stay; None for the system's temporary folder.
        units_in_memory: Tars kept open; should cover the units that are shuffled together.
    """

    skips_unreadable = False

    def __init__(
        self, stored: StoredViews, url: str, scratch: Path | None = None, *, units_in_memory: int = 16
    ) -> None:
        self.size = stored.size
        self._stored, self._scratch, self._limit = stored, scratch, units_in_memory
        self._objects = open_objects(url)
        self._tars: OrderedDict[tuple[int, int], _ViewTar] = OrderedDict()

    def read(self, tar: StoredUnit, row: RowId) -> Sample:
        """The view as a sample: its JPEG, the label beside it.

        Raises:
            InputError: Its tar is not there.
            MismatchError: Its tar holds other samples than the store.
        """
        opened = self._tar(tar, row)
        return opened.tar.read(opened.positions[tar.keys[row.position]])

    def pixels(self, row: RowId, sample: Sample) -> np.ndarray:
        """The view's pixels: what the teacher saw."""
        return decode_view(sample.image)

    def check(self, row: RowId, sample: Sample, pixels: np.ndarray) -> None:
        """See StoredViews.check."""
        self._stored.check(row, sample, pixels)

    def _tar(self, tar: StoredUnit, row: RowId) -> "_ViewTar":
        at = row.unit, row.view
        if at not in self._tars:
            self._tars[at] = self._open(tar, row)
        self._tars.move_to_end(at)
        if len(self._tars) > self._limit:
            self._tars.popitem(last=False)
        return self._tars[at]

    def _open(self, unit: StoredUnit, row: RowId) -> "_ViewTar":
        path = view_tar(row.unit, row.view)
        tar = Tar.open(str(self._local(path)), labels=_OPTIONAL)
        _require_samples(unit, tar, f"{self._objects.url}/{path}")
        return _ViewTar(tar, {key: position for position, key in enumerate(tar.keys)})

    def _local(self, path: str) -> Path:
        """The tar's file on this machine."""
        if isinstance(self._objects, LocalObjects):
            return self._objects.root / path
        url = f"{self._objects.url}/{path}"
        objects = self._objects
        assert isinstance(objects, RemoteObjects)
        try:
            version = objects.version(path)
            return copy_once(url, version, self._scratch, lambda file: copy_object(objects, path, version, file))
        except FileNotFoundError as error:
            raise InputError(f"view tar {url} is not there; give the place --views-out wrote to") from error


class _ViewTar(NamedTuple):
    tar: Tar
    positions: dict[str, int]  # by sample key; quarantined samples have none


def _require_samples(unit: StoredUnit, tar: Tar, url: str) -> None:
    """Refuse a tar that lacks views of the unit, or has another unit's.

    Raises:
        MismatchError: Names a key.
    """
    remedy = "it was not written with this store, or changed since: give the place --views-out wrote to"
    lacking, foreign = unit.readable.difference(tar.keys), set(tar.keys).difference(unit.keys)
    if lacking:
        raise MismatchError(
            f"samples of {url}", expected=f"sample {min(lacking)!r}", got="none of that key", remedy=remedy
        )
    if foreign:
        raise MismatchError(
            f"samples of {url}", expected="those of the store", got=f"sample {min(foreign)!r}", remedy=remedy
        )
