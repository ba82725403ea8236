"""Lock of the process that changes a whole store."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from feature_store.backends.base import ObjectStore
from feature_store.backends.local import LocalObjects
from feature_store.backends.open import open_objects
from feature_store.commits.locks import FOLDER, locked, machine_folder
from feature_store.errors import InputError
from feature_store.tools.terminal import say
from teacher_service.share.leases import LEASE_SECONDS, Leases, open_leases

_POLL_SECONDS = 1.0


@contextmanager
def preparing(store: str | Path) -> Iterator[None]:
    """Be the only process that makes, grows or tidies a store; waits for others that do.

    A local store is locked by file, a bucket by a lease of its metadata.

    Raises:
        InputError: There is a file where the store should be, or it cannot be written to.
        ResourceError: The bucket cannot be reached.
    """
    objects = open_objects(store)
    with ExitStack() as held:
        if not isinstance(objects, LocalObjects):
            _lease(held.enter_context(open_leases(objects, LEASE_SECONDS)), objects.url)
            yield
            return
        folder = lock_folder(objects)
        held.callback(_remove_if_empty, folder, objects.root)  # when the lock is gone
        try:
            held.enter_context(locked(folder / "prepare"))
        except (FileExistsError, NotADirectoryError) as error:
            raise InputError(f"{store} already exists and is a file; choose another path or remove it") from error
        yield


def _lease(leases: Leases, url: str) -> None:
    if not leases.take(None):
        say(f"another process prepares {url}; waiting for it, or until {leases.takeover}", error=True)
        while not leases.take(None):
            time.sleep(_POLL_SECONDS)


def lock_folder(objects: ObjectStore) -> Path:
    """Where lock files of a store are: in it, or for a bucket, in this machine's temporary folder."""
    if isinstance(objects, LocalObjects):
        return objects.root / FOLDER
    return machine_folder(objects.url)


def _remove_if_empty(*folders: Path) -> None:
    """Leave nothing of a store whose creation failed."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return
