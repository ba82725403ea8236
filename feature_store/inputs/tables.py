"""Tables of images in parquet or Arrow files, read by row group."""

import os
import threading
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from feature_store.errors import InputError, ResourceError

INSTALL = "pip install 'scalekd-cache[parquet]'"


class TableFile(NamedTuple):
    """A file as it was when it was listed.

    Attributes:
        path: Where it is.
        stem: Name without extension, in the samples' keys.
        size: Its bytes.
        mtime_ns: Its modification time.
    """

    path: str
    stem: str
    size: int
    mtime_ns: int


class ParquetTable:
    """A parquet file, opened; one thread reads it at a time, because two at once crash the process."""

    def __init__(self, path: str) -> None:
        import pyarrow.parquet as pq

        self._lock = threading.Lock()
        self._file = pq.ParquetFile(path, memory_map=False)
        self.schema, self.rows = self._file.schema_arrow, self._file.metadata.num_rows

    def groups(self, column: str) -> Iterator[tuple[int, int]]:
        """Rows and uncompressed bytes of each row group's column."""
        for number in range(self._file.num_row_groups):
            group = self._file.metadata.row_group(number)
            chunks = (group.column(at) for at in range(group.num_columns))
            size = sum(
                chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] == column
            )
            yield group.num_rows, size

    def column(self, name: str) -> list[Any]:
        """All values of a column."""
        with self._lock:
            return self._file.read(columns=[name], use_threads=False).column(name).to_pylist()

    def images(self, number: int, column: str) -> Any:
        """Values of a row group's column."""
        with self._lock:
            return self._file.read_row_group(number, columns=[column], use_threads=False).column(column)


class ArrowTable:
    """An Arrow file of the datasets library, mapped into memory: its record batches are its row groups."""

    def __init__(self, path: str) -> None:
        import pyarrow as pa

        source = pa.memory_map(path)
        try:
            reader = pa.ipc.open_stream(source)
            self.schema, self._batches = reader.schema, list(reader)
        except pa.ArrowInvalid:
            opened = pa.ipc.open_file(source)
            self.schema = opened.schema
            self._batches = [opened.get_batch(at) for at in range(opened.num_record_batches)]
        self.rows = sum(batch.num_rows for batch in self._batches)

    def groups(self, column: str) -> Iterator[tuple[int, int]]:
        """See ParquetTable; a mapped batch takes no memory."""
        return ((batch.num_rows, batch.column(column).nbytes) for batch in self._batches)

    def column(self, name: str) -> list[Any]:
        """See ParquetTable."""
        return [value for batch in self._batches for value in batch.column(name).to_pylist()]

    def images(self, number: int, column: str) -> Any:
        """See ParquetTable."""
        return self._batches[number].column(column)


def open_table(file: TableFile) -> ParquetTable | ArrowTable:
    """A table, opened unless it is one of those opened last.

    Raises:
        InputError: pyarrow is missing, it changed since it was listed, or it is no such file.
        ResourceError: It cannot be read.
    """
    try:
        status = os.stat(file.path)  # noqa: PTH116 - once per row group
    except OSError as error:
        raise ResourceError(f"{file.path} cannot be read: {error}; check permissions and disk") from error
    if (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns):
        raise InputError(f"{file.path} changed since it was listed; restore it and start again")
    return _opened(file)


@lru_cache(maxsize=32)
def _opened(file: TableFile) -> ParquetTable | ArrowTable:
    try:
        import pyarrow as pa
    except ImportError as error:
        raise InputError(f"parquet files need pyarrow, which is not installed; {INSTALL}") from error
    try:
        return (ArrowTable if file.path.endswith(".arrow") else ParquetTable)(file.path)
    except pa.ArrowInvalid as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{file.path} is no parquet or Arrow file: {reason:.200}; fetch or make it again") from error
    except OSError as error:
        raise ResourceError(f"{file.path} cannot be read: {error}; check permissions and disk") from error


@lru_cache(maxsize=2)
def column_images(file: TableFile, number: int, column: str) -> Any:
    """Values of a row group; the last ones stay in memory, because positions are read in order."""
    import pyarrow as pa

    try:
        return open_table(file).images(number, column)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ResourceError(
            f"row group {number} of {file.path} cannot be read: {reason:.200}; fetch it again"
        ) from error
