"""Object files of a local store: whole, durable writes and checked reads."""

import os
from contextlib import suppress
from pathlib import Path

import numpy as np

PARTIAL_SUFFIX = ".partial"


def write_object(root: Path, path: str, payload: bytes | np.ndarray) -> None:
    """Write an object so that it is either whole under its name or not there: temp file, fsync, rename.

    The directory is not synced here; sync_directories does that once for many objects.
    """
    target = root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}{PARTIAL_SUFFIX}")
    try:
        with partial.open("wb") as file:
            file.write(memoryview(payload))
            file.flush()
            os.fsync(file.fileno())
        partial.rename(target)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def sync_directories(root: Path, paths: list[str]) -> None:
    """Make the names of written objects durable, up to the store's root."""
    folders = {parent for path in paths for parent in (root / path).parents if parent.is_relative_to(root)}
    for folder in folders:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def list_objects(root: Path) -> list[str]:
    """Paths of all files below root, sorted."""
    return sorted(file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file())
