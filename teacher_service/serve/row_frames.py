"""Frames of cached rows, read into bounded memory.

A short frame is read whole. A long one is read while it is sent: its header needs the arrays' checksums, which are
combined from those the store has of each row.
"""

from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from itertools import groupby
from traceback import clear_frames

import numpy as np

from feature_store.client import frames
from feature_store.errors import CorruptStoreError, InputError, ResourceError
from feature_store.format.checksums import combined_crc32c, crc32c
from feature_store.format.codecs.bound import LOGITS
from feature_store.read.reader import ZarrSource
from teacher_service.serve.memory import Reservation
from teacher_service.serve.problems import Problem
from teacher_service.serve.responses import StreamedResponse, frame_response, read_ahead
from teacher_service.serve.service import Service, StoreSnapshot, whereabouts

ROWS = "rows"
"""Array of every frame of rows: unit, position and view of each, int64 [n, 3]."""


def rows_response(
    service: Service,
    opened: StoreSnapshot,
    rows: np.ndarray,
    taps: Sequence[str],
    *,
    decode: bool,
    verify: bool = False,
    headers: Mapping[str, str] | None = None,
) -> StreamedResponse:
    """Rows as a frame: an array [n, ...] per tap, ``logits`` and ``rows``; undecoded, the codec's arrays as stored.

    Args:
        service: Gives memory and limits.
        opened: The store.
        rows: int64 [n, 3].
        taps: Tap names.
        decode: Whether to send values.
        verify: Whether to read and check all rows before the status line. Otherwise a damaged row of a long frame is
            found while it is sent, and ends the connection.
        headers: More headers.

    Raises:
        Problem: One response may not hold so much, or a unit is beyond the store's last.
        BusyError: All responses together may not hold so much.
        UncommittedError, QuarantinedError, CorruptStoreError, ResourceError: See ZarrSource.read.
    """
    source = opened.source
    stored = len(rows) * source.row_bytes(taps)
    made = len(rows) * _decoded_row_bytes(source, taps) if decode else 0
    _require_allowed(service, len(rows), stored + made)
    service.metrics.rows.inc(len(rows))
    try:
        if verify or made or source.compressed(taps) or stored <= frames.CHUNK_BYTES:
            return frame_response(_read_whole(service, opened, rows, taps, decode, stored + made), headers)
        stream = _RowStream(service, opened, rows, taps)
    except InputError as error:
        raise Problem("uncommitted", str(error)) from error  # a unit beyond the store's last
    return StreamedResponse(stream.pieces(), stream.nbytes, headers=headers)


def require_rows(most: int, rows: int) -> None:
    """Refuse more rows than one response may hold, before they are looked up.

    Raises:
        Problem: too-large.
    """
    if rows > most:
        raise Problem("too-large", f"{rows:,} rows were asked for, at most {most:,} at once; ask for fewer")


