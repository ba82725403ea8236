"""Exclusive file locks between processes.

The kernel releases the locks of a dead process.
"""

import errno
import fcntl
import hashlib
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from feature_store.backends.base import ObjectStore
from feature_store.backends.local import LocalObjects, open_regular
from feature_store.errors import ResourceError

FOLDER = ".locks/"
_TRIES = 100
_CREATE = os.O_RDWR | os.O_CREAT | os.O_APPEND  # reading as well: opening a FIFO for writing alone fails or blocks
# Lustre without -o flock, NFS without a lock daemon, some FUSE file systems
_UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)
_logger = logging.getLogger(__name__)
_without_locks: set[Path] = set()
_threads: dict[Path, threading.Lock] = {}


@contextmanager
def exclusive(objects: ObjectStore, name: str, refusal: str) -> Iterator[None]:
    """Hold a name; there are no locks in buckets, where commit records alone decide.

    Args:
        objects: The store's.
        name: What to hold.
        refusal: Message if another process holds it.

    Raises:
        ResourceError: Another process holds it.
    """
    if not isinstance(objects, LocalObjects):
        yield
        return
    with locked(objects.root / FOLDER / name, refusal):
        yield


@contextmanager
def locked(path: Path, refusal: str | None = None) -> Iterator[None]:
    """Hold a lock file; it is removed in the end.

    On a file system without locks, the file is in the machine's temporary folder, with one warning: processes of this
    machine and user still exclude each other, those of other machines do not.

    Args:
        path: The file; its folder is made if need be.
        refusal: Message if another process holds it; None to wait until it does no more.

    Raises:
        ResourceError: Another process holds it, and there is a refusal.
    """
    while True:
        with _opened(path) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if refusal is None else fcntl.LOCK_NB))
            except BlockingIOError as error:
                raise ResourceError(refusal) from error
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
                _warn(path.parent, error)
                break
            if not _is_still(file.fileno(), path):
                continue  # its holder removed the file between our open and our lock
            try:
                yield
            finally:
                path.unlink()
            return
    with suppress(FileNotFoundError):
        path.unlink()
    with _locked_on_this_machine(_substitute(path), refusal):
        yield


@contextmanager
def _locked_on_this_machine(path: Path, refusal: str | None) -> Iterator[None]:
    """As locked, by a POSIX lock, which every local file system has; the file stays.

    It belongs to the process, so threads exclude each other by a lock of their own.
    """
    among_threads = _threads.setdefault(path, threading.Lock())
    if not among_threads.acquire(blocking=refusal is None):
        raise ResourceError(refusal)
    try:
        with _opened(path) as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | (0 if refusal is None else fcntl.LOCK_NB))
            except BlockingIOError as error:
                raise ResourceError(refusal) from error
            yield
    finally:
        among_threads.release()


def machine_folder(url: str) -> Path:
    """Where processes of this machine and user lock each other out of a place that has no locks itself."""
    name = hashlib.sha256(url.encode()).hexdigest()[:32]
    return Path(tempfile.gettempdir()) / f"scalekd-locks-{os.getuid()}" / name


def _substitute(path: Path) -> Path:
    return machine_folder(str(path.parent.resolve())) / path.name


def _warn(folder: Path, error: OSError) -> None:
    if folder not in _without_locks:
        _without_locks.add(folder)
        _logger.warning(
            "the file system of %s has no file locks (%s): processes of this machine exclude each other by locks in "
            "%s, those of other machines do not; write there from one machine at a time",
            folder, error.strerror, tempfile.gettempdir(),
        )  # fmt: skip


def has_locks(objects: ObjectStore) -> bool:
    """Whether locks keep every other writer off, as far as this process has found: not in buckets."""
    return isinstance(objects, LocalObjects) and (objects.root / FOLDER) not in _without_locks


def _opened(path: Path) -> IO[str]:
    """The file; tried again because others remove its folder, and the store's, while they are empty."""
    for _ in range(_TRIES):
        with suppress(FileNotFoundError, FileExistsError):
            path.parent.mkdir(parents=True, exist_ok=True)
            return os.fdopen(open_regular(path, _CREATE), "a")
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.fdopen(open_regular(path, _CREATE), "a")


def _is_still(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def is_held(objects: ObjectStore, unit: int | None) -> bool:
    """Whether a process is writing a unit (None: metadata) of a local store now; writes nothing to find out."""
    if not isinstance(objects, LocalObjects):
        return False
    path = objects.root / FOLDER / lock_name(unit)
    substitute = _substitute(path)
    return (
        _is_locked(path, fcntl.flock)
        or (substitute in _threads and _threads[substitute].locked())  # to open and close it would release it
        or _is_locked(substitute, fcntl.lockf)
    )


def _is_locked(path: Path, lock: Callable[[IO[bytes], int], None]) -> bool:
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            lock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    return False


def lock_name(unit: int | None) -> str:
    """What a writer of a unit holds; for None, one that makes the store grow."""
    return "grow" if unit is None else f"u{unit:05d}"


def locked_units(paths: Iterable[str]) -> list[int]:
    """Units whose lock files are among a store's paths: held, or left by a process that died."""
    names = (path.removeprefix(FOLDER) for path in paths if path.startswith(FOLDER))
    return [int(name[1:]) for name in names if name[0] == "u" and name[1:].isdecimal()]
