"""Free disk space at a destination."""

import shutil
import tempfile
from pathlib import Path

from feature_store.backends.base import ObjectStore
from feature_store.backends.local import LocalObjects
from feature_store.commits.root import ROOT


def free_bytes(objects: ObjectStore) -> int | None:
    """Free disk where objects are or will be, in bytes; None for a bucket."""
    return shutil.disk_usage(existing_folder(objects)).free if isinstance(objects, LocalObjects) else None


def existing_folder(objects: ObjectStore) -> Path:
    """Their folder or the nearest one above it that exists; the temporary folder for a bucket."""
    path = objects.root.absolute() if isinstance(objects, LocalObjects) else Path(tempfile.gettempdir())
    return next(folder for folder in (path, *path.parents) if folder.exists())


def folder_beside(objects: ObjectStore) -> Path:
    """Folder on their disk for temporary files: beside a store, never in it."""
    near = existing_folder(objects)
    return near.parent if (near / ROOT).exists() else near
