"""Rows that the machine has in memory already, taken by the calling thread, in the order asked for.

Taking them is copying, next to which every call of Python and every turn of its lock shows: rows side by side are one
read and one checksum. What is not there, not open or not sound is left to reading it the usual way, which waits for it
or tells what is wrong.
"""

import os
from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import NamedTuple

import numpy as np

from feature_store.layout import CRC_BYTES, ArraySpec, crc32c, joined_crc32cs
from feature_store.objects.local import IOV_MAX, ObjectStore, OpenFile
from feature_store.reading.row_tables import Located

RUN_BYTES = 512 << 10  # taken at once, and checked while they are in the processor's cache
_NOWAIT: int = getattr(os, "RWF_NOWAIT", 0)  # 0: not Linux
_between = memoryview(bytearray(CRC_BYTES))  # takes the checksum between two rows


class Run(NamedTuple):
    """Rows side by side in a file and in the memory they go to.

    Attributes:
        file: Where they are; None if it is not open.
        offset: Of the first.
        parts: Memory of each row, and between two of the checksum.
        nbytes: Of the parts.
        memory: Of the rows, as one.
        checksum: crc32c it must have.
    """

    file: OpenFile | None
    offset: int
    parts: Sequence[memoryview]
    nbytes: int
    memory: memoryview
    checksum: int


class FileSpan(NamedTuple):
    """Bytes of an open file."""

    file: OpenFile
    offset: int
    nbytes: int


def take(run: Run) -> bool:
    """Read rows into their memory; whether they were there and sound. If not, it holds anything."""
    file, offset, parts, nbytes, memory, checksum = run
    try:
        return (
            file is not None
            and os.preadv(file.descriptor, parts, offset, _NOWAIT) == nbytes
            and crc32c(memory) == checksum
        )
    except OSError:  # not there; or a file system that cannot tell
        return False


class CachedRows:
    """Some rows of one array.

    Args:
        objects: Where they are.
        spec: The array; its rows are not compressed.
        located: Where in their shards.
    """

    def __init__(self, objects: ObjectStore, spec: ArraySpec, located: Located) -> None:
        files = {path: objects.opened(path) if _NOWAIT else None for path in set(located.paths)}
        self._files = [files[path] for path in located.paths]
        self._offsets, self._checksums = located.offsets, located.checksums
        self._size = spec.row_bytes
        # Whether a row lies behind the one before.
        self._follows = np.diff(located.offsets, prepend=-1) == self._size + CRC_BYTES
        for at in np.flatnonzero(self._follows):
            self._follows[at] = located.paths[at - 1] == located.paths[at]

    def runs(self, start: int, stop: int, memory: np.ndarray, most: int = RUN_BYTES) -> Iterable[tuple[slice, Run]]:
        """Some rows, all of them; of each run, which ones of these.

        Args:
            start: The first.
            stop: The one after the last; there is at least one.
            memory: Where they go, uint8 [stop - start, row bytes], C-contiguous.
            most: Bytes of a run; a row may have more.
        """
        flat, size, offsets = memoryview(memory).cast("B"), self._size, self._offsets[start:stop].tolist()
        rows = [flat[at : at + size] for at in range(0, len(flat), size)]
        files, checksums = self._files[start:stop], self._checksums[start:stop]
        begins = self._begins(start, stop, min(most // (size + CRC_BYTES), IOV_MAX // 2))
        if len(begins) == len(rows):
            runs = zip(files, offsets, zip(rows), repeat(size), rows, checksums.tolist())
            return list(zip(map(slice, range(len(rows)), range(1, len(rows) + 1)), map(Run._make, runs), strict=True))
        parts = [_between] * (2 * len(rows))
        parts[::2] = rows
        ends = np.append(begins[1:], len(rows))
        joined = joined_crc32cs(checksums, begins, ends, size)
        return [
            (
                slice(a, b),
                Run(
                    files[a],
                    offsets[a],
                    parts[2 * a : 2 * b - 1],
                    (b - a) * (size + CRC_BYTES) - CRC_BYTES,
                    flat[a * size : b * size],
                    checksum,
                ),
            )
            for a, b, checksum in zip(begins.tolist(), ends.tolist(), joined, strict=True)
        ]

    def take(self, start: int, stop: int, memory: np.ndarray) -> bool:
        """Read some rows into memory, see runs; whether they were there and sound. If not, it holds anything."""
        return all(take(run) for _, run in self.runs(start, stop, memory))

    def files(self, start: int, stop: int) -> list[FileSpan] | None:
        """Where some of them are; None unless all are there. Their checksums are not looked at."""
        spans = []
        try:
            for file, offset in zip(self._files[start:stop], self._offsets[start:stop].tolist(), strict=True):
                # A row is read and written whole: where the checksum behind it is in memory, so is the row.
                behind = offset + self._size
                if file is None or os.preadv(file.descriptor, (_between,), behind, _NOWAIT) != CRC_BYTES:
                    return None
                spans.append(FileSpan(file, offset, self._size))
        except OSError:
            return None
        return spans

    def _begins(self, start: int, stop: int, most: int) -> np.ndarray:
        """First rows of runs, counted from start: where one does not follow, or so many did."""
        at = np.arange(stop - start)
        first = np.where(self._follows[start:stop], 0, at)  # of the rows that follow each other
        return np.flatnonzero((at - np.maximum.accumulate(first)) % max(1, most) == 0)
