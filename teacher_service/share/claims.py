"""Shares tasks among the processes of a machine: who holds a unit's claim computes it, a dead holder's is free."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType

from feature_store.backends.base import ObjectStore
from feature_store.backends.local import LocalObjects
from feature_store.backends.open import open_objects
from feature_store.commits.locks import FOLDER, lock_name, locked, machine_folder
from feature_store.commits.record import record_path
from feature_store.errors import InputError, ResourceError
from feature_store.store import Store
from teacher_service.cache.decode import Task

_PREFIX = "claim-"
_BUSY = "another process computes it"


class Claims:
    """The units of a store this process computes; use as a context manager, leaving it gives all of them back.

    Any number of processes may have claims on one store, whoever started them and when. The kernel gives back the
    claims of a process that dies. There is no list of tasks to keep: what is neither committed nor locked is free.

    Args:
        store: The store; its records say what is committed.
        folder: Where the locks are, see lock_folder.
    """

    def __init__(self, store: Store, folder: Path) -> None:
        self._objects, self._folder = store.objects, folder
        self._held: dict[int, ExitStack] = {}

    def __enter__(self) -> "Claims":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for unit in list(self._held):
            self._release(unit)

    def take(self, tasks: Iterable[Task]) -> Iterator[Task]:
        """Those that are free when they are pulled, each claimed from then on."""
        return (task for task in tasks if self._claim(task))

    def release(self, task: Task) -> None:
        """Give a task back, committed or not; any thread may."""
        self._release(task.unit)

    def uncommitted(self, tasks: Iterable[Task]) -> list[Task]:
        """Those nobody has committed yet."""
        return [task for task in tasks if not is_committed(self._objects, task)]

    def sweep(self) -> None:
        """Remove what processes that died left of their locks."""
        for path in self._folder.glob(f"{_PREFIX}*"):
            with suppress(ResourceError), locked(path, _BUSY):
                pass

    def _claim(self, task: Task) -> bool:
        if is_committed(self._objects, task) or not self._lock(task.unit):
            return False
        if is_committed(self._objects, task):  # between our look and our lock
            self._release(task.unit)
            return False
        return True

    def _lock(self, unit: int) -> bool:
        held = ExitStack()
        try:
            held.enter_context(locked(self._path(unit), _BUSY))
        except ResourceError:
            return False
        self._held[unit] = held
        return True

    def _release(self, unit: int) -> None:
        if (held := self._held.pop(unit, None)) is not None:
            held.close()

    def _path(self, unit: int) -> Path:
        return self._folder / f"{_PREFIX}{lock_name(unit)}"


def is_committed(objects: ObjectStore, task: Task) -> bool:
    """Whether somebody has committed a task, since this process opened the store too."""
    try:
        objects.size(record_path(task.unit, task.views.start, task.views.stop - 1))
    except FileNotFoundError:
        return False
    return True


@contextmanager
def preparing(store: str | Path) -> Iterator[None]:
    """Be the only process of this machine that makes, grows or tidies a store; waits for others that do.

    Raises:
        InputError: There is a file where the store should be.
    """
    objects = open_objects(store)
    folder = lock_folder(objects)
    with ExitStack() as held:
        if isinstance(objects, LocalObjects):
            held.callback(_remove_if_empty, folder, objects.root)  # when the lock is gone
        try:
            held.enter_context(locked(folder / "prepare"))
        except (FileExistsError, NotADirectoryError) as error:
            raise InputError(f"{store} already exists and is a file; choose another path or remove it") from error
        yield


def lock_folder(objects: ObjectStore) -> Path:
    """Where processes lock each other out of a store: in it, or for a bucket, in this machine's temporary folder."""
    if isinstance(objects, LocalObjects):
        return objects.root / FOLDER
    return machine_folder(objects.url)


def _remove_if_empty(*folders: Path) -> None:
    """Leave nothing behind of a store that was not made after all."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return
