"""A served store's objects, read only."""

import re
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from functools import partial
from http import HTTPStatus
from typing import TypeVar
from urllib.parse import quote

import numpy as np

from feature_store.backends.base import Buffer, scatter
from feature_store.backends.credentials import SERVED
from feature_store.client.service import ServiceClient, content_length
from feature_store.client.transport import Response
from feature_store.errors import InputError, WireError

T = TypeVar("T")

_ABSENT = (HTTPStatus.NOT_FOUND, HTTPStatus.GONE)  # never there, or committed and lost
_MOST_OF_A_PROBLEM = 1 << 16
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})")
_PAST_END = HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE


class _Missing(Enum):
    OBJECT = "object"
    RANGE = "range"


class ServedObjects:
    """Objects below ``/v1/zarr``, see ``feature_store.backends.base.ObjectStore``.

    Connections are each process's own: forked workers may read what their parent has read.
    """

    lists = False
    in_flight = 8
    gap_bytes = 1 << 20
    request_bytes = 16 << 20
    bytes_per_thread = 1 << 20

    def __init__(self, service: ServiceClient) -> None:
        self.service, self.url = service, f"{service.url}{SERVED}"

    def __reduce__(self):
        return ServedObjects, (self.service,)

    def get(self, path: str) -> np.ndarray:
        """See ObjectStore.get."""
        whole = self._ask("GET", path, _body)
        assert isinstance(whole, np.ndarray)  # a whole object has no range to miss
        return whole

    def get_range(self, path: str, offset: int, length: int) -> np.ndarray:
        """See ObjectStore.get_range."""
        span = (offset, length)
        found = self._ask("GET", path, partial(_part, span), span) if length > 0 else _Missing.RANGE
        return np.empty(0, np.uint8) if isinstance(found, _Missing) else found

    def read_into(self, path: str, offset: int, parts: Sequence[memoryview | int], *, wait: bool = True) -> bool:
        """See ObjectStore.read_into; nothing is in memory already."""
        if not wait:
            return False
        wanted = sum(part if isinstance(part, int) else len(part) for part in parts)
        scatter(self.get_range(path, offset, wanted), offset, parts)
        return True

    def opened(self, path: str) -> None:
        """See ObjectStore.opened: there are no files."""

    def size(self, path: str) -> int:
        """See ObjectStore.size."""
        found = self._ask("HEAD", path, content_length)
        assert isinstance(found, int)  # a whole object has no range to miss
        return found

    def list(self, prefix: str = "") -> list[str]:
        """See ObjectStore.list.

        Raises:
            InputError: Always: a service does not list.
        """
        raise self._unable("list")

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """See ObjectStore.sizes.

        Raises:
            InputError: Always: a service does not list.
        """
        raise self._unable("list")

    def put(self, path: str, payload: Buffer | Iterable[Buffer], *, new: bool = False) -> None:
        """See ObjectStore.put.

        Raises:
            InputError: Always: a service is read only.
        """
        raise self._unable("write")

    def sync(self, paths: Sequence[str]) -> None:
        """See ObjectStore.sync: nothing is written."""

    def delete(self, path: str) -> None:
        """See ObjectStore.delete.

        Raises:
            InputError: Always: a service is read only.
        """
        raise self._unable("delete")

    def forget(self, path: str) -> None:
        """See ObjectStore.forget: nothing is kept."""

    def _unable(self, what: str) -> InputError:
        return InputError(f"cannot {what} objects of {self.url}: it is served read only; use the store's own path")

    def _ask(
        self, method: str, path: str, read: Callable[[Response], T], span: tuple[int, int] | None = None
    ) -> T | _Missing:
        """Result of read for an object, or for (offset, length) of it; a sentinel if the range starts after its end.

        Raises:
            FileNotFoundError: There is no such object.
        """
        good = HTTPStatus.OK if span is None else HTTPStatus.PARTIAL_CONTENT
        headers = {} if span is None else {"Range": f"bytes={span[0]}-{span[0] + span[1] - 1}"}

        def found_or_not(answer: Response) -> T | _Missing:
            if answer.status == good:
                return read(answer)
            answer.read(_MOST_OF_A_PROBLEM)
            return _Missing.OBJECT if answer.status in _ABSENT else _Missing.RANGE

        statuses = (good, *_ABSENT, *(() if span is None else (_PAST_END,)))
        found = self.service.call(method, f"{SERVED}/{quote(path)}", found_or_not, headers=headers, good=statuses)
        if found is _Missing.OBJECT:
            raise FileNotFoundError(f"{self.url}/{path} does not exist")
        return found


def _part(span: tuple[int, int], answer: Response) -> np.ndarray:
    """The bytes of (offset, length), fewer if the object ends before.

    Raises:
        WireError: They are others than those asked for.
    """
    first, length = span
    given = answer.getheader("content-range", "")
    found = _CONTENT_RANGE.fullmatch(given)
    begin, last, whole = map(int, found.groups()) if found else (-1, -1, 0)
    if begin != first or last != min(first + length, whole) - 1 or content_length(answer) != last - first + 1:
        raise WireError(
            f"asked for bytes {first}-{first + length - 1} of an object and got {given[:80]!r}; is this the service?"
        )
    return _body(answer)


def _body(answer: Response) -> np.ndarray:
    payload = np.empty(content_length(answer), np.uint8)
    memory, done = memoryview(payload), 0
    while done < len(memory):
        got = answer.readinto(memory[done:])
        if not got:
            raise WireError(f"an object's body ended {len(memory) - done} bytes early; retry")
        done += got
    return payload
