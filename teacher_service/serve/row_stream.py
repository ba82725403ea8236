"""A long frame of rows, read while it is sent: its checksums are made from those the store has of each row."""

from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from functools import partial

import numpy as np

from feature_store.client import frames
from feature_store.errors import CorruptStoreError, ResourceError
from feature_store.format.checksums import combined_crc32c, crc32c
from teacher_service.serve.service import Service, StoreSnapshot, whereabouts
from teacher_service.serve.streaming import Piece, read_ahead

ROWS = "rows"
"""Array of every answer with rows: unit, position and view of each, int64 [B, 3]."""

_TRIES = 2  # a locked page can look uncached


def metadata_of(opened: StoreSnapshot) -> dict[str, str]:
    """The strings of every frame of rows."""
    return {"store": opened.store.manifest.identity()}


class RowStream:
    """The arrays of some rows as stored, as one frame.

    Args:
        service: Gives the memory.
        opened: The store; what is asked for is not compressed in it.
        rows: At least one, int64 [n, 3].
        taps: Taps, beside the logits.
        check: Whether rows are compared with their checksums before they are sent; False only for a server that sends
            files and a client that compares the frame's.

    Raises:
        BusyError: There is no memory for it now.
        UncommittedError, QuarantinedError, CorruptStoreError, ResourceError, InputError: See ZarrSource.locate.
    """

    def __init__(
        self, service: Service, opened: StoreSnapshot, rows: np.ndarray, taps: Sequence[str], *, check: bool = True
    ) -> None:
        self._memory, self._source, self._rows, self._check = service.memory, opened.source, rows, check
        located, empty = self._source.locate(rows, taps), self._source.buffers(0, taps)
        self._cached = self._source.page_cache(located)
        self._empty = {name: empty[name] for name in frames.wire_order(empty)}
        self._row_bytes = {name: array.itemsize * int(np.prod(array.shape[1:])) for name, array in self._empty.items()}
        listed = np.ascontiguousarray(rows)
        described = {name: (array.dtype, (len(rows), *array.shape[1:])) for name, array in self._empty.items()}
        checksums = {name: combined_crc32c(some.checksums, self._row_bytes[name]) for name, some in located.items()}
        header = frames.header(
            {ROWS: (listed.dtype, listed.shape), **described},
            {ROWS: crc32c(listed), **checksums},
            metadata_of(opened),
        )
        self._head = header + listed.tobytes()
        rows_bytes = len(rows) * sum(self._row_bytes.values())
        self.nbytes = len(self._head) + rows_bytes
        # Of pieces that are sent, read, and let go of.
        self._reservation = service.memory.reserve(min(rows_bytes, 3 * self._source.stride_bytes))

    async def pieces(self) -> AsyncGenerator[Piece]:
        """The frame's bytes in order.

        Raises:
            CorruptStoreError, ResourceError: See ZarrSource.read.
        """
        yield memoryview(self._head)
        done = 0
        # What the machine has in memory is sent by this thread; read before, while it is in the processor's cache.
        for span in self._spans(frames.CHUNK_BYTES if self._check else self._source.stride_bytes):
            piece = next(filter(None, (self._in_memory(*span) for _ in range(_TRIES))), None)
            if piece is None:
                break
            yield piece
            done += span[2] - span[1]
        rest = self._spans(self._source.stride_bytes, done)
        async with aclosing(read_ahead(partial(self._read, *span) for span in rest)) as pieces:
            async for piece in pieces:
                yield piece

    def _spans(self, nbytes: int, done: int = 0) -> Iterator[tuple[str, int, int]]:
        """Array, first row and end of pieces of about nbytes, without the first rows of all arrays that are done."""
        for index, (name, size) in enumerate(self._row_bytes.items()):
            step = max(1, nbytes // size)
            for start in range(max(0, done - index * len(self._rows)), len(self._rows), step):
                yield name, start, min(start + step, len(self._rows))

    def _in_memory(self, name: str, start: int, stop: int) -> Piece | None:
        """Rows that the machine has in memory; None if it has not all of them."""
        cached = self._cached[name]
        if not self._check:
            return cached.files(start, stop)
        memory = self._array(name, start, stop)
        return memoryview(memory) if cached.take(start, stop, memory) else None

    def _array(self, name: str, start: int, stop: int) -> np.ndarray:
        return self._memory.array((stop - start) * self._row_bytes[name], self._reservation)

    def _read(self, name: str, start: int, stop: int) -> memoryview:
        memory, empty = self._array(name, start, stop), self._empty[name]
        values = memory.view(empty.dtype).reshape(stop - start, *empty.shape[1:])
        try:
            self._source.fill(self._rows[start:stop], {name: values})
        except CorruptStoreError as error:
            if away := whereabouts(self._source.objects):
                raise ResourceError(away) from error
            raise
        return memoryview(memory)
