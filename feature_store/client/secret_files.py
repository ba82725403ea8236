"""Reading of token files, refused unless private to their owner."""

import os
import stat
from pathlib import Path

from feature_store.errors import InputError

MOST_BYTES = 1 << 20


class UntrustedFileError(InputError):
    """A file that is there and is not read: what it is, or who may write it, rules that out."""


def read_secret_file(file: Path, *, shared: bool = False) -> str:
    """Text of a file of tokens; never waits for a pipe or a device.

    Args:
        file: The file, or a link to it.
        shared: Whether it may be another user's, and its group's to write.

    Raises:
        UntrustedFileError: It is no regular file, has more than MOST_BYTES, or others may write it.
        OSError, UnicodeDecodeError: It cannot be read, or is no text.
    """
    _require_trusted(file, file.stat(), shared)  # before it is opened: a device may act on that
    with os.fdopen(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as opened:
        _require_trusted(file, os.fstat(opened.fileno()), shared)
        return opened.read(MOST_BYTES).decode()


def _require_trusted(file: Path, status: os.stat_result, shared: bool) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise UntrustedFileError(f"{file} is no regular file; give a file that holds the tokens")
    if status.st_size > MOST_BYTES:
        raise UntrustedFileError(f"{file} has {status.st_size:,} bytes, expected tokens, at most {MOST_BYTES:,}")
    writers = stat.S_IWOTH if shared else stat.S_IWGRP | stat.S_IWOTH
    if status.st_mode & writers:
        mode = stat.S_IMODE(status.st_mode)
        raise UntrustedFileError(f"{file} has mode {mode:04o}: others may write it; run `chmod go-w` on it")
    if not shared and status.st_uid not in (0, os.geteuid()):
        raise UntrustedFileError(
            f"{file} belongs to user {status.st_uid}, expected user {os.geteuid()} or root; run `chown` on a copy of it"
        )
