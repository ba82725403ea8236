"""ZarrSource: rows straight from the shards, each one proven by a commit record and its own checksum."""

import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from feature_store.commits import CommitRecord, ObjectProof
from feature_store.errors import CorruptStoreError, InputError, QuarantinedError, UncommittedError
from feature_store.layout import (
    CRC_BYTES,
    MISSING_CHUNK,
    ArraySpec,
    array_specs,
    crc32c,
    damaged,
    decode_chunk,
    decode_shard_index,
    shard_index_bytes,
)
from feature_store.manifest import Manifest
from feature_store.sample import RowId
from feature_store.source import FeatureBatch

OPEN_SHARDS = 256


class CommittedRows:
    """Which rows may be read, from the commit records."""

    def __init__(self, manifest: Manifest, records: Iterable[CommitRecord]) -> None:
        self._manifest = manifest
        self._by_unit: dict[int, dict[int, CommitRecord]] = {}
        for record in records:
            self.add(record)

    def add(self, record: CommitRecord) -> None:
        """Let a new record vouch for its rows."""
        self._by_unit.setdefault(record.unit, {}).update(dict.fromkeys(record.views, record))

    @property
    def records(self) -> list[CommitRecord]:
        """All records, by unit and first view."""
        found = {record.path: record for views in self._by_unit.values() for record in views.values()}
        return sorted(found.values(), key=lambda record: (record.unit, record.first_view))

    @property
    def units(self) -> list[int]:
        """Units with at least one committed view, ascending."""
        return sorted(self._by_unit)

    def views(self, unit: int) -> set[int]:
        """Committed views of a unit."""
        return set(self._by_unit.get(unit, ()))

    def record(self, unit: int, view: int) -> CommitRecord:
        """The record that vouches for a unit's view.

        Raises:
            InputError: No such unit.
            UncommittedError: None does.
        """
        self._manifest.require_unit(unit)
        record = self._by_unit.get(unit, {}).get(view)
        if record is None:
            raise UncommittedError(
                f"view {view} of unit {unit} ({self._manifest.tars[unit].name}) was never committed; "
                f"committed views of this unit: {sorted(self.views(unit)) or 'none'}; "
                "finish the store with the same `teacher-service cache` command"
            )
        return record

    def require(self, row: RowId) -> None:
        """Refuse a row that holds no features.

        Raises:
            UncommittedError: No commit record vouches for it.
            QuarantinedError: Its sample was quarantined.
        """
        record = self.record(row.unit, row.view)
        if not 0 <= row.position < record.samples:
            raise UncommittedError(f"{row} does not exist: unit {row.unit} has {record.samples} samples ({record.tar})")
        if row.position in record.quarantined:
            raise QuarantinedError(
                f"{row} has no features: its sample was quarantined ({record.quarantined[row.position]}); "
                "leave it out, or mend the tar and write a new store"
            )


@dataclass(frozen=True)
class _Shard:
    descriptor: int
    index: np.ndarray
    checksums: np.ndarray


class ObjectReader:
    """Reads whole small objects and single rows of shards of a local store.

    Files are opened lazily and read with ``pread`` only, so that an instance survives a fork; a pickled one
    opens its own.
    """

    def __init__(self, root: Path, capacity: int) -> None:
        self._root, self._capacity = root, capacity
        self._shards: OrderedDict[str, _Shard] = OrderedDict()

    def __getstate__(self) -> dict:
        return {"_root": self._root, "_capacity": self._capacity, "_shards": OrderedDict()}

    def __del__(self) -> None:
        for shard in self._shards.values():
            os.close(shard.descriptor)

    def chunk(self, spec: ArraySpec, record: CommitRecord, view: int | None = None) -> np.ndarray:
        """All rows of a unit in an unsharded array: [S, *row_shape].

        Raises:
            CorruptStoreError: Missing, of another length or damaged.
        """
        path = spec.object_path(record.unit, view)
        proof = record.proof(path)
        descriptor = self._open(path, proof)
        try:
            raw = _pread(descriptor, path, proof.bytes, 0)
        finally:
            os.close(descriptor)
        if crc32c(raw) != proof.crc32c:
            raise CorruptStoreError(damaged(path, f"its crc32c is not the one in {record.path}"))
        return decode_chunk(spec, raw, path)

    def rows(
        self, spec: ArraySpec, record: CommitRecord, view: int, positions: Sequence[int], out: Sequence[np.ndarray]
    ) -> None:
        """Read rows of one shard, each into its own uint8 [row_bytes].

        Every row is compared with the checksum that its commit record vouches for, so that neither a flipped
        bit nor a shard that belongs elsewhere goes unnoticed.

        Raises:
            CorruptStoreError: The shard or a row in it is missing, cut, damaged or another one's.
        """
        path = spec.object_path(record.unit, view)
        shard = self._shard(spec, record, view, path)
        for position, row in zip(positions, out, strict=True):
            offset, length = (int(value) for value in shard.index[position])
            if offset == MISSING_CHUNK or length != spec.row_bytes + CRC_BYTES:
                raise CorruptStoreError(damaged(path, f"position {position} has no row"))
            _pread_into(shard.descriptor, path, row, offset)
            if crc32c(row) != shard.checksums[position]:
                raise CorruptStoreError(damaged(path, f"the crc32c of position {position} does not match"))

    def _shard(self, spec: ArraySpec, record: CommitRecord, view: int, path: str) -> _Shard:
        if path in self._shards:
            self._shards.move_to_end(path)
            return self._shards[path]
        checksums = self.chunk(spec.checksums, record, view)
        proof, length = record.proof(path), shard_index_bytes(self._capacity)
        descriptor = self._open(path, proof)
        try:
            index = decode_shard_index(_pread(descriptor, path, length, proof.bytes - length), path)
        except BaseException:
            os.close(descriptor)
            raise
        if len(self._shards) >= OPEN_SHARDS:
            os.close(self._shards.popitem(last=False)[1].descriptor)
        self._shards[path] = _Shard(descriptor, index, checksums)
        return self._shards[path]

    def _open(self, path: str, proof: ObjectProof) -> int:
        try:
            descriptor = os.open(self._root / path, os.O_RDONLY)
        except FileNotFoundError as error:
            raise CorruptStoreError(damaged(path, "it is committed but missing")) from error
        size = os.fstat(descriptor).st_size
        if size != proof.bytes:
            os.close(descriptor)
            raise CorruptStoreError(damaged(path, f"it has {size} bytes, its commit record says {proof.bytes}"))
        return descriptor


