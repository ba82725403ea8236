"""Finds the source of each unit by its header hash."""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

from feature_store.errors import InputError, MismatchError, Remedy
from feature_store.format.manifest import InputInfo
from feature_store.inputs.base import SampleSource
from feature_store.inputs.open import open_sources
from feature_store.inputs.options import TarOptions
from feature_store.inputs.tar import Tar, expand_tars, opened_tars
from feature_store.inputs.urls import tar_name

if TYPE_CHECKING:
    from feature_store.store import Store

_Source = TypeVar("_Source", bound=SampleSource)
_MOST_OPEN = 8
_SHOWN = 3  # names listed in an error message


def find_tar(store: "Store", unit: int, tars: Iterable[_Source]) -> _Source:
    """The tar of a unit, found by its header hash; its name may differ from the store's, and several may have one name.

    Raises:
        InputError: None of them has the hash.
        MismatchError: One has the name of the unit's tar and other headers.
    """
    info, others = store.manifest.tars[unit], list[_Source]()
    for tar in tars:
        if tar.header_sha256 == info.header_sha256:
            return unit_tar(store, unit, tar)
        others.append(tar)
    known = {each.header_sha256 for each in store.manifest.tars}
    for tar in others:
        if tar.name == info.name and tar.header_sha256 not in known:
            return unit_tar(store, unit, tar)  # which says what differs
    given = ", ".join(tar.name for tar in others[:_SHOWN]) + (", ..." if len(others) > _SHOWN else "")
    raise InputError(f"tar {info.name} is not among those given ({given or 'none'})", remedy=Remedy.ADD_TARS)


def unit_tar(store: "Store", unit: int, tar: _Source) -> _Source:
    """The tar with its samples at the unit's positions.

    Raises:
        MismatchError: It is not the one the unit was written from.
    """
    info = store.manifest.tars[unit]
    if tar.header_sha256 != info.header_sha256:
        field = "samples" if len(tar) != info.samples else "header_sha256"
        got = len(tar) if field == "samples" else tar.header_sha256
        raise tar_changed(tar, field, getattr(info, field), got)
    keys = store.keys(unit)
    if isinstance(tar, Tar) and len(keys) != len(tar):
        return cast(_Source, tar.arranged(keys))  # earlier versions gave hidden files places
    return tar


def tar_changed(tar: SampleSource, field: str, expected: object, got: object) -> MismatchError:
    """Error for a tar that changed since the store was written."""
    remedy = (
        f"{tar.url} changed since the store was written: restore it, give the tars or folder that the store was "
        "written from, or write a new store"
    )
    return MismatchError(f"tars[{tar.name}].{field}", expected=expected, got=got, remedy=remedy)


class UnitTars:
    """Tars of a store's units, opened on demand; thread-safe.

    Args:
        urls: Available tars, from expand_tars.
        scratch: See Tar.open.
    """

    def __init__(self, urls: Sequence[str], scratch: Path | None = None) -> None:
        self._urls, self._scratch = list(urls), scratch
        self._hashes: dict[str, str] = {}
        self._open: OrderedDict[str, Tar] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._urls)

    def find(self, store: "Store", unit: int) -> Tar:
        """The unit's tar; see find_tar."""
        with self._lock:
            return find_tar(store, unit, self._candidates(store, unit))

    def _candidates(self, store: "Store", unit: int) -> Iterator[Tar]:
        """Tars that may be the unit's, those of its name first; each is indexed at most once."""
        info = store.manifest.tars[unit]
        known = [url for url, header in self._hashes.items() if header == info.header_sha256]
        yield from map(self._opened, known or [url for url in self._urls if tar_name(url) == info.name])
        for tar in opened_tars([url for url in self._urls if url not in self._hashes], self._scratch):
            yield self._kept(tar)

    def _opened(self, url: str) -> Tar:
        return self._kept(self._open.pop(url, None) or Tar.open(url, scratch=self._scratch))

    def _kept(self, tar: Tar) -> Tar:
        self._hashes[tar.url], self._open[tar.url] = tar.header_sha256, tar
        while len(self._open) > _MOST_OPEN:
            self._open.popitem(last=False)
        return tar


class UnitSources:
    """Sources of a store's units, all open."""

    def __init__(self, sources: Sequence[SampleSource]) -> None:
        self._sources = {source.header_sha256: source for source in sources}

    def find(self, store: "Store", unit: int) -> SampleSource:
        """The unit's source; see find_tar."""
        source = self._sources.get(store.manifest.tars[unit].header_sha256)
        return find_tar(store, unit, self._sources.values() if source is None else [source])

    def __len__(self) -> int:
        return len(self._sources)


def open_units(patterns: Sequence[str], options: TarOptions, inputs: InputInfo | None) -> UnitTars | UnitSources:
    """Finder of each unit's source in a store.

    Args:
        patterns: The store's tars, folder or parquet files.
        options: Options for opening them.
        inputs: The store's ``Manifest.inputs``.

    Raises:
        InputError: They cannot be used.
        ResourceError: They cannot be read.
    """
    if inputs is None:
        return UnitTars(expand_tars(patterns, allow_pipe=options.allow_pipe), options.scratch)
    return UnitSources(open_sources(patterns, options, written=inputs).sources)
