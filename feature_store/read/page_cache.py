"""PageCacheReader: rows that are in the kernel's page cache.

At memcpy speed, Python call and lock overhead dominate, so adjacent rows are read and checked together. Rows that are
not cached, not open or damaged are left to the regular read, which waits for them or reports the fault.
"""

import os

import numpy as np

from feature_store.backends.base import ObjectStore
from feature_store.backends.local import IOV_MAX
from feature_store.format.arrays import ArraySpec
from feature_store.format.checksums import CRC_BYTES, combined_crc32c, crc32c
from feature_store.read.locate import RowLocations

RUN_BYTES = 512 << 10  # taken at once, and checked while they are in the processor's cache
_NOWAIT: int = getattr(os, "RWF_NOWAIT", 0)  # 0: not Linux
_between = memoryview(bytearray(CRC_BYTES))  # takes the checksum between two rows


class PageCacheReader:
    """Rows of one array as runs: side by side in a file and in the memory they go to, one read and one checksum each.

    What a read takes is made just before it: objects made earlier are no longer in the processor's cache.

    Args:
        objects: Where they are.
        spec: The array; its rows are not compressed.
        located: Where in their shards; at least one row.
        out: Where they go, uint8 [n, row bytes], C-contiguous; None if take is told.
        most: Bytes of a run; a row may have more.
    """

    def __init__(
        self,
        objects: ObjectStore,
        spec: ArraySpec,
        located: RowLocations,
        out: np.ndarray | None = None,
        most: int = RUN_BYTES,
    ) -> None:
        size, rows, offsets = spec.row_bytes, len(located.paths), located.offsets
        files = {path: objects.opened(path) if _NOWAIT else None for path in set(located.paths)}
        self._size, self._out = size, None if out is None else memoryview(out).cast("B")
        begins = _begins(located, size, min(most // (size + CRC_BYTES), IOV_MAX // 2))
        if len(begins) == rows:
            self._begins, self._ends = range(rows), range(1, rows + 1)
            self._checksums = located.checksums.tolist()
        else:
            self._begins, self._ends = begins.tolist(), [*begins[1:].tolist(), rows]
            runs = zip(self._begins, self._ends, strict=True)
            self._checksums = [combined_crc32c(located.checksums[first:end], size) for first, end in runs]
        self._files = [files[located.paths[first]] for first in self._begins]
        self._offsets = offsets[begins].tolist()

    def __len__(self) -> int:
        return len(self._offsets)

    def rows(self, at: int) -> slice:
        """Rows of a run."""
        return slice(self._begins[at], self._ends[at])

    def take(self, at: int, memory: memoryview | None = None) -> bool:
        """Read a run; whether it was in the page cache, undamaged. If not, the memory is undefined.

        Args:
            at: Number of the run.
            memory: Where its rows go; None for their place in ``out``.
        """
        first, last, file, size = self._begins[at], self._ends[at], self._files[at], self._size
        if memory is None:
            assert self._out is not None
            memory = self._out[first * size : last * size]
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


def _begins(located: RowLocations, size: int, most: int) -> np.ndarray:
    """First rows of runs: where one does not lie behind the one before, or the longest run ends."""
    at = np.arange(len(located.paths))
    follows = np.diff(located.offsets, prepend=-1) == size + CRC_BYTES
    for row in np.flatnonzero(follows):
        follows[row] = located.paths[row - 1] == located.paths[row]
    first = np.where(follows, 0, at)  # of the rows that follow each other
    return np.flatnonzero((at - np.maximum.accumulate(first)) % max(1, most) == 0)


def _with_checksums(memory: memoryview, size: int) -> list[memoryview]:
    """Memory of each row, and between two of what lies between them in a file."""
    rows = [memory[at : at + size] for at in range(0, len(memory), size)]
    parts = [_between] * (2 * len(rows) - 1)
    parts[::2] = rows
    return parts
