"""PageCacheReader: rows that are in the kernel's page cache.

At memcpy speed, Python call and lock overhead dominate, so adjacent rows are read and checked together. Rows that are
not cached, not open or damaged are left to the regular read, which waits for them or reports the fault.
"""

import os
from collections.abc import Sequence

import numpy as np

from feature_store.backends.base import ObjectStore, SupportsDescriptor
from feature_store.backends.local import IOV_MAX
from feature_store.format.arrays import ArraySpec
from feature_store.format.checksums import CRC_BYTES, combined_crc32c, crc32c
from feature_store.read.locate import RowLocations

RUN_BYTES = 512 << 10  # taken at once, and checked while they are in the processor's cache
_NOWAIT: int = getattr(os, "RWF_NOWAIT", 0)  # 0: not Linux
_between = memoryview(bytearray(CRC_BYTES))  # takes the checksum between two rows


class ReadRequest:
    """Rows of one array as runs: side by side in a file and in the memory they go to, one read and one checksum each.

    What a read takes is made just before it: objects made earlier are no longer in the processor's cache.

    Args:
        size: Bytes of a row.
        memory: Where they go, uint8 [n, size], C-contiguous.
        begins: First row of each run, counted in memory.
        ends: The one after its last.
        files: The file of each; None if it is not open.
        offsets: Of each in its file.
        checksums: crc32c each must have.
    """

    def __init__(
        self,
        size: int,
        memory: np.ndarray,
        begins: Sequence[int],
        ends: Sequence[int],
        files: Sequence[SupportsDescriptor | None],
        offsets: Sequence[int],
        checksums: Sequence[int],
    ) -> None:
        self._size, self._memory = size, memoryview(memory).cast("B")
        self._begins, self._ends = begins, ends
        self._files, self._offsets, self._checksums = files, offsets, checksums

    def __len__(self) -> int:
        return len(self._offsets)

    def rows(self, at: int) -> slice:
        """Rows of a run."""
        return slice(self._begins[at], self._ends[at])

    def take(self, at: int) -> bool:
        """Read a run into its memory; whether it was in the page cache, undamaged. If not, the memory is undefined."""
        first, last, file, size = self._begins[at], self._ends[at], self._files[at], self._size
        memory = self._memory[first * size : last * size]
        rows = last - first
        parts = (memory,) if rows == 1 else _with_checksums(memory, size)
        try:
            return (
                file is not None
                and os.preadv(file.descriptor, parts, self._offsets[at], _NOWAIT)
                == rows * (size + CRC_BYTES) - CRC_BYTES
                and crc32c(memory) == self._checksums[at]
            )
        except OSError:  # not there; or a file system that cannot tell
            return False


def _with_checksums(memory: memoryview, size: int) -> list[memoryview]:
    """Memory of each row, and between two of what lies between them in a file."""
    rows = [memory[at : at + size] for at in range(0, len(memory), size)]
    parts = [_between] * (2 * len(rows) - 1)
    parts[::2] = rows
    return parts


class PageCacheReader:
    """Some rows of one array.

    Args:
        objects: Where they are.
        spec: The array; its rows are not compressed.
        located: Where in their shards.
    """

    def __init__(self, objects: ObjectStore, spec: ArraySpec, located: RowLocations) -> None:
        files = {path: objects.opened(path) if _NOWAIT else None for path in set(located.paths)}
        self._files = [files[path] for path in located.paths]
        self._offsets, self._checksums = located.offsets, located.checksums
        self._size = spec.row_bytes
        # Whether a row lies behind the one before.
        self._follows = np.diff(located.offsets, prepend=-1) == self._size + CRC_BYTES
        for at in np.flatnonzero(self._follows):
            self._follows[at] = located.paths[at - 1] == located.paths[at]

    def runs(self, start: int, stop: int, memory: np.ndarray, most: int = RUN_BYTES) -> ReadRequest:
        """Some rows, all of them.

        Args:
            start: The first.
            stop: The one after the last; there is at least one.
            memory: Where they go, uint8 [stop - start, row bytes], C-contiguous.
            most: Bytes of a run; a row may have more.
        """
        files, offsets, checksums = self._files[start:stop], self._offsets[start:stop], self._checksums[start:stop]
        begins = self._begins(start, stop, min(most // (self._size + CRC_BYTES), IOV_MAX // 2))
        if len(begins) == stop - start:
            alone = range(stop - start), range(1, stop - start + 1)
            return ReadRequest(self._size, memory, *alone, files, offsets.tolist(), checksums.tolist())
        ends, firsts = np.append(begins[1:], stop - start), begins.tolist()
        joined = [combined_crc32c(checksums[a:b], self._size) for a, b in zip(firsts, ends.tolist(), strict=True)]
        files = [files[first] for first in firsts]
        return ReadRequest(self._size, memory, firsts, ends.tolist(), files, offsets[begins].tolist(), joined)

    def take(self, start: int, stop: int, memory: np.ndarray) -> bool:
        """Read rows into memory, see runs; whether all were in the page cache, undamaged. If not, it is undefined."""
        runs = self.runs(start, stop, memory)
        return all(map(runs.take, range(len(runs))))

    def _begins(self, start: int, stop: int, most: int) -> np.ndarray:
        """First rows of runs, counted from start: at each gap, and after each maximum length."""
        at = np.arange(stop - start)
        first = np.where(self._follows[start:stop], 0, at)  # of the rows that follow each other
        return np.flatnonzero((at - np.maximum.accumulate(first)) % max(1, most) == 0)
