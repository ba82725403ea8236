"""Checks every byte that one unit's commit records cover."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from feature_store.commits.record import CommitRecord, ObjectChecksum
from feature_store.errors import CorruptStoreError, UserError
from feature_store.format.addressing import decode_keys, key_hash
from feature_store.format.arrays import (
    MISSING_CHUNK,
    ArraySpec,
    decode_chunk,
    decode_row,
    decode_shard_index,
    shard_index_bytes,
)
from feature_store.format.checksums import CRC_BYTES, crc32c, object_checksum
from feature_store.format.layout import ObjectAddress, StoreLayout


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        kind: ``missing``, ``damaged``, ``unreadable`` (a unit's objects), ``record``, ``newer`` (a record of a newer
            release), ``keys``, ``orphan``, ``growth``, ``metadata``, ``blocks`` or ``index``.
        path: Object it is about.
        message: The fault.
        unit: Unit it belongs to, if any.
        record: Path of the commit record that covers the object, if any.
    """

    kind: str
    path: str
    message: str
    unit: int | None = None
    record: str | None = None


@dataclass
class UnitCheck:
    """Result of checking a unit.

    Attributes:
        unit: The unit.
        keys: Its stored keys, uint8 [n, width]; none if they cannot be read or were not.
        objects: Objects compared with their proofs.
        bytes: Their bytes.
        findings: Faults.
    """

    unit: int
    keys: np.ndarray = field(default_factory=lambda: np.empty((0, 1), np.uint8))
    objects: int = 0
    bytes: int = 0
    findings: list[Finding] = field(default_factory=list)


class SupportsGet(Protocol):
    """Whole objects by path, see ObjectStore.get."""

    def get(self, path: str) -> np.ndarray: ...  # noqa: D102


class UnitChecks:
    """Checks the units of one store.

    Args:
        objects: The store's.
        layout: Its layout.
        sizes: Bytes of the store's objects: then only those are compared, and no contents.
    """

    def __init__(self, objects: SupportsGet, layout: StoreLayout, sizes: Mapping[str, int] | None = None) -> None:
        self.objects, self.layout, self.sizes = objects, layout, sizes

    def check(self, records: Sequence[CommitRecord]) -> UnitCheck:
        """Check a unit by all its commit records, at least one."""
        return _UnitChecker(self, records).run()


