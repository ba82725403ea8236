"""A read-through cache of remote objects on local disk, with a size limit."""

import fcntl
import hashlib
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeAlias

import numpy as np

from feature_store.backends.local import PARTIAL_SUFFIX, Buffer, LocalObjects, ObjectStore, scatter
from feature_store.errors import InputError
from feature_store.processes import PerProcess

BLOCK_BYTES = 8 << 20
_LEDGER = ".bytes"
# Eviction frees this share of the limit at once, so that it is seldom.
_SLACK = 16
_LOCKS = 64
_Total: TypeAlias = list[int]  # one number, to be changed in place
_Copies: TypeAlias = list[tuple[float, int, Path]]


class CachedObjects:
    """Keeps aligned 8 MiB blocks of what is read, least recently used first out.

    Only zarr's chunk objects (``.../c/...``) are kept: they never change once committed, and everything read from
    them is proven by checksums outside of them. Metadata and commit records are always asked for anew.

    A block is written under a temporary name and renamed; no sync, because a block that a power cut left torn fails
    its row's checksum, and the reader then calls ``forget`` and asks the origin. Any number of processes may share
    a directory; the limit holds for all of them together, apart from what is read while being evicted.

    Args:
        origin: Where objects really are.
        folder: Directory of the copies.
        limit: Most bytes of all copies in that directory.

    Raises:
        InputError: The limit does not hold one block per read in flight.
    """

    def __init__(self, origin: ObjectStore, folder: Path, limit: int) -> None:
        least = 2 * origin.in_flight * BLOCK_BYTES
        if limit < least:
            raise InputError(f"cache_bytes {limit} is too small: expected at least {least} (two blocks per read)")
        self.origin, self.folder, self.limit = origin, folder, limit
        self.url, self.lists, self.in_flight = origin.url, origin.lists, origin.in_flight
        self.gap_bytes, self.request_bytes = LocalObjects.gap_bytes, LocalObjects.request_bytes
        self.bytes_per_thread = origin.bytes_per_thread
        self._name = hashlib.blake2b(origin.url.encode(), digest_size=8).hexdigest()
        folder.mkdir(parents=True, exist_ok=True)
        # None kept open: a deleted file that someone holds open still takes space.
        self._local = LocalObjects(folder / self._name, open_files=0)
        self._locks = PerProcess(_locks)

    def __reduce__(self):
        return CachedObjects, (self.origin, self.folder, self.limit)

    def get(self, path: str) -> np.ndarray:
        """See ObjectStore.get."""
        if not _is_kept(path):
            return self.origin.get(path)
        whole = f"{path}/whole"
        with suppress(FileNotFoundError):
            payload = self._local.get(whole)
            self._touch(whole)
            return payload
        payload = self.origin.get(path)
        self._keep(whole, payload)
        return payload

    def get_range(self, path: str, offset: int, length: int) -> np.ndarray:
        """See ObjectStore.get_range."""
        if not _is_kept(path):
            return self.origin.get_range(path, offset, length)
        pieces = []
        while length > 0:
            block, start = divmod(offset, BLOCK_BYTES)
            pieces.append(self._piece(path, block, start, min(length, BLOCK_BYTES - start)))
            if start + len(pieces[-1]) < min(start + length, BLOCK_BYTES):
                break  # the object ends here
            offset, length = offset + len(pieces[-1]), length - len(pieces[-1])
        return np.concatenate([np.empty(0, np.uint8), *pieces])

    def read_into(self, path: str, offset: int, parts: Sequence[memoryview | int], *, wait: bool = True) -> bool:
        """See ObjectStore.read_into; a copy on disk is waited for."""
        if not wait or not _is_kept(path):
            return self.origin.read_into(path, offset, parts, wait=wait)
        for block, start, some in _by_block(offset, parts):
            self._read_block(path, block, start, some)
        return True

    def opened(self, path: str) -> None:
        """See ObjectStore.opened: there are no files."""

    def size(self, path: str) -> int:
        """See ObjectStore.size."""
        return self.origin.size(path)

    def list(self, prefix: str = "") -> list[str]:
        """See ObjectStore.list."""
        return self.origin.list(prefix)

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """See ObjectStore.sizes."""
        return self.origin.sizes(prefix)

    def put(self, path: str, payload: Buffer | Iterable[Buffer], *, new: bool = False) -> None:
        """See ObjectStore.put."""
        self.origin.put(path, payload, new=new)
        self.forget(path)

    def sync(self, paths: Sequence[str]) -> None:
        """See ObjectStore.sync."""
        self.origin.sync(paths)

    def delete(self, path: str) -> None:
        """See ObjectStore.delete."""
        self.origin.delete(path)
        self.forget(path)

    def forget(self, path: str) -> bool:
        """See ObjectStore.forget."""
        kept = self._local.list(f"{path}/")
        for name in kept:
            self._drop(name)
        return bool(kept)

    def _drop(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._local.delete(name)

    def _piece(self, path: str, block: int, start: int, wanted: int) -> np.ndarray:
        name = f"{path}/{block}"
        try:
            piece = self._local.get_range(name, start, wanted)
        except FileNotFoundError:
            return self._fetched(path, block)[start : start + wanted]
        self._touch(name)
        return piece

    def _read_block(self, path: str, block: int, start: int, parts: Sequence[memoryview | int]) -> None:
        name = f"{path}/{block}"
        try:
            self._local.read_into(name, start, parts)
        except (FileNotFoundError, EOFError) as error:
            if isinstance(error, EOFError):  # torn
                self._drop(name)
            scatter(self._fetched(path, block)[start:], block * BLOCK_BYTES + start, parts)
        else:
            self._touch(name)

    def _fetched(self, path: str, block: int) -> np.ndarray:
        """A block from the origin, kept from now on."""
        name = f"{path}/{block}"
        with self._locks()[hash(name) % _LOCKS]:
            with suppress(FileNotFoundError):
                return self._local.get(name)  # another thread was faster
            payload = self.origin.get_range(path, block * BLOCK_BYTES, BLOCK_BYTES)
            self._keep(name, payload)
        return payload

    def _touch(self, name: str) -> None:
        with suppress(FileNotFoundError):
            os.utime(self._local.root / name)

    def _keep(self, name: str, payload: np.ndarray) -> None:
        target = self._local.root / name
        partial = target.with_name(f"{target.name}.{os.getpid()}-{os.urandom(4).hex()}{PARTIAL_SUFFIX}")
        try:
            with self._ledger() as total:
                total[0] += payload.nbytes
                if total[0] > self.limit:
                    total[0] = self._evict(self.limit - self.limit // _SLACK - payload.nbytes) + payload.nbytes
            target.parent.mkdir(parents=True, exist_ok=True)
            payload.tofile(partial)
            partial.rename(target)
        except OSError:  # a full disk must not stop a reader that has its bytes
            with suppress(OSError):
                partial.unlink()

    @contextmanager
    def _ledger(self) -> Iterator[_Total]:
        """The bytes kept, under a lock all processes share. Never too low: added before a block is written."""
        with (self.folder / _LEDGER).open("a+b") as file:
            with suppress(OSError):  # a file system without locks: the count is kept less exactly
                fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            text = file.read()
            total = [int(text) if text.isdigit() else sum(size for _, size, _ in self._copies())]
            yield total
            file.truncate(0)
            file.write(b"%d" % total[0])

    def _copies(self) -> _Copies:
        """Time of last use, bytes and path of every file kept, of any store."""
        found = []
        for parent, _, names in os.walk(self.folder):
            for name in names:
                with suppress(FileNotFoundError):
                    status = (file := Path(parent, name)).stat()
                    found.append((status.st_mtime, status.st_size, file))
        return [copy for copy in found if copy[2].name != _LEDGER]

    def _evict(self, target: int) -> int:
        """Delete the longest unused until at most target bytes are left; what is left."""
        copies = sorted(self._copies())
        total = sum(size for _, size, _ in copies)
        for _, size, file in copies:
            if total <= target:
                break
            with suppress(FileNotFoundError):
                file.unlink()
            total -= size
        return total


def _locks() -> list[threading.Lock]:
    return [threading.Lock() for _ in range(_LOCKS)]


def _is_kept(path: str) -> bool:
    return "/c/" in path


def _by_block(offset: int, parts: Sequence[memoryview | int]) -> Iterator[tuple[int, int, list[memoryview | int]]]:
    """Block, first byte in it, and the pieces of the parts that lie in it."""
    block, start, pieces = offset // BLOCK_BYTES, offset % BLOCK_BYTES, []
    room = BLOCK_BYTES - start
    for part in parts:
        while (length := part if isinstance(part, int) else len(part)) > room:
            pieces.append(room if isinstance(part, int) else part[:room])
            part = part - room if isinstance(part, int) else part[room:]
            yield block, start, pieces
            block, start, pieces, room = block + 1, 0, [], BLOCK_BYTES
        pieces.append(part)
        room -= length
    if pieces:
        yield block, start, pieces