class _RowStream:
    """The arrays of at least one row as stored, uncompressed; constructor arguments and errors as rows_response."""

    def __init__(self, service: Service, opened: StoreSnapshot, rows: np.ndarray, taps: Sequence[str]) -> None:
        self._memory, self._source, self._rows = service.memory, opened.source, np.ascontiguousarray(rows)
        located, empty = self._source.locate(rows, taps), self._source.buffers(0, taps)
        self._empty = {name: empty[name] for name in frames.wire_order(empty)}
        self._row_bytes = {name: array.itemsize * int(np.prod(array.shape[1:])) for name, array in self._empty.items()}
        self._located, self._cached = located, self._source.page_cache(located)
        described = {name: (array.dtype, (len(rows), *array.shape[1:])) for name, array in self._empty.items()}
        checksums = {name: combined_crc32c(some.checksums, self._row_bytes[name]) for name, some in located.items()}
        header = frames.header(
            {ROWS: (self._rows.dtype, self._rows.shape), **described},
            {ROWS: crc32c(self._rows), **checksums},
            _metadata(opened),
        )
        self._head = header + self._rows.tobytes()
        rows_bytes = len(rows) * sum(self._row_bytes.values())
        self.nbytes = len(self._head) + rows_bytes
        # Three pieces at a time: one is sent, one is read, one is released.
        self._reservation = service.memory.reserve(min(rows_bytes, 3 * self._source.stride_bytes))

    async def pieces(self) -> AsyncGenerator[memoryview]:
        """The frame's bytes in order.

        Raises:
            CorruptStoreError, ResourceError: See ZarrSource.read.
        """
        yield memoryview(self._head)
        # Rows in the page cache are read by this thread: pieces from another one have left this processor's caches.
        done = 0
        for name, runs in self._cached_runs():
            piece = self._take(name, runs)
            if piece is None:
                break
            yield piece
            done += len(piece) // self._row_bytes[name]
            del piece  # before the next one is read into memory, which should be this one's
        async with aclosing(read_ahead(partial(self._read, *span) for span in self._rest(done))) as pieces:
            async for piece in pieces:
                yield piece

    def _cached_runs(self) -> Iterator[tuple[str, list[int]]]:
        """Array and runs of each piece that the page cache may have."""
        for name, size in self._row_bytes.items():
            cached, step = self._cached[name], max(1, frames.CHUNK_BYTES // size)
            pieces = [cached.rows(run).start // step for run in range(len(cached))]
            for _, runs in groupby(range(len(cached)), pieces.__getitem__):
                yield name, list(runs)

    def _take(self, name: str, runs: Sequence[int]) -> memoryview | None:
        """Rows of some runs; None if the page cache lacks one."""
        cached, size = self._cached[name], self._row_bytes[name]
        first = cached.rows(runs[0]).start
        memory = memoryview(self._array(name, first, cached.rows(runs[-1]).stop))
        for run in runs:
            rows = cached.rows(run)
            part = memory[(rows.start - first) * size : (rows.stop - first) * size]
            if not (cached.take(run, part) or cached.take(run, part)):  # a locked page can look uncached
                return None
        return memory

    def _rest(self, done: int) -> Iterator[tuple[str, int, int]]:
        """Array, first row and end of pieces that keep the store busy, after the first ``done`` rows of all arrays."""
        for index, (name, size) in enumerate(self._row_bytes.items()):
            step = max(1, self._source.stride_bytes // size)
            for start in range(max(0, done - index * len(self._rows)), len(self._rows), step):
                yield name, start, min(start + step, len(self._rows))

    def _array(self, name: str, start: int, stop: int) -> np.ndarray:
        return self._memory.array((stop - start) * self._row_bytes[name], self._reservation)

    def _read(self, name: str, start: int, stop: int) -> memoryview:
        memory, empty = self._array(name, start, stop), self._empty[name]
        values = memory.view(empty.dtype).reshape(stop - start, *empty.shape[1:])
        try:
            part = {name: self._located[name].part(start, stop)}
            self._source.fill_located(self._rows[start:stop], part, {name: values})
        except CorruptStoreError as error:
            if away := whereabouts(self._source.objects):
                raise ResourceError(away) from error
            raise
        return memoryview(memory)


def _read_whole(
    service: Service, opened: StoreSnapshot, rows: np.ndarray, taps: Sequence[str], decode: bool, nbytes: int
) -> frames.Frame:
    source = opened.source
    reservation = service.memory.reserve(nbytes)
    memory = service.memory.array(len(rows) * source.row_bytes(taps), reservation)
    arrays = _arrays(memory, source.buffers(0, taps), len(rows))
    try:
        source.fill(rows, arrays)
        if decode:
            arrays = _decoded(source, rows, arrays, taps, reservation)
    except BaseException as error:
        # The traceback refers to the arrays, in a cycle that only the next garbage collection breaks.
        clear_frames(error.__traceback__)
        del arrays, memory
        reservation.release()
        raise
    return frames.encode({**arrays, ROWS: rows}, _metadata(opened))


def _metadata(opened: StoreSnapshot) -> dict[str, str]:
    return {"store": opened.store.manifest.identity()}


def _require_allowed(service: Service, rows: int, nbytes: int) -> None:
    limits = service.config.limits
    require_rows(limits.max_rows, rows)
    if nbytes > limits.max_response_bytes:
        most = rows * limits.max_response_bytes // nbytes
        raise Problem(
            "too-large",
            f"{rows:,} rows have {nbytes:,} bytes, at most {limits.max_response_bytes:,} at once; ask for {most:,}",
        )


def _arrays(memory: np.ndarray, empty: Mapping[str, np.ndarray], rows: int) -> dict[str, np.ndarray]:
    """The memory cut into arrays [rows, ...], each aligned."""
    found, start = {}, 0
    for name in frames.wire_order(empty):
        shape, dtype = (rows, *empty[name].shape[1:]), empty[name].dtype
        end = start + int(np.prod(shape)) * dtype.itemsize
        found[name] = memory[start:end].view(dtype).reshape(shape)
        start = end
    return found


def _decoded(
    source: ZarrSource,
    rows: np.ndarray,
    arrays: Mapping[str, np.ndarray],
    taps: Sequence[str],
    reservation: Reservation,
) -> dict[str, np.ndarray]:
    batch = source.batch(rows, arrays, taps)
    values = dict(batch.taps) if batch.logits is None else {**batch.taps, LOGITS: batch.logits}
    for value in values.values():
        reservation.bind(_owner(value))
    return {name: np.ascontiguousarray(value) for name, value in values.items()}


def _owner(array: np.ndarray) -> np.ndarray:
    """The array that lives as long as any view of it."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def _decoded_row_bytes(source: ZarrSource, taps: Sequence[str]) -> int:
    """Bytes of one row's decoded arrays: float32 of every output that is not stored as plain values."""
    wanted = {*taps, LOGITS}
    return sum(
        4 * int(np.prod(value.shape))
        for name, value in source.codecs.items()
        if name in wanted and not value.codec.plain
    )
