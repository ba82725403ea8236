"""ObjectStore: the protocol of everything that holds a store's objects."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, TypeAlias

import numpy as np

PARTIAL_SUFFIX = ".partial"
Buffer: TypeAlias = bytes | memoryview | np.ndarray


class SupportsDescriptor(Protocol):
    """An open file; stays open as long as something refers to it."""

    descriptor: int


class ObjectStore(Protocol):
    """Objects by path below one root. Paths are relative, with ``/`` between components.

    A missing object is a FileNotFoundError in every backend; a network or service that failed is a
    ResourceError. Instances are used from many threads, survive pickling, and open what they need lazily in the
    process that uses them.

    Attributes:
        url: Where the root is.
        lists: Whether list and sizes work; web servers cannot.
        in_flight: Reads to keep in flight at the same time.
        gap_bytes: Two ranges of an object this far apart are cheaper read in one request than in two.
        request_bytes: Largest useful request, in bytes. A reader's transport holds at most
            ``in_flight * request_bytes``.
        bytes_per_thread: Bytes that justify another request in flight.
    """

    url: str
    lists: bool
    in_flight: int
    gap_bytes: int
    request_bytes: int
    bytes_per_thread: int

    def get(self, path: str) -> np.ndarray:
        """A whole object, uint8."""
        ...

    def get_range(self, path: str, offset: int, length: int) -> np.ndarray:
        """Bytes of an object from an offset, uint8; fewer than length, or none, where the object ends before."""
        ...

    def read_into(self, path: str, offset: int, parts: Sequence[memoryview | int], *, wait: bool = True) -> bool:
        """Read consecutive bytes, each part into its own memory; a number is a count of bytes to skip.

        Args:
            path: The object.
            offset: Where to begin.
            parts: Memory to fill, in order.
            wait: False only takes what is in memory already.

        Returns:
            Whether it was read; always true when it may wait.

        Raises:
            EOFError: The object ends before the last part is full.
        """
        ...

    def opened(self, path: str) -> "SupportsDescriptor | None":
        """The file of an object, if there is one and it is open already."""
        ...

    def size(self, path: str) -> int:
        """Bytes of an object."""
        ...

    def list(self, prefix: str = "") -> list[str]:
        """Paths of all objects that start with a prefix, sorted; a folder prefix ends with ``/``."""
        ...

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Bytes of every object that list gives, by path."""
        ...

    def put(self, path: str, payload: Buffer | Iterable[Buffer], *, new: bool = False) -> None:
        """Write an object, whole under its name or not at all; several buffers are written one after the other.

        Args:
            path: Its path.
            payload: Its bytes; where an iterator gives something other than a buffer, no object is left.
            new: Only if there is none yet, decided atomically.

        Raises:
            FileExistsError: new, and there is one.
        """
        ...

    def sync(self, paths: Sequence[str]) -> None:
        """Make the names of written objects durable; once for many objects, after their put."""
        ...

    def delete(self, path: str) -> None:
        """Remove an object."""
        ...

    def forget(self, path: str) -> None:
        """Drop what is kept of an object between reads, such as an open file: the object may have been replaced."""
        ...


def buffers_of(payload: Buffer | Iterable[Buffer]) -> Iterator[memoryview]:
    """A payload as flat byte views."""
    parts = [payload] if isinstance(payload, bytes | memoryview | np.ndarray) else payload
    return (memoryview(part).cast("B") for part in parts if memoryview(part).nbytes)


def scatter(payload: np.ndarray, offset: int, parts: Sequence[memoryview | int]) -> None:
    """Copy bytes read from an offset into the parts of a read_into.

    Raises:
        EOFError: There are fewer bytes than the parts take.
    """
    raw, done = memoryview(payload), 0
    for part in parts:
        end = done + (part if isinstance(part, int) else len(part))
        if end > len(raw):
            raise EOFError(f"it ends at byte {offset + len(raw)}")
        if not isinstance(part, int):
            part[:] = raw[done:end]
        done = end
