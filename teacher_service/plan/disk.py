"""Where on this machine's disks something is or would be, and how much room there is."""

import shutil
import tempfile
from pathlib import Path

from feature_store.backends.local import LocalObjects
from feature_store.backends.open import open_objects


def free_bytes(url: str | Path) -> int | None:
    """Free disk where something is or would be, in bytes; None for a bucket."""
    return shutil.disk_usage(existing_folder(url)).free if isinstance(open_objects(url), LocalObjects) else None


def existing_folder(url: str | Path) -> Path:
    """A folder or the nearest one above it that exists; the temporary one for a bucket."""
    objects = open_objects(url)
    path = objects.root.absolute() if isinstance(objects, LocalObjects) else Path(tempfile.gettempdir())
    return next(folder for folder in (path, *path.parents) if folder.exists())
