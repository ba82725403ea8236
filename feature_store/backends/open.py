"""Opens the backend of a path or URL."""

from pathlib import Path

from feature_store.backends.base import ObjectStore
from feature_store.backends.local import LocalObjects


def open_objects(url: str | Path) -> ObjectStore:
    """Objects below a local path or URL.

    Args:
        url: A path, ``file://``, ``s3://``, ``gs://`` or ``http(s)://`` (read only).

    Raises:
        InputError: Unknown scheme, or the library for it is missing.
    """
    scheme, separator, rest = str(url).partition("://")
    if not separator or scheme == "file":
        return LocalObjects(Path(rest if separator else url))
    from feature_store.backends.bucket import RemoteObjects

    return RemoteObjects(str(url))
