"""A pipeline stage: threads behind a bounded queue."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any


class Stage:
    """Runs calls in its own threads; callers block while its queue is full. Use as a context manager.

    The first failure ends the stage: later calls are not run, and the error is raised at the next submit or when the
    context is left. Leaving it after an error elsewhere finishes running calls and drops waiting ones.

    Args:
        name: Name of its threads.
        threads: Calls run at once.
        waiting: Calls kept beside those that run.
    """

    def __init__(self, name: str, *, threads: int, waiting: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._room = threading.Semaphore(threads + waiting)
        self._error: BaseException | None = None

    def __enter__(self) -> "Stage":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._error = self._error or error
        self._pool.shutdown(wait=True, cancel_futures=error is not None)
        if error is None and self._error is not None:
            raise self._error

    def submit(self, call: Callable[..., None], *args: Any) -> None:
        """Queue a call; blocks while the queue is full.

        Raises:
            BaseException: The error of an earlier call.
        """
        self._room.acquire()
        if self._error is not None:
            self._room.release()
            raise self._error
        future = self._pool.submit(self._run, call, *args)
        future.add_done_callback(lambda _: self._room.release())  # also when it is dropped

    def _run(self, call: Callable[..., None], *args: Any) -> None:
        if self._error is not None:
            return
        try:
            call(*args)
        except BaseException as error:  # noqa: BLE001 - every error belongs to the thread that submits
            self._error = self._error or error
