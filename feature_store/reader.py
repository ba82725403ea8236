"""ZarrSource: rows straight from the shards, each one proven by a commit record and its own checksum."""

import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from feature_store.commits import CommitRecord, ObjectProof
from feature_store.errors import CorruptStoreError, InputError, QuarantinedError, UncommittedError
from feature_store.layout import (
    CRC_BYTES,
    MISSING_CHUNK,
    ArraySpec,
    array_specs,
    damaged,
    decode_chunk,
    decode_shard_index,
    row_is_whole,
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

    def proof(self, unit: int, view: int, path: str) -> ObjectProof:
        """Length and checksum of a committed object.

        Raises:
            UncommittedError: The unit's view is not committed.
            CorruptStoreError: The record does not know the object.
        """
        record = self.record(unit, view)
        if path not in record.objects:
            raise CorruptStoreError(damaged(path, f"commit record {record.path} does not list it"))
        return record.objects[path]

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


class ObjectReader:
    """Reads whole small objects and single rows of shards of a local store.

    Files are opened lazily and read with ``pread`` only, so that an instance survives a fork; a pickled one
    opens its own.
    """

    def __init__(self, root: Path, capacity: int) -> None:
        self._root, self._capacity = root, capacity
        self._shards: OrderedDict[str, tuple[int, np.ndarray]] = OrderedDict()

    def __getstate__(self) -> dict:
        return {"_root": self._root, "_capacity": self._capacity, "_shards": OrderedDict()}

    def __del__(self) -> None:
        for descriptor, _ in self._shards.values():
            os.close(descriptor)

    def chunk(self, spec: ArraySpec, path: str, proof: ObjectProof) -> np.ndarray:
        """All rows of an unsharded object: [S, *row_shape].

        Raises:
            CorruptStoreError: Missing, of another length or damaged.
        """
        descriptor = self._open(path, proof)
        try:
            raw = _pread(descriptor, path, proof.bytes, 0)
        finally:
            os.close(descriptor)
        return decode_chunk(spec, raw, path)

    def rows(
        self,
        spec: ArraySpec,
        path: str,
        proof: ObjectProof,
        positions: Sequence[int],
        out: Sequence[np.ndarray],
    ) -> None:
        """Read rows of one shard, each into its own array of the spec's shape and dtype.

        Raises:
            CorruptStoreError: The shard or a row in it is missing, cut or damaged.
        """
        descriptor, index = self._shard(path, proof)
        chunk = np.empty(spec.row_bytes + CRC_BYTES, np.uint8)
        for position, target in zip(positions, out, strict=True):
            offset, length = (int(value) for value in index[position])
            if offset == MISSING_CHUNK or length != chunk.size:
                raise CorruptStoreError(damaged(path, f"position {position} has no row"))
            _pread_into(descriptor, path, chunk, offset)
            if not row_is_whole(chunk):
                raise CorruptStoreError(damaged(path, f"the crc32c of position {position} does not match"))
            target.reshape(-1).view(np.uint8)[:] = chunk[:-CRC_BYTES]

    def _shard(self, path: str, proof: ObjectProof) -> tuple[int, np.ndarray]:
        if path in self._shards:
            self._shards.move_to_end(path)
            return self._shards[path]
        descriptor = self._open(path, proof)
        try:
            length = shard_index_bytes(self._capacity)
            index = decode_shard_index(_pread(descriptor, path, length, proof.bytes - length), path)
        except BaseException:
            os.close(descriptor)
            raise
        if len(self._shards) >= OPEN_SHARDS:
            os.close(self._shards.popitem(last=False)[1][0])
        self._shards[path] = descriptor, index
        return descriptor, index

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
        out = np.empty((len(rows), *spec.row_shape), spec.dtype)
        by_shard: dict[tuple[int, int], list[int]] = {}
        for index, row in enumerate(rows):
            by_shard.setdefault((row.unit, row.view), []).append(index)
        for (unit, view), indices in by_shard.items():
            path = spec.object_path(unit, view)
            proof = self._committed.proof(unit, view, path)
            positions = [rows[index].position for index in indices]
            self._reader.rows(spec, path, proof, positions, [out[index] for index in indices])
        return out

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