class _UnitChecker:
    def __init__(self, checks: UnitChecks, records: Sequence[CommitRecord]) -> None:
        self._objects, self._layout, self._sizes = checks.objects, checks.layout, checks.sizes
        self._capacity, self._records = checks.layout.capacity, records
        self._proofs: dict[str, ObjectChecksum] = {}
        self._check = UnitCheck(records[0].unit)

    def run(self) -> UnitCheck:
        for record in self._records:
            self._list(record)
            for path, proof in record.objects.items():
                if self._proofs.setdefault(path, proof) != proof:
                    self._add("record", path, "another record of the unit gives another length or checksum", record)
                elif self._sizes is None:
                    self._object(record, path, proof)
                else:
                    self._size(record, path, proof, self._sizes.get(path))
        if self._sizes is None:
            self._keys(self._records[0])
        self._check.objects = len(self._proofs)
        self._check.bytes = sum(proof.bytes for proof in self._proofs.values())
        return self._check

    def _add(self, kind: str, path: str, message: str, record: CommitRecord) -> None:
        self._check.findings.append(Finding(kind, path, message, record.unit, record.path))

    def _list(self, record: CommitRecord) -> None:
        expected = set(self._layout.object_paths(record.unit, record.views))
        for path in sorted(expected ^ record.objects.keys()):
            what = (
                "the record does not list it" if path in expected else "the record lists it, but it is no object of it"
            )
            self._add("record", path, what, record)

    def _size(self, record: CommitRecord, path: str, proof: ObjectChecksum, size: int | None) -> bool:
        if size is None:
            self._add("missing", path, "it is committed but missing", record)
        elif size != proof.bytes:
            self._add("damaged", path, f"it has {size} bytes, its commit record says {proof.bytes}", record)
        return size == proof.bytes

    def _object(self, record: CommitRecord, path: str, proof: ObjectChecksum) -> None:
        raw = self._get(record, path)
        if raw is None or not self._size(record, path, proof, len(raw)):
            return
        whole = len(raw) >= CRC_BYTES and object_checksum(raw) == proof.crc32c
        inside = self._inside(record, path, raw)
        if inside or not whole:
            outside = [] if whole else ["its crc32c is not the one in its commit record"]
            self._add("damaged", path, "; ".join([*outside, *inside]), record)

    def _get(self, record: CommitRecord, path: str) -> np.ndarray | None:
        try:
            return self._objects.get(path)
        except FileNotFoundError:
            self._size(record, path, record.objects[path], None)
        except (OSError, UserError) as error:
            self._add("unreadable", path, f"reading failed: {error}", record)
        return None

    def _inside(self, record: CommitRecord, path: str, raw: np.ndarray) -> list[str]:
        """Faults found by an object's own checksums."""
        address = self._layout.address(path)
        if address is None:
            return []
        spec = address.array
        try:
            if spec.sharded:
                return self._shard(address, record, path, raw)
            decode_chunk(spec, raw, self._capacity, path)
        except (CorruptStoreError, ValueError) as error:
            return [str(error)]
        return []

    def _shard(self, address: ObjectAddress, record: CommitRecord, path: str, raw: np.ndarray) -> list[str]:
        """Every row has its place, its bytes, its checksum in the shard, and the same one in the table beside it."""
        spec, tail = address.array, shard_index_bytes(self._capacity)
        index = decode_shard_index(raw[-tail:], self._capacity, path)
        found = np.flatnonzero(index[:, 0] != MISSING_CHUNK)
        expected = record.readable
        if not np.array_equal(found, expected):
            return [f"it holds rows {_some(found)}, expected {_some(expected)}"]
        starts, lengths = index[found].astype(np.int64).T
        order = np.argsort(starts)
        ends = np.append(0, (starts + lengths)[order])
        if not np.array_equal(np.append(starts[order], len(raw) - tail), ends):
            return ["its rows overlap or leave gaps"]
        table = self._table(address, path)
        wrong = [
            position
            for position, start, length in zip(found.tolist(), starts.tolist(), lengths.tolist(), strict=True)
            if not _row_is_whole(spec, raw[start : start + length], table, position, path)
        ]
        return [f"rows at positions {_some(wrong)} do not match their checksums"] if wrong else []

    def _table(self, address: ObjectAddress, path: str) -> np.ndarray | None:
        """The row checksums beside a shard; None if they are damaged, which is a finding of theirs."""
        beside = address.array.checksums
        try:
            raw = self._objects.get(beside.object_path(address.unit, address.view))
            return decode_chunk(beside, raw, self._capacity, path)
        except (OSError, UserError, ValueError):
            return None

    def _keys(self, record: CommitRecord) -> None:
        """The stored keys and their hashes; both were checked before, and a fault is among the findings."""
        raws = {name: self._objects_chunk(name, record) for name in ("key", "key_hash")}
        keys, hashes = raws["key"], raws["key_hash"]
        if keys is None or hashes is None:
            return
        self._check.keys = keys[: record.samples]
        path = self._layout.arrays["key"].object_path(record.unit)
        try:
            names = decode_keys(self._check.keys)
        except CorruptStoreError as error:
            self._add("keys", path, str(error), record)
            return
        wrong = [at for at, name in enumerate(names) if key_hash(name) != hashes[at]]
        if wrong:
            self._add("keys", path, f"key_hash of positions {_some(wrong)} is another key's", record)
        if keys[record.samples :].any():
            self._add("keys", path, "there are keys after the tar's last sample", record)

    def _objects_chunk(self, name: str, record: CommitRecord) -> np.ndarray | None:
        spec = self._layout.arrays[name]
        path = spec.object_path(record.unit)
        try:
            return decode_chunk(spec, self._objects.get(path), self._capacity, path)
        except (OSError, UserError, ValueError):
            return None


def _row_is_whole(spec: ArraySpec, chunk: np.ndarray, table: np.ndarray | None, position: int, path: str) -> bool:
    stored, checksum = chunk[:-CRC_BYTES], chunk[-CRC_BYTES:]
    crc = crc32c(stored)
    if len(checksum) < CRC_BYTES or crc != object_checksum(checksum) or (table is not None and crc != table[position]):
        return False
    if not spec.zstd:
        return len(stored) == spec.row_bytes
    try:
        decode_row(spec, stored, np.empty(spec.row_bytes, np.uint8), path)
    except CorruptStoreError:
        return False
    return True


def _some(positions: Sequence[int] | np.ndarray, most: int = 8) -> str:
    """A few numbers, and how many more there are."""
    listed = ", ".join(str(int(position)) for position in positions[:most])
    return f"{listed} and {len(positions) - most} more" if len(positions) > most else listed or "none"
