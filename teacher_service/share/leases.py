"""Leases: which process of a cache job computes which unit."""

import itertools
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, cast

from feature_store.backends.base import ObjectStore
from feature_store.backends.bucket import RemoteObjects, Version
from feature_store.backends.local import LocalObjects
from feature_store.commits.locks import FOLDER, lock_name, locked
from feature_store.errors import ResourceError

LEASE_SECONDS = 120.0
HEARTBEATS = 4  # renewals per lease time: three in a row may be late
_MAX_POLL_SECONDS = 5.0
_PREFIX = "lease-"
_logger = logging.getLogger(__name__)


class Leases(Protocol):
    """The units one process computes; a context manager, leaving it releases all of them.

    A lease saves work and decides nothing: commit records are create-only, so of two processes that compute the same
    unit the first to commit counts and the other gets a CommittedError. Any thread may call any method.

    Attributes:
        poll_seconds: Seconds until a unit that another process holds is tried again.
        takeover: When a dead process's unit can be taken, in words.
    """

    poll_seconds: float
    takeover: str

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def take(self, unit: int | None) -> bool:
        """Lease a unit, or for None the store's metadata; False if another process, or this object, holds it.

        Raises:
            ResourceError: The bucket cannot be reached.
        """
        ...

    def release(self, unit: int | None) -> None:
        """Give a unit back, committed or not; does nothing if this object does not hold it."""
        ...

    def held(self) -> frozenset[int | None]:
        """Units this object holds, as far as it knows."""
        ...

    def sweep(self) -> None:
        """Remove lease files that dead processes left."""
        ...


def open_leases(objects: ObjectStore, lease_seconds: float) -> Leases:
    """Leases of a store's units: file locks in a local store, leased objects in a bucket.

    Args:
        objects: The store's.
        lease_seconds: Seconds without a heartbeat after which a bucket's lease counts as a dead process's.
    """
    if isinstance(objects, LocalObjects):
        return FileLeases(objects.root / FOLDER)
    return BucketLeases(cast(RemoteObjects, objects), lease_seconds)


class FileLeases:
    """Leases by file lock; the kernel releases those of a dead process at once.

    On a file system without locks they hold among processes of one machine, see ``feature_store.commits.locks``.

    Args:
        folder: Where the lock files are.
    """

    poll_seconds = 0.5
    takeover = "at once when its process dies"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: dict[int | None, ExitStack] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for unit in self.held():
            self.release(unit)

    def take(self, unit: int | None) -> bool:
        """See Leases.take."""
        stack = ExitStack()
        try:
            stack.enter_context(locked(self._folder / _name(unit), "leased"))
        except ResourceError:
            return False
        self._held[unit] = stack
        return True

    def release(self, unit: int | None) -> None:
        """See Leases.release."""
        if (stack := self._held.pop(unit, None)) is not None:
            stack.close()

    def held(self) -> frozenset[int | None]:
        """See Leases.held."""
        return frozenset(self._held)

    def sweep(self) -> None:
        """See Leases.sweep."""
        for path in self._folder.glob(f"{_PREFIX}*"):
            with suppress(ResourceError), locked(path, "leased"):
                pass


class BucketLeases:
    """Leases by conditional put: ``.locks/lease-u<unit>`` in the store, rewritten at every heartbeat.

    No two machines' clocks are compared: a lease is dead when one observer has seen the same version of it for the
    lease time its holder wrote into it, by the observer's own monotonic clock. Put in the place of that version, it is
    taken over, by one observer only. A holder that lost its lease (it was suspended, or cut off) notices at its next
    heartbeat; of two results, the first commit record counts.

    Args:
        objects: The store's.
        lease_seconds: The lease time of units taken here.
        clock: Seconds that never go back.
    """

    def __init__(
        self, objects: RemoteObjects, lease_seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.poll_seconds = min(_MAX_POLL_SECONDS, lease_seconds / HEARTBEATS)
        self.takeover = f"{lease_seconds:g} s after its process dies"
        self._objects, self._seconds, self._clock = objects, lease_seconds, clock
        self._holder = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex}"
        self._writes = itertools.count()
        self._held: dict[int | None, Version] = {}
        self._seen: dict[int | None, tuple[Version, float]] = {}  # others' leases, and when this version was first seen
        self._lock = threading.Lock()
        self._left = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="lease-heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        self._heart.join()
        with suppress(ResourceError), self._lock:  # those of a bucket that cannot be reached expire
            while self._held:
                self._delete(*self._held.popitem())

    def take(self, unit: int | None) -> bool:
        """See Leases.take."""
        with self._lock:
            if unit in self._held:
                return False
            there = self._read(unit)
            if there is not None and not self._is_dead(unit, *there):
                return False
            version = self._write(unit, None if there is None else there[1])
            if version is None:
                return False
            self._seen.pop(unit, None)
            self._held[unit] = version
            return True

    def renew(self) -> None:
        """Write every lease again; those that another process took over are no longer held."""
        for unit in self.held():
            with self._lock, suppress(ResourceError):  # not reached: the lease lasts for some more heartbeats
                if unit not in self._held:
                    continue
                version = self._write(unit, self._held[unit])
                if version is None:
                    del self._held[unit]
                    _logger.warning("the lease of %s was taken over: no heartbeat of this process arrived in time; the "
                                    "first commit counts", lock_name(unit))  # fmt: skip
                else:
                    self._held[unit] = version

    def release(self, unit: int | None) -> None:
        """See Leases.release."""
        with self._lock, suppress(ResourceError):
            if (version := self._held.pop(unit, None)) is not None:
                self._delete(unit, version)

    def held(self) -> frozenset[int | None]:
        """See Leases.held."""
        with self._lock:
            return frozenset(self._held)

    def sweep(self) -> None:
        """See Leases.sweep: nothing tells a dead process's lease at once, and it does no harm."""

    def _beat(self) -> None:
        while not self._left.wait(self._seconds / HEARTBEATS):
            self.renew()

    def _is_dead(self, unit: int | None, content: bytes, version: Version) -> bool:
        now = self._clock()
        seen, since = self._seen.get(unit, (None, now))
        self._seen[unit] = version, since if version == seen else now
        return version == seen and now - since >= _lease_seconds(content, self._seconds)

    def _read(self, unit: int | None) -> tuple[bytes, Version] | None:
        try:
            return self._objects.get_version(FOLDER + _name(unit))
        except FileNotFoundError:
            return None

    def _write(self, unit: int | None, replaces: Version | None) -> Version | None:
        """The new version; None if another process was first."""
        lease = {"holder": self._holder, "write": next(self._writes), "lease_seconds": self._seconds}
        content = json.dumps(lease).encode()
        try:
            return self._objects.put_version(FOLDER + _name(unit), content, replaces)
        except FileExistsError:
            there = self._read(unit)  # a put whose response was lost is tried again, and refused
            return there[1] if there is not None and there[0] == content else None

    def _delete(self, unit: int | None, version: Version) -> None:
        with suppress(FileNotFoundError):
            if (there := self._read(unit)) is not None and there[1] == version:
                self._objects.delete(FOLDER + _name(unit))


def _name(unit: int | None) -> str:
    return f"{_PREFIX}{lock_name(unit)}"


def _lease_seconds(content: bytes, default: float) -> float:
    """Seconds within which a lease's holder renews it."""
    try:
        return float(json.loads(content)["lease_seconds"])
    except (ValueError, KeyError, TypeError):
        return default
