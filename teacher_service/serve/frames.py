"""Answers that are frames: rows read into bounded memory, and sent from there without a copy."""

from collections.abc import Mapping, Sequence
from functools import partial
from traceback import clear_frames

import numpy as np
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from feature_store.client import frames
from feature_store.errors import InputError
from feature_store.format.codecs.bound import LOGITS
from feature_store.read.reader import ZarrSource
from teacher_service.serve.memory import Reservation
from teacher_service.serve.problems import Problem
from teacher_service.serve.row_stream import ROWS, RowStream, metadata_of
from teacher_service.serve.service import Service, StoreSnapshot
from teacher_service.serve.streaming import StreamedResponse


class FrameResponse(Response):
    """A frame with its Content-Length, handed to the socket a piece at a time."""

    media_type = frames.MEDIA_TYPE

    def __init__(self, frame: frames.Frame, headers: Mapping[str, str] | None = None) -> None:
        self._frame = frame
        super().__init__(None, 200, {"content-length": str(frame.nbytes), **(headers or {})})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it; the socket's pace is ours."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for chunk in self._frame.chunks():
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def rows_response(
    service: Service,
    opened: StoreSnapshot,
    rows: np.ndarray,
    taps: Sequence[str],
    decode: bool,
    headers: Mapping[str, str] | None = None,
    *,
    check: bool = True,
) -> Response:
    """Rows [n, 3] as a frame: arrays by tap, ``logits``, and ``rows``; undecoded, the codec's arrays as stored.

    A long one is read while it is sent: its checksums are made from those the store has of each row. See RowStream for
    ``check``.

    Raises:
        Problem: More than one answer may hold.
        BusyError: More than all answers together may hold.
        UncommittedError, QuarantinedError, CorruptStoreError, ResourceError: See ZarrSource.read.
    """
    source, shards = opened.source, set(map(tuple, np.unique(rows[:, ::2], axis=0).tolist()))
    stored = len(rows) * source.row_bytes(taps)
    made = len(rows) * _decoded_row_bytes(source, taps) if decode else 0
    _require_allowed(service, len(rows), stored + made)
    service.metrics.rows.inc(len(rows))
    try:
        if made or source.compressed(taps) or stored <= frames.CHUNK_BYTES or not service.cut_short.isdisjoint(shards):
            frame = _read(service, opened, rows, taps, decode, stored + made)
            service.cut_short.difference_update(shards)
            return FrameResponse(frame, headers)
        stream = RowStream(service, opened, rows, taps, check=check)
    except InputError as error:
        raise Problem("uncommitted", str(error)) from error  # a unit beyond the store's last

    return StreamedResponse(
        stream.pieces(),
        headers={"Content-Length": str(stream.nbytes), **(headers or {})},
        media_type=frames.MEDIA_TYPE,
        failed=partial(service.cut_short.update, shards),
    )


def _read(
    service: Service, opened: StoreSnapshot, rows: np.ndarray, taps: Sequence[str], decode: bool, nbytes: int
) -> frames.Frame:
    """Rows read as a whole."""
    source = opened.source
    reservation = service.memory.reserve(nbytes)
    memory = service.memory.array(len(rows) * source.row_bytes(taps), reservation)
    arrays = _arrays(memory, source.buffers(0, taps), len(rows))
    try:
        source.fill(rows, arrays)
        if decode:
            arrays = _decoded(source, rows, arrays, taps, reservation)
    except BaseException as error:
        # The traceback refers to the arrays, in a circle that only the next garbage collection breaks.
        clear_frames(error.__traceback__)
        del arrays, memory
        reservation.release()
        raise
    return frames.encode({**arrays, ROWS: rows}, metadata_of(opened))


def require_rows(most: int, rows: int) -> None:
    """Refuse more rows than one answer may hold; ask before they are looked for.

    Raises:
        Problem: too-large.
    """
    if rows > most:
        raise Problem("too-large", f"{rows:,} rows were asked for, at most {most:,} at once; ask for fewer")


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
    """What lives as long as any view of an array."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def _decoded_row_bytes(source: ZarrSource, taps: Sequence[str]) -> int:
    """Bytes of what decoding a row makes anew: float32 of all that is not stored as plain values."""
    wanted = {*taps, LOGITS}
    return sum(
        4 * int(np.prod(value.shape))
        for name, value in source.codecs.items()
        if name in wanted and not value.codec.plain
    )