class ZarrSource:
    """FeatureSource over a store's committed rows."""

    needs_pixels = False

    def __init__(
        self, root: Path, manifest: Manifest, committed: CommittedRows, taps: Sequence[str] | None = None
    ) -> None:
        self._committed = committed
        self._specs = array_specs(manifest)
        self._reader = ObjectReader(root, manifest.capacity)
        self.tap_names = self._known(manifest.taps if taps is None else taps)

    def read(
        self, rows: Sequence[RowId], taps: Sequence[str] | None = None, *, pixels: np.ndarray | None = None
    ) -> FeatureBatch:
        """See FeatureSource.read; pixels are not looked at."""
        for row in rows:
            self._committed.require(row)
        names = self.tap_names if taps is None else self._known(taps)
        logits = self._read_array("logits", rows) if "logits" in self._specs else None
        return FeatureBatch(tuple(rows), {name: self._read_array(f"taps/{name}", rows) for name in names}, logits)

    def iter_unit(
        self, unit: int, view: int, taps: Sequence[str] | None = None, *, batch_size: int = 256
    ) -> Iterator[FeatureBatch]:
        """See FeatureSource.iter_unit."""
        record = self._committed.record(unit, view)
        rows = [RowId(unit, position, view) for position in range(record.samples) if position not in record.quarantined]
        for start in range(0, len(rows), batch_size):
            yield self.read(rows[start : start + batch_size], taps)

    def _read_array(self, name: str, rows: Sequence[RowId]) -> np.ndarray:
        spec = self._specs[name]
        out = np.empty((len(rows), spec.row_bytes), np.uint8)
        by_shard: dict[tuple[int, int], list[int]] = {}
        for index, row in enumerate(rows):
            by_shard.setdefault((row.unit, row.view), []).append(index)
        for (unit, view), indices in by_shard.items():
            record = self._committed.record(unit, view)
            positions = [rows[index].position for index in indices]
            self._reader.rows(spec, record, view, positions, [out[index] for index in indices])
        return out.view(spec.dtype).reshape(len(rows), *spec.row_shape)

    def _known(self, taps: Iterable[str]) -> tuple[str, ...]:
        for name in taps:
            if f"taps/{name}" not in self._specs:
                stored = ", ".join(path.removeprefix("taps/") for path in self._specs if path.startswith("taps/"))
                raise InputError(f"the store has no tap {name!r}; it has: {stored}; cache it with --taps")
        return tuple(taps)


def _pread(descriptor: int, path: str, length: int, offset: int) -> np.ndarray:
    raw = np.empty(length, np.uint8)
    _pread_into(descriptor, path, raw, offset)
    return raw


def _pread_into(descriptor: int, path: str, target: np.ndarray, offset: int) -> None:
    view, done = memoryview(target), 0
    while done < len(view):
        got = os.preadv(descriptor, [view[done:]], offset + done)
        if got == 0:
            raise CorruptStoreError(damaged(path, f"it ends at byte {offset + done}"))
        done += got
