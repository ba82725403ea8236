"""ShardIndexCache: row locations, looked up in bulk."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from feature_store.format.arrays import ArraySpec
from feature_store.format.checksums import CRC_BYTES

NO_ROW = -1
_FIRST_SLOTS = 16


class RowLocations(NamedTuple):
    """Per row asked for: its shard's path, byte offset (NO_ROW if it has none), bytes without checksum, crc32c."""

    paths: list[str]
    offsets: np.ndarray
    lengths: np.ndarray
    checksums: np.ndarray

    def part(self, start: int, stop: int) -> "RowLocations":
        """Those of rows start..stop-1."""
        rows = slice(start, stop)
        return RowLocations(self.paths[rows], self.offsets[rows], self.lengths[rows], self.checksums[rows])


@dataclass(frozen=True)
class ShardTable:
    """One shard's rows: its path, offsets and lengths int64 [S], crc32c uint32 [S]."""

    path: str
    offsets: np.ndarray
    lengths: np.ndarray
    checksums: np.ndarray


class ShardIndexCache:
    """Tables of the most recently used shards of one array, side by side in a few large arrays.

    A shard is numbered ``unit * views + view``. Not safe in threads: the owner holds a lock.

    Args:
        spec: The array.
        shards: Number of shards it can have.
        capacity: Unit capacity S.
        budget: Bytes the tables may take; at least one shard's are kept.
    """

    def __init__(self, spec: ArraySpec, shards: int, capacity: int, budget: int) -> None:
        self._spec, self._capacity = spec, capacity
        self._most = max(1, budget // bytes_per_shard(spec, capacity))
        self._slot_of = np.full(shards, -1, np.int32)
        self._clock = 0
        self._resize(min(_FIRST_SLOTS, self._most))

    @property
    def nbytes(self) -> int:
        """Bytes the tables take now."""
        arrays = (self._offsets, self._lengths, self._checksums)
        return sum(array.nbytes for array in arrays if array is not None)

    def locate(
        self, shards: np.ndarray, positions: np.ndarray, load: Callable[[list[int]], list[ShardTable]]
    ) -> RowLocations:
        """Look rows up; tables not there are loaded.

        Args:
            shards: Shard number per row, int64 [n].
            positions: Position per row, int64 [n], each in 0..S-1.
            load: Gives the tables of some shards.
        """
        self._clock += 1
        slots = self._slot_of[shards]
        if slots.size and slots.min() >= 0:
            return self._gather(slots, positions)
        missing = np.unique(shards[slots < 0])
        if missing.size > self._most:  # more shards than fit the budget: several rounds
            return _joined([self.locate(some, at, load) for some, at in _halves(shards, positions)])
        self._last_used[slots[slots >= 0]] = self._clock
        self._load(missing, load)
        slots = self._slot_of[shards]
        if slots.size and slots.min() < 0:  # loading some pushed out others that are asked for as well
            return _joined([self.locate(some, at, load) for some, at in _halves(shards, positions)])
        return self._gather(slots, positions)

    def _gather(self, slots: np.ndarray, positions: np.ndarray) -> RowLocations:
        self._last_used[slots] = self._clock
        at = slots, positions
        lengths = np.full(len(slots), self._spec.row_bytes) if self._lengths is None else self._lengths[at]
        paths = [self._paths[slot] for slot in slots.tolist()]
        return RowLocations(paths, self._offsets[at], lengths, self._checksums[at])

    def _load(self, shards: np.ndarray, load: Callable[[list[int]], list[ShardTable]]) -> None:
        if not shards.size:
            return
        tables = load(shards.tolist())
        for shard, slot, table in zip(shards.tolist(), self._free_slots(len(shards)), tables, strict=True):
            self._offsets[slot], self._checksums[slot] = table.offsets, table.checksums
            if self._lengths is not None:
                self._lengths[slot] = table.lengths
            self._slot_of[shard], self._shard_in[slot], self._last_used[slot] = slot, shard, self._clock
            self._paths[slot] = table.path

    def _free_slots(self, count: int) -> list[int]:
        """Empty slots, then the longest unused ones."""
        if (self._shard_in < 0).sum() < count and len(self._shard_in) < self._most:
            self._resize(min(self._most, max(2 * len(self._shard_in), len(self._shard_in) + count)))
        slots = np.argsort(self._last_used, kind="stable")[:count]
        evicted = self._shard_in[slots]
        self._slot_of[evicted[evicted >= 0]] = -1
        return slots.tolist()

    def _resize(self, slots: int) -> None:
        old = len(self._shard_in) if hasattr(self, "_shard_in") else 0

        def grown(name: str, fill: int, dtype: type, *row: int) -> np.ndarray:
            array = np.full((slots, *row), fill, dtype)
            if old:
                array[:old] = getattr(self, name)
            return array

        self._offsets = grown("_offsets", NO_ROW, np.int64, self._capacity)
        self._lengths = grown("_lengths", 0, np.int32, self._capacity) if self._spec.zstd else None
        self._checksums = grown("_checksums", 0, np.uint32, self._capacity)
        self._last_used = grown("_last_used", 0, np.int64)
        self._shard_in = grown("_shard_in", -1, np.int64)
        self._paths = [*(self._paths if old else []), *([""] * (slots - old))]


def bytes_per_shard(spec: ArraySpec, capacity: int) -> int:
    """Memory of one shard's table."""
    return capacity * (8 + 4 + (4 if spec.zstd else 0))


def _halves(shards: np.ndarray, positions: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """The rows in two parts, in order; a single row always fits."""
    middle = len(shards) // 2
    return [(shards[:middle], positions[:middle]), (shards[middle:], positions[middle:])]


def _joined(parts: list[RowLocations]) -> RowLocations:
    paths = [path for part in parts for path in part.paths]
    return RowLocations(paths, *(np.concatenate([part[at] for part in parts]) for at in (1, 2, 3)))


def shard_table(
    spec: ArraySpec, path: str, nbytes: int, index: np.ndarray, checksums: np.ndarray, readable: np.ndarray
) -> ShardTable:
    """Table of one shard.

    Args:
        spec: The array.
        path: The shard's.
        nbytes: Its bytes before the index, which all rows lie in.
        index: The shard's index, uint64 [S, 2].
        checksums: Its rows' crc32c, uint32 [S].
        readable: Whether the commit record covers each position, bool [S]; the others get no row.
    """
    starts, lengths = index.T
    inside = (lengths <= nbytes) & (starts <= nbytes - np.minimum(lengths, nbytes))
    offsets, lengths = starts.astype(np.int64), lengths.astype(np.int64) - CRC_BYTES
    fits = lengths > 0 if spec.zstd else lengths == spec.row_bytes
    return ShardTable(path, np.where(readable & inside & fits, offsets, NO_ROW), lengths, checksums)
