"""Rows that the machine has in memory already, read by the calling thread, in the order asked for.

For a server that sends what it reads: sorting a few rows and handing them to threads costs more than copying them.
"""

from typing import NamedTuple

import numpy as np

from feature_store.layout import CRC_BYTES, ArraySpec, crc32c
from feature_store.objects.local import ObjectStore, OpenFile
from feature_store.reading.row_tables import Located


class FileSpan(NamedTuple):
    """Bytes of an open file."""

    file: OpenFile
    offset: int
    nbytes: int


class CachedRows:
    """Some rows of one array.

    Args:
        objects: Where they are.
        spec: The array; its rows are not compressed.
        located: Where in their shards.
    """

    def __init__(self, objects: ObjectStore, spec: ArraySpec, located: Located) -> None:
        self._file, self._read_into, self._size = objects.file, objects.read_into, spec.row_bytes
        self._paths, self._offsets = located.paths, located.offsets.tolist()
        self._checksums = located.checksums.tolist()
        follows = np.diff(located.offsets, prepend=-1) == self._size + CRC_BYTES
        self._follows = follows.tolist()  # in the file; it may be another one

    def take(self, start: int, stop: int, memory: np.ndarray) -> bool:
        """Read some of them into memory, uint8 [stop - start, row bytes], C-contiguous.

        Returns:
            Whether they are there and sound; if not, the memory holds anything, and reading them the usual way tells
            what is wrong, or waits.
        """
        flat, size, begin = memoryview(memory).cast("B"), self._size, start
        rows = [flat[at : at + size] for at in range(0, len(flat), size)]
        try:
            while begin < stop:
                end = self._run_end(begin, stop)
                parts: list[memoryview | int] = []
                for row in rows[begin - start : end - start]:
                    parts += (row, CRC_BYTES)
                parts.pop()
                if not self._read_into(self._paths[begin], self._offsets[begin], parts, wait=False):
                    return False
                begin = end
        except (OSError, EOFError):
            return False
        return list(map(crc32c, rows)) == self._checksums[start:stop]

    def files(self, start: int, stop: int) -> list[FileSpan] | None:
        """Where some of them are; None unless they are in files and there. Their checksums are not looked at."""
        after, spans = memoryview(bytearray(CRC_BYTES)), []
        try:
            for path, offset in zip(self._paths[start:stop], self._offsets[start:stop], strict=True):
                file = self._file(path)
                # A row is read and written whole: where the checksum behind it is in memory, so is the row.
                if file is None or not self._read_into(path, offset + self._size, [after], wait=False):
                    return None
                spans.append(FileSpan(file, offset, self._size))
        except (OSError, EOFError):
            return None
        return spans

    def _run_end(self, begin: int, stop: int) -> int:
        """End of the rows from here on that lie side by side."""
        end = begin + 1
        while end < stop and self._follows[end] and self._paths[end] == self._paths[begin]:
            end += 1
        return end
