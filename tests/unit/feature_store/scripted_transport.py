"""A transport without a socket: answers by function, and a record of what was asked."""

import io
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from feature_store.client import frames


class Asked(NamedTuple):
    method: str
    target: str
    headers: dict[str, str]
    body: bytes
    timeout: float


@dataclass
class Answered:
    """An answer; ``breaks`` cuts its body after so many bytes by a lost connection."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    breaks: int | None = None

    def __post_init__(self) -> None:
        self._stream = io.BytesIO(self.body)

    def getheader(self, name: str, default: str) -> str:
        return {"content-length": str(len(self.body)), **self.headers}.get(name.lower(), default)

    def readinto(self, memory: memoryview) -> int:
        return self._stream.readinto(memory[: self._left(len(memory))])

    def read(self, amount: int) -> bytes:
        return self._stream.read(self._left(amount))

    def _left(self, amount: int) -> int:
        if self.breaks is None:
            return amount
        if self._stream.tell() >= self.breaks:
            raise ConnectionResetError("reset by peer")
        return min(amount, self.breaks - self._stream.tell())


class ScriptedTransport:
    """Answers with what a function makes of each request; an exception it returns is raised."""

    url = "http://service"

    def __init__(self, answer: Callable[[Asked], Answered | Exception]) -> None:
        self._answer = answer
        self.asked: list[Asked] = []

    @contextmanager
    def send(self, method, target, headers, body, timeout):
        whole = body if isinstance(body, bytes) else b"".join(body)
        self.asked.append(Asked(method, target, dict(headers), whole, timeout))
        found = self._answer(self.asked[-1])
        if isinstance(found, Exception):
            raise found
        yield replace(found)


def in_turn(*answers: Answered | Exception) -> Callable[[Asked], Answered | Exception]:
    """One answer after the other, whatever is asked."""
    left = iter(answers)
    return lambda asked: next(left)


def frame_of(arrays, **metadata: str) -> bytes:
    return b"".join(frames.encode(arrays, metadata).chunks())
