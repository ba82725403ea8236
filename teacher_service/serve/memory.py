"""Bounded memory of responses, reused once no view refers to it."""

import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from teacher_service.serve.live.batcher import BusyError

Array = TypeVar("Array", bound=np.ndarray)

_PAGE = 1 << 20


class Reservation:
    """Bytes of the limit, reserved while this object or an array bound to it lives."""

    def __init__(self, nbytes: int, released: Callable[[int], None]) -> None:
        self._nbytes, self._released = nbytes, released

    def release(self) -> None:
        """Give the bytes back now."""
        nbytes, self._nbytes = self._nbytes, 0
        self._released(nbytes)

    def bind(self, array: Array) -> Array:
        """Hold the bytes as long as the array or a view of it lives."""
        weakref.finalize(array, _nothing, self)
        return array

    def __del__(self) -> None:
        self.release()


class ResponseMemory:
    """Arrays for responses.

    A transport keeps references to what it has not sent yet, so memory counts, and is not used again, until its last
    view is gone: a reader that stalls costs its response and nothing else. Safe in threads.

    Args:
        limit: Most bytes in responses at once.
        keep: Most bytes kept for the next response. Fresh memory halves the speed of a read: the kernel clears it.
    """

    def __init__(self, limit: int, keep: int) -> None:
        self.limit, self._keep = limit, keep
        self._lock = threading.Lock()
        self._used = self._kept = 0
        self._idle: list[np.ndarray] = []
        # Objects die anywhere, also while this thread holds the lock: what they leave is only put here.
        self._released: deque[int] = deque()
        self._returned: deque[np.ndarray] = deque()

    @property
    def used(self) -> int:
        """Bytes in responses now."""
        with self._lock:
            self._settle()
            return self._used

    def reserve(self, nbytes: int) -> Reservation:
        """Take bytes of the limit.

        Raises:
            BusyError: The limit is reached.
        """
        with self._lock:
            self._settle()
            if self._used + nbytes > self.limit:
                raise BusyError(
                    f"responses in flight hold {self._used:,} bytes and this one needs {nbytes:,}, at most "
                    f"{self.limit:,} are allowed; try again later",
                    retry_after=1,
                )
            self._used += nbytes
        return Reservation(nbytes, self._released.append)

    def array(self, nbytes: int, reservation: Reservation) -> np.ndarray:
        """uint8 [nbytes] of unknown content that holds the reservation."""
        memory = self._take(nbytes)
        # Views of an array over a memoryview refer to that array, not to what is below it: it dies with the last.
        array = np.frombuffer(memoryview(memory), np.uint8)
        weakref.finalize(array, self._returned.append, memory)
        return reservation.bind(array)[:nbytes]

    def _take(self, nbytes: int) -> np.ndarray:
        wanted = -(-nbytes // _PAGE) * _PAGE
        with self._lock:
            self._settle()
            fitting = [at for at, memory in enumerate(self._idle) if wanted <= len(memory) <= 2 * wanted]
            if fitting:
                memory = self._idle.pop(min(fitting, key=lambda at: len(self._idle[at])))
                self._kept -= len(memory)
                return memory
        return np.empty(wanted, np.uint8)

    def _settle(self) -> None:
        while self._released:
            self._used -= self._released.popleft()
        while self._returned:
            memory = self._returned.popleft()
            if self._kept + len(memory) <= self._keep:
                self._idle.append(memory)
                self._kept += len(memory)


def _nothing(reservation: Reservation) -> None:
    pass
