"""Writes finished units in the background while the teacher computes the next one."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from rich.filesize import decimal

from feature_store.cli import DISK_FULL
from feature_store.errors import ResourceError
from feature_store.store import Store
from feature_store.writer import UnitData
from teacher_service.decoding import Task
from teacher_service.planning import free_bytes, remaining_bytes

RESUME = "committed units are safe; mend it and run the same command again to go on"
MAX_WAITING = 1  # units held in memory beside the one being computed and the one being written


def disk_error(error: OSError, path: Path, what: str, needed: int = 0) -> ResourceError:
    """The user's form of a failed write: what is missing, and how to go on.

    Args:
        error: What the system said.
        path: The store.
        what: What could not be written.
        needed: Bytes that are still to be written, if known.
    """
    if error.errno not in DISK_FULL:
        return ResourceError(f"{what} cannot be written to {path}: {error}; {RESUME}")
    free = free_bytes(path)
    missing = f"{decimal(needed - free)} are missing" if needed > free else "a quota or file size limit is in the way"
    return ResourceError(
        f"{what} does not fit on the disk ({error.strerror}): {path} needs {decimal(needed)} more, "
        f"{decimal(free)} are free, {missing}; {RESUME}"
    )


class UnitWriter:
    """One thread that writes units in order; use as a context manager.

    Leaving the context waits for the unit being written: what was begun is committed. A failed write surfaces
    at the next submit or at the end, as the user's error.
    """

    def __init__(self, store: Store, on_commit: Callable[[Task, UnitData], None]) -> None:
        self._store, self._on_commit = store, on_commit
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="unit-writer")
        self._pending: deque[Future[None]] = deque()

    def __enter__(self) -> "UnitWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            self._settle(0)

    def submit(self, task: Task, data: UnitData) -> None:
        """Queue a unit; blocks while too many are waiting.

        Raises:
            ResourceError: The disk is full or cannot be written.
            InputError: The teacher gave values the codec cannot hold.
        """
        self._settle(MAX_WAITING)
        self._pending.append(self._thread.submit(self._write, task, data))

    def _settle(self, allowed: int) -> None:
        while len(self._pending) > allowed:
            self._pending.popleft().result()

    def _write(self, task: Task, data: UnitData) -> None:
        try:
            self._store.write_unit(task.unit, task.views.start, data)
        except OSError as error:
            store = self._store
            needed = remaining_bytes(store.manifest, store.committed.missing_views())
            raise disk_error(error, store.path, f"unit {task.unit}", needed) from error
        self._on_commit(task, data)
