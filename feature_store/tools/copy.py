"""Copies a store to another place, unit by unit.

A unit's commit record is written after its objects were compared with it, so an interrupted copy is a store that lacks
units, never one with unproven rows; the same command continues it.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from feature_store.backends.base import ObjectStore
from feature_store.backends.open import open_objects
from feature_store.commits.locks import exclusive, lock_name
from feature_store.commits.record import CommitRecord, encode_record, write_commit
from feature_store.commits.root import ROOT
from feature_store.errors import CorruptStoreError, InputError, UserError
from feature_store.read.blocks import blocks_sha256, read_blocks
from feature_store.store import Store, open_store, open_store_in
from feature_store.tools.card import PAGE, README
from feature_store.tools.unit_check import UnitChecks

_KEPT_BYTES = 16 << 20  # of an object that is looked at twice: a checksum table


@dataclass(frozen=True)
class CopyReport:
    """Result of a copy.

    Attributes:
        source: Where the store was.
        target: Where the copy is.
        records: Commit records of the source.
        copied: Records this run copied; the others existed.
        bytes: Bytes this run copied.
    """

    source: str
    target: str
    records: int
    copied: int
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


def copy(
    source: str | Path,
    target: str | Path,
    *,
    workers: int = 8,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> CopyReport:
    """Copy every committed unit and the card; units that the target has are kept, a source that has grown is followed.

    Args:
        source: The store: a directory or URL, also ``http(s)://``.
        target: Directory or bucket for the copy; made if needed.
        workers: Units copied at once.
        progress: Called with records that are copied, and records in all.

    Raises:
        InputError: The target cannot be written to, or holds something else.
        MismatchError: The target holds another store; names the first field that differs.
        CorruptStoreError: The source is damaged; what is copied stays.
        ResourceError: A disk or network failed, or another process writes a unit of the target.
    """
    original = open_store(source)
    copied = _target(original, target)
    records = original.committed.records
    missing = [record for record in records if not _is_there(copied, record)]
    units = [list(some) for _, some in groupby(missing, key=lambda record: record.unit)]
    size, done = 0, len(records) - len(missing)
    with ThreadPoolExecutor(max(1, workers), "copy") as pool:
        futures = [pool.submit(_copy_unit, original, copied, some) for some in units]
        try:
            for future, some in zip(futures, units, strict=True):
                size, done = size + future.result(), done + len(some)
                progress(done, len(records))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    for name in (README, PAGE):
        with suppress(FileNotFoundError):  # a store need not have a card
            copied.objects.put(name, original.objects.get(name))
    copied.write_commit_index()
    return CopyReport(str(source), str(target), len(records), len(missing), size)


def _target(original: Store, target: str | Path) -> Store:
    """The copy as it is, or an empty one."""
    objects = open_objects(target)
    if not objects.lists:
        raise InputError(f"{target} is read only; copy to a directory, s3:// or gs://")
    if objects.url == original.objects.url:
        raise InputError(f"{target} is the store itself; name another place")
    with suppress(FileNotFoundError):
        objects.size(ROOT)
        there = open_store_in(objects)
        growth = original.manifest.growth_from(there.manifest)
        return there.grow(growth.manifest) if growth else there
    blocks = read_blocks(original.objects)
    if blocks_sha256(blocks) != original.manifest.blocks_sha256:
        where = original.objects.url
        raise CorruptStoreError(f"the later blocks in {where} are not those its manifest names; restore them")
    return Store.create(target, original.manifest, blocks)


def _is_there(copied: Store, record: CommitRecord) -> bool:
    """Whether the copy has a record's views.

    Raises:
        InputError: By another record than the source's.
    """
    views = copied.committed.views(record.unit)
    if views.isdisjoint(record.views):
        return False
    theirs = copied.committed.record(record.unit, record.first_view)
    if encode_record(theirs) != encode_record(record):
        raise InputError(
            f"unit {record.unit} in {copied.objects.url} was written by another job, not copied; copy to another place"
        )
    return True


def _copy_unit(original: Store, copied: Store, records: Sequence[CommitRecord]) -> int:
    """Copy and compare a unit's objects, then write its records; gives their bytes."""
    unit, size = records[0].unit, 0
    refusal = f"another process is writing unit {unit} of {copied.objects.url}; start again when it is done"
    with exclusive(copied.objects, lock_name(unit), refusal):
        for record in records:
            objects = _Copying(original.objects, copied.objects)
            findings = UnitChecks(objects, original.layout).check([record]).findings
            if objects.failure is not None:  # of a disk or network: it says nothing about the source's bytes
                raise objects.failure
            if findings:
                raise CorruptStoreError(
                    f"{len(findings)} objects of unit {unit} in {original.objects.url} are damaged, the first, "
                    f"{findings[0].path}: {findings[0].message}; `feature-store verify` lists them"
                )
            copied.objects.sync([*record.objects])
            write_commit(copied.objects, record)
            size += objects.bytes
    return size


class _Copying:
    """Objects that are copied when they are read."""

    def __init__(self, source: ObjectStore, target: ObjectStore) -> None:
        self._source, self._target = source, target
        self._seen: dict[str, np.ndarray | None] = {}
        self.bytes = 0
        self.failure: OSError | UserError | None = None

    def get(self, path: str) -> np.ndarray:
        """A whole object, uint8."""
        if (kept := self._seen.get(path)) is not None:
            return kept
        try:
            raw = self._source.get(path)
            if path not in self._seen:
                self._target.put(path, raw)
        except FileNotFoundError:
            raise
        except (OSError, UserError) as error:
            self.failure = error
            raise
        if path not in self._seen:
            self.bytes += raw.nbytes
            self._seen[path] = raw if raw.nbytes <= _KEPT_BYTES else None
        return raw
