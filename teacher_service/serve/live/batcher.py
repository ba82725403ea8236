"""Dynamic batching of many callers' rows through one model.

It knows neither HTTP nor torch. Two numbers decide: how many rows a batch may have, and how long the first of them
waits for others. Requests are cut where a batch is full, so batches are full whenever enough rows wait.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from feature_store.errors import InputError, ResourceError
from feature_store.tools.options import require

Outputs: TypeAlias = dict[str, np.ndarray]
"""Outputs of a model for n rows: arrays [n, ...] by name."""

_RATE_MEMORY = 0.8  # weight of the past in the estimated speed


class BusyError(ResourceError):
    """Too many rows wait already, for the queue or for the deadline; nothing was queued.

    Attributes:
        retry_after: Seconds after which the queue has probably gone, at least 1.
    """

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineError(ResourceError):
    """A request was not answered by its deadline."""


class DeviceFaultError(ResourceError):
    """The model's device is lost; raised by a model, it ends the batcher: nothing more is computed.

    Attributes:
        retry_after: Seconds in which a supervisor may have restarted the service.
    """

    retry_after = 30.0


@dataclass(frozen=True)
class BatchRecord:
    """One batch, for metrics.

    Attributes:
        rows: Its rows.
        requests: Requests that had rows in it.
        waited: Seconds its oldest rows waited for it.
        seconds: Seconds in the model.
    """

    rows: int
    requests: int
    waited: float
    seconds: float


@dataclass(eq=False)
class _Request:
    rows: np.ndarray
    deadline: float
    arrived: float
    future: "Future[Outputs]" = field(default_factory=Future)
    taken: int = 0
    abandoned: bool = False
    parts: list[Outputs] = field(default_factory=list)

    @property
    def left(self) -> int:
        return len(self.rows) - self.taken

    def take(self, most: int) -> "_Piece":
        piece = _Piece(self, self.taken, min(len(self.rows), self.taken + most))
        self.taken = piece.stop
        return piece

    def answer(self, part: Outputs, stop: int) -> None:
        """Keep the outputs of rows up to stop; pieces are computed in order, so the last one completes the request."""
        self.parts.append(part)
        if stop == len(self.rows):
            whole = part if len(self.parts) == 1 else _joined(self.parts)
            _settle(self.future, result=whole)


@dataclass(frozen=True)
class _Piece:
    request: _Request
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


class Batcher:
    """One thread that owns a model and feeds it batches.

    Args:
        model: Outputs of rows [n, *row_shape], 1 <= n <= max_rows; called by one thread only, with memory that is
            used again afterwards. An exception reaches the requests of that batch; a DeviceFaultError all of them.
        row_shape: Shape of one row.
        dtype: Of the rows.
        max_rows: Most rows of a batch.
        max_wait: Seconds the first rows of a batch wait for more.
        queue_rows: Most rows that wait; more are refused.
        observe: Told about every batch.
        clock: Seconds that only grow.
    """

    def __init__(
        self,
        model: Callable[[np.ndarray], Outputs],
        row_shape: Sequence[int],
        *,
        dtype: type = np.uint8,
        max_rows: int = 64,
        max_wait: float = 0.005,
        queue_rows: int = 1024,
        observe: Callable[[BatchRecord], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        require(max_rows >= 1, "--max-batch", max_rows, "at least 1")
        require(max_wait >= 0, "--max-wait", max_wait, "0 or more seconds")
        require(queue_rows >= max_rows, "--queue-rows", queue_rows, f"at least the {max_rows} rows of a batch")
        self._model, self._observe, self._clock = model, observe, clock
        self.max_rows, self.max_wait, self.queue_rows = max_rows, max_wait, queue_rows
        self._memory = np.zeros((max_rows, *row_shape), dtype)
        self._changed = threading.Condition()
        self._queue: deque[_Request] = deque()
        self._waiting = self._computing = 0
        self._closing, self._fault = False, ""
        self._rows_per_second = 0.0
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    @property
    def fault(self) -> str:
        """Why it computes nothing any more; empty while it does."""
        return self._fault

    @property
    def waiting(self) -> int:
        """Rows that wait."""
        return self._waiting

    def require_room(self, rows: int = 1, *, timeout: float | None = None) -> None:
        """Refuse what submit would refuse now, before the rows are made.

        Raises:
            BusyError: Too many rows wait.
            DeviceFaultError: The device is lost.
            ResourceError: The batcher is closed.
        """
        with self._changed:
            self._require_running()
            if self._refusal(rows, timeout):
                self._drop_dead()  # those that gave up take no room
            if refusal := self._refusal(rows, timeout):
                raise refusal

    def submit(self, rows: np.ndarray, *, timeout: float | None = None) -> "Future[Outputs]":
        """Queue rows [n, *row_shape]; the future gives their outputs [n, ...], maybe views of a whole batch's.

        A future cancelled before its rows are taken costs nothing.

        Args:
            rows: Any number of them up to queue_rows; leave them as they are until the answer.
            timeout: Seconds after which rows not taken yet fail with a DeadlineError.

        Raises:
            InputError: The rows have another shape or dtype, or are none, or more than ever fit the queue.
            BusyError: Too many rows wait: for the queue, or to answer these within their timeout.
            DeviceFaultError: The device is lost.
            ResourceError: The batcher is closed.
        """
        return self._enqueue(rows, timeout).future

    async def compute(self, rows: np.ndarray, *, timeout: float | None = None) -> Outputs:
        """See submit; a cancelled task drops the rows not taken yet.

        Raises:
            DeadlineError: The answer is not there after timeout seconds.
        """
        request = self._enqueue(rows, timeout)
        try:
            async with asyncio.timeout(timeout):
                return await asyncio.wrap_future(request.future)
        except TimeoutError as error:
            raise _late() from error
        finally:
            request.abandoned = True

    def close(self, timeout: float | None = None) -> bool:
        """Take no more, answer what waits, and end the thread.

        Args:
            timeout: Most seconds to wait for that; what waits then is answered in the background.

        Returns:
            Whether everything was answered in time.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _enqueue(self, rows: np.ndarray, timeout: float | None) -> _Request:
        self._require_fitting(rows)
        now = self._clock()
        request = _Request(rows, float("inf") if timeout is None else now + timeout, now)
        with self._changed:
            self.require_room(len(rows), timeout=timeout)
            self._queue.append(request)
            self._waiting += len(rows)
            self._changed.notify_all()
        return request

    def _require_fitting(self, rows: np.ndarray) -> None:
        memory = self._memory
        if rows.dtype != memory.dtype or rows.shape[1:] != memory.shape[1:] or not len(rows):
            raise InputError(
                f"got {rows.dtype} {list(rows.shape)}, expected {memory.dtype} "
                f"[n, {', '.join(map(str, memory.shape[1:]))}] with at least one row"
            )
        if len(rows) > self.queue_rows:
            raise InputError(f"got {len(rows)} rows, at most {self.queue_rows} are taken at once; send fewer")

    def _require_running(self) -> None:
        if self._fault:
            raise DeviceFaultError(self._fault)
        if self._closing:
            raise ResourceError("the service is shutting down; send the request to another one, or later")

    def _refusal(self, rows: int, timeout: float | None) -> BusyError | None:
        rate = self._rows_per_second
        retry_after = max(1.0, self._waiting / rate if rate else 1.0)
        if self._waiting + rows > self.queue_rows:
            return BusyError(
                f"{self._waiting} rows wait already, and {rows} more exceed the queue of {self.queue_rows}; "
                "try again later, or with fewer rows",
                retry_after,
            )
        # Rows that came too late for their deadline would be computed in vain, and so would all behind them.
        ahead = self._computing + self._waiting
        if timeout is not None and rate and self._waiting and (seconds := (ahead + rows) / rate) > timeout:
            return BusyError(
                f"{ahead} rows come first, and with {rows} more would take {seconds:.3g} seconds where {timeout:g} are "
                "allowed; try again later, or with fewer rows",
                retry_after,
            )
        return None

    def _run(self) -> None:
        pieces: list[_Piece] = []
        try:
            while pieces := self._next():
                self._compute(pieces)
                self._computing = 0
        finally:
            self._end(pieces)

    def _next(self) -> list[_Piece]:
        """Pieces of the next batch, once it is full or its first rows have waited long enough; none at the end."""
        with self._changed:
            while True:
                self._drop_dead()
                if self._fault or (self._closing and not self._queue):
                    return []
                remaining = self._remaining_wait() if self._queue else None
                if remaining is None or remaining > 0:
                    self._changed.wait(remaining)
                elif pieces := self._take():
                    return pieces

    def _remaining_wait(self) -> float:
        """Seconds the next batch may still wait for more rows."""
        if self._closing or self._waiting >= self.max_rows:
            return 0.0
        return self._queue[0].arrived + self.max_wait - self._clock()

    def _take(self) -> list[_Piece]:
        """Rows of the oldest requests; what does not fit stays in front, so that pieces keep their order."""
        pieces: list[_Piece] = []
        room = self.max_rows
        while self._queue and room:
            request = self._queue[0]
            if request.taken or request.future.set_running_or_notify_cancel():
                pieces.append(request.take(room))
                room -= len(pieces[-1])
                self._waiting -= len(pieces[-1])
            if not request.left or request.future.cancelled():
                self._waiting -= request.left
                self._queue.popleft()
        self._computing = sum(map(len, pieces))
        return pieces

    def _drop_dead(self) -> None:
        """Drop requests whose client has gone or whose deadline has passed."""
        now = self._clock()
        late = [request for request in self._queue if request.deadline <= now]
        for request in late:
            _settle(request.future, error=_late())
        gone = [each for each in self._queue if each.abandoned or each.future.done()]
        if gone:
            self._queue = deque(each for each in self._queue if not (each.abandoned or each.future.done()))
            self._waiting = sum(request.left for request in self._queue)

    def _compute(self, pieces: list[_Piece]) -> None:
        rows = 0
        for piece in pieces:
            self._memory[rows : rows + len(piece)] = piece.request.rows[piece.start : piece.stop]
            rows += len(piece)
        started = self._clock()
        try:
            outputs = self._model(self._memory[:rows])
        except Exception as error:  # noqa: BLE001 - it belongs to those whose rows these are
            self._fail(pieces, error)
            return
        seconds = self._clock() - started
        self._learn_rate(rows / max(seconds, 1e-9))
        at = 0
        for piece in pieces:
            part = {name: array[at : at + len(piece)] for name, array in outputs.items()}
            piece.request.answer(part, piece.stop)
            at += len(piece)
        if self._observe is not None:
            waited = started - min(piece.request.arrived for piece in pieces)
            self._observe(BatchRecord(rows, len(pieces), waited, seconds))

    def _learn_rate(self, rate: float) -> None:
        past = self._rows_per_second or rate
        self._rows_per_second = _RATE_MEMORY * past + (1 - _RATE_MEMORY) * rate

    def _fail(self, pieces: list[_Piece], error: Exception) -> None:
        if isinstance(error, DeviceFaultError):
            self._fault = str(error)
        for piece in pieces:
            _settle(piece.request.future, error=error)  # its rows that still wait are dropped with it

    def _end(self, pieces: list[_Piece]) -> None:
        """Fail all waiting requests, and the given pieces, because an unexpected error was raised."""
        with self._changed:
            if pieces and not self._fault:
                self._fault = "the compute thread died; start the service again"
            for request in (*(piece.request for piece in pieces), *self._queue):
                _settle(request.future, error=DeviceFaultError(self._fault))
            self._queue.clear()
            self._waiting = 0


def _settle(future: "Future[Outputs]", *, result: Outputs | None = None, error: Exception | None = None) -> None:
    with suppress(InvalidStateError):  # the caller cancelled it, or another piece of it failed
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result or {})


def _joined(parts: list[Outputs]) -> Outputs:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _late() -> DeadlineError:
    return DeadlineError("no answer by the deadline; allow more time, or send fewer rows")
