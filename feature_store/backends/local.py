"""LocalObjects: a store's objects as files of a folder."""

import ctypes
import errno
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np

from feature_store.backends.base import PARTIAL_SUFFIX, Buffer, buffers_of
from feature_store.errors import CorruptStoreError

# Buffers of one preadv or pwritev; Linux takes no more.
IOV_MAX = os.sysconf("SC_IOV_MAX")
OPEN_FILES = 8192
# Local reads skip at most this much between two rows; a row's crc32c is 4 bytes.
_LOCAL_GAP = 4096
_SYNCS = 16
_AT_FDCWD, _RENAME_NOREPLACE = -100, 1  # of Linux
_NOWAIT: int = getattr(os, "RWF_NOWAIT", 0)  # 0: not Linux
# Flush every 32 MiB; smaller steps stall on writeback.
_WRITE_BEHIND = 32 << 20
_skipped = memoryview(bytearray(_LOCAL_GAP))
# What opening a socket, a device without driver, a directory (for writing) or a circle of links fails with.
_SPECIAL_FILE = (errno.ENXIO, errno.ENODEV, errno.EISDIR, errno.ELOOP)


class LocalObjects:
    """Objects as files in a directory.

    ``put`` writes a temporary file, syncs it and renames it (or links it, for ``new``, which is atomic too).
    Files are read with ``preadv``, through descriptors kept open up to half the process's limit, so that an
    instance survives a fork; a pickled one opens its own.

    Args:
        root: The directory; need not exist yet.
        open_files: Most files kept open between reads.
    """

    lists = True
    in_flight = 16
    gap_bytes = _LOCAL_GAP
    request_bytes = 512 << 10  # the checksum that follows finds the bytes still in the processor's cache
    bytes_per_thread = 256 << 10

    def __init__(self, root: str | Path, open_files: int = OPEN_FILES) -> None:
        self.root = Path(root)
        self.url = str(self.root)
        self._open_files = open_files
        self._files = _OpenFiles(self.url, min(open_files, _descriptor_limit()))

    def __reduce__(self):
        return LocalObjects, (self.root, self._open_files)

    def get(self, path: str) -> np.ndarray:
        """See ObjectStore.get."""
        with _MissingFolderIsMissingFile(), open(open_regular(self._file(path)), "rb") as file:
            return np.fromfile(file, np.uint8)

    def get_range(self, path: str, offset: int, length: int) -> np.ndarray:
        """See ObjectStore.get_range."""
        raw, done = np.empty(length, np.uint8), 0
        file = self._files.open(path)
        while got := os.preadv(file.descriptor, [memoryview(raw)[done:]], offset + done):
            done += got
        return raw[:done]

    def read_into(self, path: str, offset: int, parts: Sequence[memoryview | int], *, wait: bool = True) -> bool:
        """See ObjectStore.read_into; without waiting, from the page cache."""
        file = self._files.open(path)
        if not wait:
            return bool(_NOWAIT) and _read_cached(file.descriptor, parts, offset)
        buffers = _buffers(parts)
        for start in range(0, len(buffers), IOV_MAX):
            offset += _each_byte(os.preadv, file.descriptor, buffers[start : start + IOV_MAX], offset)
        return True

    def opened(self, path: str) -> "OpenFile | None":
        """See ObjectStore.opened."""
        return self._files.find(path)

    def size(self, path: str) -> int:
        """See ObjectStore.size."""
        with _MissingFolderIsMissingFile():
            return os.stat(self._file(path)).st_size  # noqa: PTH116

    def list(self, prefix: str = "") -> list[str]:
        """See ObjectStore.list."""
        folder = prefix.rpartition("/")[0]
        found: list[str] = []
        for parent, _, names in os.walk(self.root / folder):
            below = Path(parent).relative_to(self.root).as_posix()
            start = "" if below == "." else f"{below}/"
            found += [start + name for name in names]
        return sorted(path for path in found if path.startswith(prefix))

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """See ObjectStore.sizes."""
        found: dict[str, int] = {}
        folders = [prefix.rpartition("/")[0]]
        while folders:
            folder = folders.pop()
            with suppress(FileNotFoundError), os.scandir(self.root / folder) as entries:
                for entry in entries:
                    path = f"{folder}/{entry.name}" if folder else entry.name
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(path)
                    elif path.startswith(prefix):
                        with suppress(FileNotFoundError):  # renamed or removed since
                            found[path] = _size(entry)
        return found

    def put(self, path: str, payload: Buffer | Iterable[Buffer], *, new: bool = False) -> None:
        """See ObjectStore.put."""
        target = Path(self._file(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.{os.getpid()}-{threading.get_ident()}{PARTIAL_SUFFIX}")
        try:
            _write_durably(partial, buffers_of(payload))
            if new:
                _move_new(partial, target)
            else:
                partial.rename(target)
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise

    def sync(self, paths: Sequence[str]) -> None:
        """See ObjectStore.sync."""
        sync_directories(self.root, paths)

    def delete(self, path: str) -> None:
        """See ObjectStore.delete."""
        with _MissingFolderIsMissingFile():
            Path(self._file(path)).unlink()
        self._files.close(path)

    def forget(self, path: str) -> None:
        """See ObjectStore.forget."""
        self._files.close(path)

    def _file(self, path: str) -> str:
        return file_below(self.url, path)


def file_below(folder: str, path: str) -> str:
    """The file of an object.

    Raises:
        CorruptStoreError: The path leaves the folder. Paths may come from a store's own metadata and records.
    """
    if "\0" in path or not path or any(part in ("", ".", "..") for part in path.split("/")):
        raise CorruptStoreError(
            f"{folder} refers to an object {path!r}, expected a path inside the store; restore the store from a copy"
        )
    return f"{folder}/{path}"


def open_regular(path: str | Path, flags: int = os.O_RDONLY) -> int:
    """Open a regular file; a FIFO, socket or device of that name never blocks and is refused.

    Args:
        path: The file.
        flags: Of ``os.open``.

    Returns:
        Its descriptor.

    Raises:
        FileNotFoundError: There is none.
        CorruptStoreError: It is something else than a regular file.
    """
    try:
        descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno in _SPECIAL_FILE:
            raise not_regular(path, str(error.strerror)) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise not_regular(path, "not a regular file")
    return descriptor


def not_regular(path: str | Path, what: str) -> CorruptStoreError:
    """A FIFO, socket, device, directory or circle of links where an object should be."""
    return CorruptStoreError(f"{path} cannot be an object: {what}, expected a regular file; restore it from a copy")


def _move_new(partial: Path, target: Path) -> None:
    """Give a file its name if no file has it.

    A hard link does both at once. File systems without them (FUSE, CIFS, exFAT) may know a rename that refuses to
    replace. Where neither works the name is taken first, by an empty file, which a crash in between leaves behind:
    readers take it for a damaged object.

    Raises:
        FileExistsError: One has it.
    """
    try:
        os.link(partial, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        if not _renamed_new(partial, target):
            os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
            try:
                partial.replace(target)
            except BaseException:
                target.unlink()
                raise
    else:
        partial.unlink()


def _renamed_new(partial: Path, target: Path) -> bool:
    """Linux's rename with RENAME_NOREPLACE; false where kernel, C library or file system lack it."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(partial), _AT_FDCWD, os.fsencode(target), _RENAME_NOREPLACE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(target))


def sync_directories(root: Path, paths: Iterable[str]) -> None:
    """Make the names of written objects durable, up to the store's root."""
    folders = {parent for path in paths for parent in (root / path).parents if parent.is_relative_to(root)}
    # At once, because syncs that wait together are committed together by the file system.
    with ThreadPoolExecutor(max(1, min(_SYNCS, len(folders))), thread_name_prefix="feature-store-sync") as pool:
        list(pool.map(_sync_directory, folders))


def _size(entry: "os.DirEntry[str]") -> int:
    try:
        return entry.stat().st_size
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return entry.stat(follow_symlinks=False).st_size  # opening it says what is wrong


def _sync_directory(folder: Path) -> None:
    """Make the names in a folder durable, where its file system can (not CIFS or vboxsf)."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
    finally:
        os.close(descriptor)


class OpenFile:
    """An open file; closed when the last reader releases it, because other threads may still be reading."""

    def __init__(self, path: str) -> None:
        self.descriptor = open_regular(path)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class _OpenFiles:
    """The most recently used files of a folder, kept open."""

    def __init__(self, folder: str, limit: int) -> None:
        self._folder, self._limit = folder, limit
        self._files: OrderedDict[str, OpenFile] = OrderedDict()

    def find(self, path: str) -> OpenFile | None:
        """A file, if it is open."""
        return self._files.get(path)

    def open(self, path: str) -> OpenFile:
        """A file, opened now or before. Safe in threads: each step on the dictionary is atomic."""
        file = self._files.get(path)
        if file is None:
            with _MissingFolderIsMissingFile():
                file = self._files[path] = OpenFile(file_below(self._folder, path))
            while len(self._files) > self._limit:
                with suppress(KeyError):  # another thread was faster
                    self._files.popitem(last=False)
        return file

    def close(self, path: str) -> None:
        """Close a file when its last reader is done."""
        self._files.pop(path, None)


def _descriptor_limit() -> int:
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return OPEN_FILES if soft == resource.RLIM_INFINITY else soft // 2


class _MissingFolderIsMissingFile:
    """A path through something that is not a folder names a missing object too."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, NotADirectoryError):
            raise FileNotFoundError(*error.args) from error


def _write_durably(path: Path, buffers: Iterable[memoryview]) -> None:
    """Write a file as its bytes come; the disk works on the first while the last are still made."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        begun = end = 0
        for some in _pieces(buffers):
            end += _each_byte(os.pwritev, descriptor, some, end)
            if end - begun >= _WRITE_BEHIND and hasattr(os, "posix_fadvise"):
                # Linux starts to write these pages out, so that the disk does not wait for the sync.
                os.posix_fadvise(descriptor, begun, end - begun, os.POSIX_FADV_DONTNEED)
                begun = end
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _pieces(buffers: Iterable[memoryview]) -> Iterator[list[memoryview]]:
    """The buffers in lists of at least _WRITE_BEHIND bytes, the most that a system call takes."""
    some, length = [], 0
    for buffer in buffers:
        some.append(buffer)
        length += len(buffer)
        if length >= _WRITE_BEHIND or len(some) == IOV_MAX:
            yield some
            some, length = [], 0
    if some:
        yield some


def _buffers(parts: Sequence[memoryview | int]) -> Sequence[memoryview]:
    first = parts[0]
    if len(parts) == 1 and not isinstance(first, int):  # the hot path
        return (first,)
    return [_skipped[:part] if isinstance(part, int) else part for part in parts]


def _read_cached(descriptor: int, parts: Sequence[memoryview | int], offset: int) -> bool:
    buffers = _buffers(parts)
    wanted = len(buffers[0]) if len(buffers) == 1 else sum(map(len, buffers))
    try:
        return os.preadv(descriptor, buffers, offset, _NOWAIT) == wanted
    except BlockingIOError:  # not there
        return False
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system that cannot tell; or too many buffers
            return False
        raise


def _each_byte(
    call: Callable[[int, Sequence[memoryview], int], int],
    descriptor: int,
    buffers: Sequence[memoryview],
    offset: int,
) -> int:
    """Repeat a preadv or pwritev until every byte is through: the kernel may stop earlier, at 2 GiB always."""
    wanted = sum(map(len, buffers))
    done = call(descriptor, buffers, offset)
    while done < wanted:
        got = call(descriptor, _after(buffers, done), offset + done)
        if got == 0:
            raise EOFError(f"it ends at byte {offset + done}")
        done += got
    return wanted


def _after(buffers: Sequence[memoryview], done: int) -> list[memoryview]:
    rest = []
    for buffer in buffers:
        if done < len(buffer):
            rest.append(buffer[done:])
        done = max(0, done - len(buffer))
    return rest
