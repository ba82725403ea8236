"""Cache folder for tar indexes.

Headers of a tar are read once. Its index is one file, in a folder that only its owner can enter, because a user who can
write an index decides which bytes are image and label. A file is used if it belongs to this user, its crc32c matches,
and it was made by the same code from a tar of the same path, size, modification and change time. Any other file is
ignored and made again.

    magic | JSON line: identity, sizes, hash, notes, problems | spans <i8 [n, 4] | key ends <u4 [n] | keys | crc32c <u4
"""

import hashlib
import json
import os
import stat
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from feature_store.backends.files import replacing
from feature_store.format.checksums import CRC_BYTES, crc32c
from feature_store.inputs import headers, tar_index
from feature_store.inputs.tar_index import CLASS_INDEX, Keys, LabelRule, TarIndex

VARIABLE = "SCALEKD_TAR_INDEX"
MOST_BYTES = 4 << 30  # of all indexes, about 70 million samples; beyond it the oldest are deleted
_MAGIC = b"scalekd-tar-index 1\n"
_SPAN_BYTES, _END_BYTES = 32, 4  # per sample


class TarVersion(NamedTuple):
    """Version of a tar's content, known without reading it.

    The change time cannot be set by programs, so it shows a replaced file even if size and modification time are kept.
    """

    path: str
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, path: Path) -> "TarVersion | None":
        """The version of a file as it is now; None if it is no regular file."""
        try:
            status = path.stat()
        except OSError:
            return None
        if not stat.S_ISREG(status.st_mode):
            return None
        return cls(os.path.realpath(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    def shows_changes(self) -> bool:
        """Whether a later change is sure to get a later time: file clocks tick every 10 ms, coarse ones every 2 s."""
        tick_ns = 2_000_000_000 if self.ctime_ns % 1_000_000 == 0 else 20_000_000
        return time.time_ns() - self.ctime_ns > tick_ns


class IndexCache:
    """Indexes of tars in a folder of this user; used from many threads and processes.

    Args:
        rule: Where labels are; an index by one rule is never used for another.

    Attributes:
        folder: The folder; None if there is none that can be used, so that nothing is kept.
    """

    def __init__(self, rule: LabelRule = CLASS_INDEX) -> None:
        self._rule = rule
        self.folder = _private_folder()

    def load(self, version: TarVersion | None) -> TarIndex | None:
        """The kept index of a tar; None if there is no usable one."""
        if self.folder is None or version is None:
            return None
        try:
            data = _read_own(self.folder / _file_name(version, self._rule))
            return decode_index(data, version, self._rule)
        except (OSError, ValueError, LookupError, TypeError):
            return None

    def save(self, version: TarVersion | None, index: TarIndex) -> None:
        """Keep the index of a tar; does nothing if the folder cannot be written, or a later change might not show."""
        if self.folder is not None and version is not None and version.shows_changes():
            with suppress(OSError), replacing(self.folder / _file_name(version, self._rule)) as partial:
                partial.write_bytes(encode_index(index, version, self._rule))

    def delete_oldest(self) -> None:
        """Delete the files written first until all take at most MOST_BYTES."""
        if self.folder is None:
            return
        with suppress(OSError):
            found = [(entry.stat().st_mtime_ns, entry.stat().st_size, entry.path) for entry in os.scandir(self.folder)]
            total = sum(size for _, size, _ in found)
            for _, size, path in sorted(found):
                if total <= MOST_BYTES:
                    break
                Path(path).unlink(missing_ok=True)
                total -= size


def encode_index(index: TarIndex, version: TarVersion, rule: LabelRule = CLASS_INDEX) -> bytes:
    """Bytes of an index file; see the module."""
    header = {
        "tar": list(version),
        "code": _code_sha256(),
        "labels": list(rule),
        "samples": len(index.keys),
        "header_sha256": index.header_sha256,
        "notes": index.notes,
        "problems": list(index.problems.items()),
    }
    body = b"".join(
        [_MAGIC, json.dumps(header).encode(), b"\n", index.spans.tobytes(), index.keys.ends.tobytes(), index.keys.text]
    )
    return body + crc32c(body).to_bytes(CRC_BYTES, "little")


def decode_index(data: bytes, version: TarVersion, rule: LabelRule = CLASS_INDEX) -> TarIndex:
    """The index in a file's bytes.

    Raises:
        ValueError, LookupError, TypeError: Damaged, of another tar or version of it, or made by other code.
    """
    body = memoryview(data)[:-CRC_BYTES]
    if not data.startswith(_MAGIC) or crc32c(body) != int.from_bytes(data[-CRC_BYTES:], "little"):
        raise ValueError("no index of a tar, or damaged")
    end = data.index(b"\n", len(_MAGIC)) + 1
    header = json.loads(data[len(_MAGIC) : end])
    if (header["tar"], header["code"], header["labels"]) != (list(version), _code_sha256(), list(rule)):
        raise ValueError("index of another tar, by other code, or of other labels")
    count = header["samples"]
    keys_at = end + count * (_SPAN_BYTES + _END_BYTES)
    spans = np.frombuffer(data, "<i8", count * 4, end).reshape(count, 4)
    ends = np.frombuffer(data, "<u4", count, end + count * _SPAN_BYTES)
    keys = Keys(data[keys_at:-CRC_BYTES], ends)
    if ends[-1] != len(keys.text):
        raise ValueError("keys of another length")
    return TarIndex(keys, spans, dict(header["problems"]), header["header_sha256"], header["notes"])


@cache
def _code_sha256() -> str:
    """Hash of the code that makes an index, so that a change of its rules never meets an index by the rules before."""
    modules = [Path(str(module.__file__)).read_bytes() for module in (headers, tar_index)]
    return hashlib.sha256(b"\0".join(modules)).hexdigest()


def _file_name(version: TarVersion, rule: LabelRule) -> str:
    identity = "\0".join([_code_sha256(), *map(str, version), *map(str, rule)])
    return hashlib.sha256(os.fsencode(identity)).hexdigest()[:40] + ".index"


def _private_folder() -> Path | None:
    """The folder, made if needed; None if that fails, it is another user's, or others may enter it."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 - of no home it is as given
    base = Path(os.environ.get(VARIABLE) or Path(home, "scalekd-cache"))
    if not base.is_absolute():
        return None
    folder = base / f"tar-index-{os.geteuid()}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        status = folder.lstat()
    except OSError:
        return None
    private = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077
    return folder if private else None


def _read_own(file: Path) -> bytes:
    """Bytes of a regular file of this user; never follows a link or waits for a pipe."""
    with os.fdopen(os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as opened:
        status = os.fstat(opened.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise PermissionError(f"{file} is no regular file of this user")
        return opened.read()
