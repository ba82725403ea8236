"""Reads many rows at once: neighbours in one request, several requests in flight, every row against its checksum."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from feature_store.chunks import object_error
from feature_store.errors import CorruptStoreError
from feature_store.layout import ArraySpec, crc32c, damaged, decode_row
from feature_store.objects import IOV_MAX, ObjectStore
from feature_store.processes import PerProcess
from feature_store.row_tables import Located

_ROWS_PER_REQUEST = IOV_MAX // 2  # each with the gap before it
_pools: PerProcess[dict[int, ThreadPoolExecutor]] = PerProcess(dict)


@dataclass(frozen=True)
class Transfer:
    """Rows of one array on their way into memory.

    Attributes:
        spec: The array.
        shards: Number of the shard each row is in, int64 [n].
        positions: Position of each row in its unit, int64 [n].
        located: Where in the shard.
        out: uint8 [n, row_bytes], C-contiguous.
    """

    spec: ArraySpec
    shards: np.ndarray
    positions: np.ndarray
    located: Located
    out: np.ndarray


def read_all(objects: ObjectStore, transfers: Sequence[Transfer], threads: int) -> None:
    """Carry out transfers; the calling thread helps.

    Raises:
        CorruptStoreError: A shard or row is missing, cut, damaged or another one's.
        ResourceError: The disk or the network gave up.
    """
    requests = [request for transfer in transfers for request in _Job(objects, transfer).requests()]
    total = sum(int(transfer.located.lengths.sum()) for transfer in transfers)
    helpers = min(threads, len(requests), 1 + total // objects.bytes_per_thread) - 1
    queue = iter(requests)  # shared: next() of a list iterator is atomic
    if helpers < 1:
        return _work(queue)
    futures = [_pool(threads).submit(_work, queue) for _ in range(helpers)]
    try:
        _work(queue)
    finally:
        for _ in queue:  # after an error: nobody starts another request
            pass
        _finish(futures)
    return None


def run_all(tasks: Sequence, threads: int) -> list:
    """Results of functions without arguments, several at a time."""
    if len(tasks) < 2 or threads < 2:
        return [task() for task in tasks]
    return list(_pool(threads).map(lambda task: task(), tasks))


class _Job:
    """One transfer in file order; a request is a range of its rows. Plain lists: this is the hot path."""

    def __init__(self, objects: ObjectStore, transfer: Transfer) -> None:
        paths, *columns = transfer.located
        self._objects, self._transfer = objects, transfer
        self._order = np.lexsort((transfer.located.offsets, transfer.shards))
        self._indices = self._order.tolist()
        self._paths = [paths[index] for index in self._indices]
        self._offsets, self._lengths, self._checksums = (column[self._order].tolist() for column in columns)
        self._size, self._out = transfer.spec.row_bytes, memoryview(transfer.out).cast("B")
        self._zstd = transfer.spec.zstd

    def requests(self) -> Iterator[tuple["_Job", int, int]]:
        """Ranges, cut where the next row is another shard's, too far away, or too much for one request."""
        offsets, shard = self._transfer.located.offsets[self._order], self._transfer.shards[self._order]
        end = offsets + self._transfer.located.lengths[self._order]
        gap = offsets[1:] - end[:-1]  # negative: the same row twice
        new = np.flatnonzero((shard[1:] != shard[:-1]) | (gap < 0) | (gap > self._objects.gap_bytes)) + 1
        first = np.zeros(len(shard), np.int64)
        first[new] = new
        first = np.maximum.accumulate(first)  # first row of the run each row is in
        piece = np.maximum(
            (end - offsets[first]) // self._objects.request_bytes, (np.arange(len(shard)) - first) // _ROWS_PER_REQUEST
        )
        cuts = np.flatnonzero((first[1:] != first[:-1]) | (piece[1:] != piece[:-1])) + 1
        for start, stop in pairwise([0, *cuts.tolist(), len(shard)]):
            yield self, start, stop

    def run(self, start: int, stop: int) -> None:
        """Carry out one request."""
        path, rows = self._paths[start], self._memory(start, stop)
        self._read(path, self._offsets[start], rows if stop - start == 1 else self._with_gaps(rows, start))
        for at, row in enumerate(rows, start):
            if crc32c(row) != self._checksums[at]:
                self._read_again(path, at, row)
        if self._zstd:
            for at, row in enumerate(rows, start):
                out = self._transfer.out[self._indices[at]]
                decode_row(self._transfer.spec, np.frombuffer(row, np.uint8), out, path)

    def _memory(self, start: int, stop: int) -> list[memoryview]:
        """Where rows' stored bytes go: their place in the output, or scratch if they are compressed."""
        if self._zstd:
            return [memoryview(bytearray(length)) for length in self._lengths[start:stop]]
        size, out = self._size, self._out
        return [out[index * size : index * size + size] for index in self._indices[start:stop]]

    def _with_gaps(self, rows: list[memoryview], start: int) -> list[memoryview | int]:
        parts: list[memoryview | int] = []
        end = self._offsets[start]
        for at, row in enumerate(rows, start):
            if self._offsets[at] != end:
                parts.append(self._offsets[at] - end)
            parts.append(row)
            end = self._offsets[at] + self._lengths[at]
        return parts

    def _read(self, path: str, offset: int, parts: Sequence[memoryview | int]) -> None:
        try:
            self._objects.read_into(path, offset, parts)
        except (OSError, EOFError) as error:
            raise object_error(path, error) from error

    def _read_again(self, path: str, at: int, row: memoryview) -> None:
        """A damaged copy in a cache is not a damaged object."""
        if self._objects.forget(path):
            self._read(path, self._offsets[at], [row])
        if crc32c(row) != self._checksums[at]:
            position = self._transfer.positions[self._indices[at]]
            raise CorruptStoreError(damaged(path, f"the crc32c of position {position} does not match"))


def _work(queue: Iterator[tuple[_Job, int, int]]) -> None:
    for job, start, stop in queue:
        job.run(start, stop)


def _finish(futures: list[Future]) -> None:
    errors = [future.exception() for future in futures if not future.cancel()]
    for error in errors:
        if error is not None:
            raise error


def _pool(threads: int) -> ThreadPoolExecutor:
    pools = _pools()
    if threads not in pools:
        pools[threads] = ThreadPoolExecutor(threads, thread_name_prefix="feature-store-read")
    return pools[threads]
