"""Keeps two local processes off one thing; the kernel gives the lock back when its holder dies."""

import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from feature_store.errors import ResourceError
from feature_store.objects.local import LocalObjects, ObjectStore, open_regular

FOLDER = ".locks/"
_TRIES = 100
_CREATE = os.O_RDWR | os.O_CREAT | os.O_APPEND  # reading as well: opening a FIFO for writing alone fails or blocks


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
    """Hold a lock file of this machine; it is removed in the end.

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
            if not _is_still(file.fileno(), path):
                continue  # its holder removed the file between our open and our lock
            try:
                yield
            finally:
                path.unlink()
            return


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
    try:
        with os.fdopen(open_regular(objects.root / FOLDER / lock_name(unit)), "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def lock_name(unit: int | None) -> str:
    """What a writer of a unit holds; for None, one that makes the store grow."""
    return "grow" if unit is None else f"u{unit:05d}"


def locked_units(paths: Iterable[str]) -> list[int]:
    """Units whose lock files are among a store's paths: held, or left by a process that died."""
    names = (path.removeprefix(FOLDER) for path in paths if path.startswith(FOLDER))
    return [int(name[1:]) for name in names if name[0] == "u" and name[1:].isdecimal()]
