"""Exclusive file locks between processes.

The kernel releases the locks of a dead process.
"""

import errno
import fcntl
import hashlib
import logging
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator
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


@contextmanager
def exclusive(objects: ObjectStore, name: str, refusal: str) -> Iterator[None]:
    """Hold a name; there are no locks in buckets, where commit records alone decide.

    Args:
        objects: The store's.
        name: Name of the lock.
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
    """Hold a lock file; it is deleted at the end, while it is still held.

    On a file system without locks, the file is in the machine's temporary folder, with one warning: processes of this
    machine and user still exclude each other, those of other machines do not.

    Args:
        path: The file; its folder is made if needed.
        refusal: Message if another process holds it; None to wait for the other process.

    Raises:
        ResourceError: Another process holds it, and there is a refusal; or neither place has locks.
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
                if path.is_relative_to(_machine_root()):
                    raise ResourceError(
                        f"neither the store's file system nor {tempfile.gettempdir()} has file locks "
                        f"({error.strerror}); set TMPDIR to a folder on a local disk"
                    ) from error
                _warn(path.parent, error)
                break
            if not _is_still(file.fileno(), path):
                continue  # its holder deleted the file between our open and our lock
            try:
                yield
            finally:
                path.unlink()
            return
    with suppress(FileNotFoundError):
        path.unlink()
    with locked(_substitute(path), refusal):
        yield


def machine_folder(url: str) -> Path:
    """Folder of this machine and user for locks of a place that has no locks itself."""
    return _machine_root() / hashlib.sha256(url.encode()).hexdigest()[:32]


def _machine_root() -> Path:
    return Path(tempfile.gettempdir()) / f"scalekd-locks-{os.getuid()}"


def _make_machine_root() -> None:
    """Make the folder below which this user's lock files lie; a user who can write there can remove locks."""
    root = _machine_root()
    root.mkdir(mode=0o700, exist_ok=True)
    status = root.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise ResourceError(f"{root} is a link or belongs to another user; set TMPDIR to a folder of your own")


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
    if path.is_relative_to(_machine_root()):
        _make_machine_root()
    tries = 0
    while True:
        tries += 1
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return os.fdopen(open_regular(path, _CREATE), "a")
        except (FileNotFoundError, FileExistsError):
            if tries == _TRIES:
                raise


def _is_still(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def is_held(objects: ObjectStore, unit: int | None) -> bool:
    """Whether a process writes a unit (None: metadata) of a local store now; probing writes nothing."""
    if not isinstance(objects, LocalObjects):
        return False
    path = objects.root / FOLDER / lock_name(unit)
    return _is_locked(path) or _is_locked(_substitute(path))


def _is_locked(path: Path) -> bool:
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    return False


def lock_name(unit: int | None) -> str:
    """Lock file of a unit's writer; for None, of a process that grows the store."""
    return "grow" if unit is None else f"u{unit:05d}"


def locked_units(paths: Iterable[str]) -> list[int]:
    """Units whose lock files are among a store's paths: held, or left by a process that died."""
    names = (path.removeprefix(FOLDER) for path in paths if path.startswith(FOLDER))
    return [int(name[1:]) for name in names if name[0] == "u" and name[1:].isdecimal()]
