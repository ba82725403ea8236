"""Atomic writes of single files.

A file appears under its name only when all of it is written.
"""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from feature_store.backends.base import PARTIAL_SUFFIX
from feature_store.backends.local import sync_directories


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Write a file under a temporary name beside it, unique to the call; it takes its own when the context ends.

    After an error the temporary file is removed, and the earlier file stays. The file's mode follows the umask,
    as that of any new file, even if a library that writes it makes it for its owner alone.

    Args:
        path: The file.
        durable: Wait until it is on disk.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}{PARTIAL_SUFFIX}")
    try:
        with partial.open("xb") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777
        yield partial
        with partial.open("rb") as file:
            if os.fstat(file.fileno()).st_mode & 0o777 != mode:
                os.fchmod(file.fileno(), mode)
            if durable:
                os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    if durable:
        sync_directories(path.parent, [path.name])


def write_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Write a text file, see ``replacing``."""
    with replacing(path, durable=durable) as partial:
        partial.write_text(text, encoding="utf-8")
