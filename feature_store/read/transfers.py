"""Reads of many rows: merged requests, several in flight."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise, repeat
from typing import Any, TypeAlias

import numpy as np

from feature_store.backends.base import ObjectStore
from feature_store.backends.local import IOV_MAX
from feature_store.format.arrays import ArraySpec, decode_row
from feature_store.format.checksums import crc32c, damaged
from feature_store.processes import PerProcess, usable_cpus
from feature_store.read.locate import RowLocations
from feature_store.read.objects import object_error
from feature_store.read.page_cache import RUN_BYTES, PageCacheReader

_ROWS_PER_REQUEST = IOV_MAX // 2  # each with the gap before it
_CORES = usable_cpus()
_ALONE_BYTES = 128 << 10  # run size with one thread; larger runs reduce lock contention with several
_COLD = 4  # After so many consecutive page-cache misses stop probing: each probe would trigger readahead out of order.
_Request: TypeAlias = "tuple[_Job, int, int]"
_Runs: TypeAlias = "PageCacheReader | _CompressedReadRequest"
# Of all sources in the process; threads start when they are needed.
_pool = PerProcess(partial(ThreadPoolExecutor, 64, "feature-store-read"))


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
    located: RowLocations
    out: np.ndarray


def read_all(objects: ObjectStore, transfers: Sequence[Transfer], threads: int) -> None:
    """Carry out transfers; the calling thread helps.

    Raises:
        CorruptStoreError: A shard or row is missing, cut, damaged or another one's.
        ResourceError: The disk or the network failed.
    """
    total = sum(int(transfer.located.lengths.sum()) for transfer in transfers)
    most = min(threads, 1 + total // objects.bytes_per_thread)
    # What is in memory is read by a thread per core, more would only wait for each other; the device gets all of them.
    few = min(most, _CORES)
    runs = [_runs_of(objects, transfer, few) for transfer in transfers]
    missed: list[tuple[_Runs, int]] = []
    # next() of these is atomic, for threads share them
    queue = chain.from_iterable([zip(repeat(some), range(len(some)), strict=False) for some in runs])
    _together(few, sum(map(len, runs)), _try, queue, missed)
    if missed:
        left = [
            one
            for transfer, some in zip(transfers, runs, strict=True)
            for one in _left(objects, transfer, some, missed)
        ]
        _together(most, len(left), _take, iter(left))


def _runs_of(objects: ObjectStore, transfer: Transfer, threads: int) -> _Runs:
    if transfer.spec.zstd:
        return _CompressedReadRequest(_Job(objects, transfer, np.arange(len(transfer.out))))
    most = RUN_BYTES if threads > 1 else _ALONE_BYTES
    return PageCacheReader(objects, transfer.spec, transfer.located, transfer.out, most)


def _try(queue: Iterator[tuple[_Runs, int]], missed: list[tuple[_Runs, int]]) -> None:
    in_a_row = 0
    for runs, at in queue:
        if in_a_row < _COLD and runs.take(at):
            in_a_row = 0
        else:
            missed.append((runs, at))
            in_a_row += 1


def _left(
    objects: ObjectStore, transfer: Transfer, runs: _Runs, missed: Sequence[tuple[_Runs, int]]
) -> Iterable[_Request]:
    """Requests for the rows of a transfer that were missed."""
    left = np.zeros(len(transfer.out), bool)
    for of, at in missed:
        if of is runs:
            left[runs.rows(at)] = True
    return _Job(objects, transfer, np.flatnonzero(left)).requests() if left.any() else ()


def _take(queue: Iterator[_Request]) -> None:
    for job, start, stop in queue:
        job.run(start, stop, wait=True)


def _together(threads: int, tasks: int, work: Callable[..., None], queue: Iterator, *more: Any) -> None:
    """Run tasks of a queue in several threads, the calling one included."""
    futures = [_pool().submit(work, queue, *more) for _ in range(min(threads, tasks) - 1)]
    try:
        work(queue, *more)
    finally:
        for _ in queue:  # after an error no further task starts
            pass
        _finish(futures)


def run_all(tasks: Sequence, threads: int) -> list:
    """Results of functions without arguments, several at a time."""
    if len(tasks) < 2 or threads < 2:
        return [task() for task in tasks]
    return list(_pool().map(lambda task: task(), tasks))


class _Job:
    """Rows of a transfer, by their numbers, in file order; a request is a range of them. Plain lists are fast."""

    def __init__(self, objects: ObjectStore, transfer: Transfer, rows: np.ndarray) -> None:
        paths, *columns = transfer.located
        self._objects, self._transfer, self._read_into = objects, transfer, objects.read_into
        self.order = rows[np.lexsort((transfer.located.offsets[rows], transfer.shards[rows]))]
        self._indices = self.order.tolist()
        self._paths = [paths[index] for index in self._indices]
        self._offsets, self._lengths, self._checksums = (column[self.order].tolist() for column in columns)
        self._size, self._out = transfer.spec.row_bytes, memoryview(transfer.out).cast("B")
        self._zstd = transfer.spec.zstd

    def requests(self) -> Iterator["_Request"]:
        """Ranges, cut where the next row is another shard's, too far away, or too much for one request."""
        offsets, shard = self._transfer.located.offsets[self.order], self._transfer.shards[self.order]
        end = offsets + self._transfer.located.lengths[self.order]
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

    def run(self, start: int, stop: int, *, wait: bool) -> bool:
        """Carry out one request; whether it is done, which it always is if it may wait."""
        if stop - start == 1:
            rows = parts = (self._memory(start),)
        else:
            rows = [self._memory(at) for at in range(start, stop)]
            parts = self._with_gaps(rows, start)
        try:
            if not self._read_into(self._paths[start], self._offsets[start], parts, wait=wait):
                return False
        except (OSError, EOFError) as error:
            raise object_error(self._paths[start], error) from error
        for at, row in enumerate(rows, start):
            if crc32c(row) != self._checksums[at]:
                self._objects.forget(self._paths[at])
                position = self._transfer.positions[self._indices[at]]
                raise damaged(self._paths[at], f"the crc32c of position {position} does not match")
            if self._zstd:
                out = self._transfer.out[self._indices[at]]
                decode_row(self._transfer.spec, np.frombuffer(row, np.uint8), out, self._paths[at])
        return True

    def _memory(self, at: int) -> memoryview:
        """Memory for a row's stored bytes: in the output, or scratch if they are compressed."""
        if self._zstd:
            return memoryview(bytearray(self._lengths[at]))
        first = self._indices[at] * self._size
        return self._out[first : first + self._size]

    def _with_gaps(self, rows: Sequence[memoryview], start: int) -> list[memoryview | int]:
        parts: list[memoryview | int] = []
        end = self._offsets[start]
        for at, row in enumerate(rows, start):
            if self._offsets[at] != end:
                parts.append(self._offsets[at] - end)
            parts.append(row)
            end = self._offsets[at] + self._lengths[at]
        return parts


class _CompressedReadRequest:
    """Compressed rows as runs, see PageCacheReader: the requests of a job, as far as they need no waiting."""

    def __init__(self, job: _Job) -> None:
        self._job, self._requests = job, list(job.requests())

    def __len__(self) -> int:
        return len(self._requests)

    def rows(self, at: int) -> np.ndarray:
        _, start, stop = self._requests[at]
        return self._job.order[start:stop]

    def take(self, at: int) -> bool:
        _, start, stop = self._requests[at]
        return self._job.run(start, stop, wait=False)


def _finish(futures: list[Future]) -> None:
    errors = [future.exception() for future in futures if not future.cancel()]
    for error in errors:
        if error is not None:
            raise error
