"""The lock under which one process of a machine changes a store as a whole."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from feature_store.backends.base import ObjectStore
from feature_store.backends.local import LocalObjects
from feature_store.backends.open import open_objects
from feature_store.commits.locks import FOLDER, locked, machine_folder
from feature_store.errors import InputError


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
