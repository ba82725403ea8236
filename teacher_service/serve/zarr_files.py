"""The store's committed objects by path, as files of a web server."""

import errno
import hashlib
import os
import re
import stat
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

from feature_store.backends.base import ObjectStore
from feature_store.backends.local import LocalObjects
from feature_store.commits import index as commit_index
from feature_store.commits.record import CommitRecord, parse_record_path
from feature_store.commits.root import ROOT
from feature_store.errors import InputError, ResourceError, UncommittedError
from feature_store.format.arrays import ArraySpec
from feature_store.format.checksums import CRC_BYTES, damaged
from feature_store.format.layout import BLOCKS
from teacher_service.serve.problems import Problem
from teacher_service.serve.service import StoreSnapshot, whereabouts

_PATH = re.compile(r"[A-Za-z0-9_.+-]{1,255}(/[A-Za-z0-9_.+-]{1,255}){0,15}")
_METADATA = "zarr.json"
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)  # ELOOP: a symbolic link


@dataclass(frozen=True)
class ServedObject:
    """One object.

    Attributes:
        size: Its bytes.
        etag: A strong tag: the same bytes, the same tag, wherever the store lies.
        read: Fills memory with the bytes from an offset on.
        close: Releases it.
    """

    size: int
    etag: str
    read: Callable[[int, memoryview], None]
    close: Callable[[], None] = lambda: None


def find_object(opened: StoreSnapshot, path: str) -> ServedObject:
    """An object of the store.

    Raises:
        Problem: not-found, if it is no committed object's path; object-missing, if it should be there.
        CorruptStoreError: It has another length than its commit record says.
    """
    if not _PATH.fullmatch(path) or any(part in (".", "..") for part in path.split("/")):
        raise _not_found()
    if path in (ROOT, commit_index.PATH):  # megabytes for many tars, and the same for all who ask
        return _in_memory(opened.state[0] if path == ROOT else opened.commit_index)
    if path.rpartition("/")[2] == _METADATA or parse_record_path(path) is not None:
        with closing(_open(opened.store.objects, path, missing=_not_found)) as file:
            return _in_memory(file.whole())
    return _block(opened, path) if path.startswith(BLOCKS) else _committed(opened, path)


def _block(opened: StoreSnapshot, path: str) -> ServedObject:
    """A tensor of the later blocks; its last bytes are the checksum of all."""
    file = _open(opened.store.objects, path, missing=_not_found)
    checksum = bytearray(min(CRC_BYTES, file.size))
    try:
        file.read_into(file.size - len(checksum), memoryview(checksum))
    except BaseException:
        file.close()
        raise
    tag = _quoted(repr((opened.store.manifest.blocks_sha256, path, file.size, bytes(checksum))).encode())
    return ServedObject(file.size, tag, file.read_into, file.close)


def _committed(opened: StoreSnapshot, path: str) -> ServedObject:
    """An object of a unit; one without a commit record does not exist for clients, even while it is being written."""
    address = opened.store.layout.address(path)
    if address is None:
        raise _not_found()
    spec, unit, view = address
    try:
        views = opened.store.committed.views(unit)
        record = opened.store.committed.record(unit, min(views, default=0) if view is None else view)
    except (UncommittedError, InputError) as error:
        raise _not_found() from error
    proof = record.proof(path)
    file = _open(opened.store.objects, path, missing=lambda: _missing(path))
    if file.size != proof.bytes:
        file.close()
        raise damaged(path, f"it has {file.size} bytes, its commit record says {proof.bytes}")
    return ServedObject(file.size, _tag(opened, spec, record, path, view), file.read_into, file.close)


def _tag(opened: StoreSnapshot, spec: ArraySpec, record: CommitRecord, path: str, view: int | None) -> str:
    """From checksums that cover every byte: a shard's own covers its index only, the table beside it the rows."""
    paths = [path, spec.checksums.object_path(record.unit, view)] if spec.sharded else [path]
    proofs = [(each, record.proof(each).bytes, record.proof(each).crc32c) for each in paths]
    return _quoted(repr((opened.store.manifest.identity(), proofs)).encode())


def _in_memory(payload: bytes) -> ServedObject:
    raw = memoryview(payload)

    def read(offset: int, memory: memoryview) -> None:
        memory[:] = raw[offset : offset + len(memory)]

    return ServedObject(len(payload), _quoted(payload), read)


def _quoted(text: bytes) -> str:
    return f'"{hashlib.sha256(text).hexdigest()[:32]}"'


def _not_found() -> Problem:
    return Problem("not-found", "the store has no committed object of this path")


def _missing(path: str) -> Problem:
    # Never 404: zarr clients take that for a chunk of fill values, and continue with wrong numbers.
    return Problem("object-missing", f"{path} is committed and missing; run `feature-store verify`, then `repair`")


class _LocalFile:
    """A regular file below a folder, reached through real folders only: no symbolic link is followed."""

    def __init__(self, root: os.PathLike[str], path: str) -> None:
        *folders, name = path.split("/")
        above = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for folder in folders:
                below = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)
                os.close(above)
                above = below
            self._descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=above)
        finally:
            os.close(above)
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(self._descriptor)
            raise FileNotFoundError(errno.ENOENT, "not a regular file")
        self.size = status.st_size

    def read_into(self, offset: int, memory: memoryview) -> None:
        while memory:
            got = os.preadv(self._descriptor, [memory], offset)
            if not got:
                raise EOFError(f"the object ends at byte {offset}")
            offset, memory = offset + got, memory[got:]

    def whole(self) -> bytes:
        memory = bytearray(self.size)
        self.read_into(0, memoryview(memory))
        return bytes(memory)

    def close(self) -> None:
        os.close(self._descriptor)


class _RemoteObject:
    """An object of a bucket."""

    def __init__(self, objects: ObjectStore, path: str) -> None:
        self._objects, self._path = objects, path
        self.size = objects.size(path)

    def read_into(self, offset: int, memory: memoryview) -> None:
        self._objects.read_into(self._path, offset, [memory])

    def whole(self) -> bytes:
        return self._objects.get(self._path).tobytes()

    def close(self) -> None:
        pass


def _open(objects: ObjectStore, path: str, missing: Callable[[], Problem]) -> _LocalFile | _RemoteObject:
    try:
        return _LocalFile(objects.root, path) if isinstance(objects, LocalObjects) else _RemoteObject(objects, path)
    except OSError as error:
        if error.errno in _NOT_THERE:
            away = whereabouts(objects)
            raise (Problem("not-ready", away) if away else missing()) from error
        raise ResourceError(f"cannot open {path}: {os.strerror(error.errno or 0)}; check the service's disk") from error
