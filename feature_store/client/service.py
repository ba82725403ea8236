"""Calls to the HTTP service, with retries."""

import email.utils
import json
import random
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any, TypeVar

import numpy as np

from feature_store.backends.credentials import TOKEN_VARIABLE
from feature_store.client import frames
from feature_store.client.problems import RETRIED_STATUSES, error_class
from feature_store.client.transport import LOST, Body, HttpTransport, Response, Transport
from feature_store.errors import InputError, Remedy, ResourceError, UserError, WireError

T = TypeVar("T")

_MAX_TEXT = 16 << 20  # most bytes of a JSON answer
_MAX_BODY = 1 << 34
_MAX_DIGITS = 20  # of a number in a header: Python refuses to read very long ones


@dataclass(frozen=True)
class RetryPolicy:
    """Retries of a call and their pauses.

    Attributes:
        deadline: Seconds for a call with all its tries.
        timeout: Seconds after which a connection counts as lost, see Transport.send.
        first_pause: Seconds before the second try; doubled each time, and drawn between half and all of it.
        longest_pause: Where doubling ends; what a server's Retry-After asks for is waited beside it.
    """

    deadline: float = 120.0
    timeout: float = 30.0
    first_pause: float = 0.1
    longest_pause: float = 10.0

    def pause(self, tries: int) -> float:
        """Seconds before the next try."""
        whole = min(self.longest_pause, self.first_pause * 2 ** (tries - 1))
        return whole * random.uniform(0.5, 1.0)  # jitter: clients must not come back at once


@dataclass(frozen=True)
class ServiceClient:
    """Calls to one server, shared by its clients. Picklable; used from many threads and forked processes.

    Attributes:
        transport: Sender of requests.
        token: Bearer token; shown nowhere.
        retry: Retry policy of calls.
        sleep: Waits a number of seconds.
        clock: Seconds that only grow.
    """

    transport: Transport
    token: str | None = field(default=None, repr=False)
    retry: RetryPolicy = RetryPolicy()
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False)
    clock: Callable[[], float] = field(default=time.monotonic, repr=False)

    @classmethod
    def at(cls, url: str, token: str | None = None, retry: RetryPolicy = RetryPolicy()) -> "ServiceClient":
        """The service behind a URL.

        Raises:
            InputError: The URL names no web server, or the token cannot be one.
        """
        if token is not None and not (token.isascii() and token.isprintable() and token and " " not in token):
            raise InputError("the token holds characters that no bearer token has; check the file or variable it is in")
        return cls(HttpTransport(url), token, retry)

    @property
    def url(self) -> str:
        """Where the service is."""
        return self.transport.url

    def json(self, target: str) -> Any:
        """A JSON answer.

        Raises:
            UserError: See call.
        """
        return self.call("GET", target, _json)

    def frame(
        self,
        method: str,
        target: str,
        body: Body = b"",
        *,
        media_type: str | None = None,
        out: Mapping[str, np.ndarray] | None = None,
        retry_damaged: bool = True,
    ) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """Arrays and strings of a frame, each array straight into its memory and compared with its crc32c.

        Args:
            method: HTTP method.
            target: Path and query.
            body: Of the request.
            media_type: Of the body.
            out: Memory by array, see ``feature_store.client.frames.read_frame``.
            retry_damaged: See call.

        Raises:
            UserError: See call.
        """
        headers = {"Accept": frames.MEDIA_TYPE, **({"Content-Type": media_type} if media_type else {})}
        return self.call(
            method,
            target,
            lambda answer: _frame(answer, out),
            headers=headers,
            body=body,
            retry_damaged=retry_damaged,
        )

    def call(
        self,
        method: str,
        target: str,
        read: Callable[[Response], T],
        *,
        headers: Mapping[str, str] | None = None,
        body: Body = b"",
        retry_damaged: bool = True,
        good: Collection[int] = (200, 206),
    ) -> T:
        """Result of read for a response of good status. Every call may be repeated: none has side effects.

        Args:
            method: HTTP method.
            target: Path and query.
            read: Called with the answer.
            headers: Of the request.
            body: Of the request.
            retry_damaged: Whether a damaged response is asked for again; otherwise its WireError is raised at once.
            good: Statuses that read takes.

        Raises:
            InputError: The service refuses the request, or the token.
            UncommittedError, QuarantinedError, CorruptStoreError: About rows or objects asked for.
            ResourceError: The service was busy or out of reach until the deadline.
            WireError: Its responses stayed damaged until then, or the first one was and retry_damaged is False.
        """
        end = self.clock() + self.retry.deadline
        for tries in count(1):
            try:
                timeout = max(0.001, min(self.retry.timeout, end - self.clock()))
                with self._answer(method, target, headers or {}, body, timeout) as answer:
                    if answer.status in good:
                        return read(answer)
                    error, asked = self._refusal(method, target, answer)
                    if answer.status not in RETRIED_STATUSES:
                        raise error
            except (*LOST, WireError) as lost:
                if isinstance(lost, WireError) and not retry_damaged:
                    raise
                error, asked = self._lost(method, target, lost), 0.0
            pause = asked + self.retry.pause(tries)  # jittered: many clients get the same Retry-After
            if self.clock() + pause >= end:
                raise _given_up(error, tries, self.retry.deadline)
            self.sleep(pause)
        raise AssertionError("unreachable")

    @contextmanager
    def _answer(
        self, method: str, target: str, headers: Mapping[str, str], body: Body, timeout: float
    ) -> Iterator[Response]:
        authorization = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        with self.transport.send(method, target, {**headers, **authorization}, body, timeout) as answer:
            yield answer

    def _refusal(self, method: str, target: str, answer: Response) -> tuple[UserError, float]:
        """The service's problem as an error, and the seconds it asks to wait."""
        problem = _problem(answer)
        detail = problem.get("detail") or f"{method} {self.url}{target} was answered with status {answer.status}"
        if answer.status in (401, 403):
            reason = detail.partition(";")[0]  # what follows is for whoever asks without this client
            remedy = f"set {TOKEN_VARIABLE} to a token that it accepts"
            return InputError(f"{self.url} refuses: {reason}; {remedy}", remedy=Remedy.TOKEN), 0.0
        error = error_class(str(problem.get("type", "")), answer.status)
        return error(f"{self.url}: {detail}"), _retry_after(answer)

    def _lost(self, method: str, target: str, cause: BaseException) -> UserError:
        if isinstance(cause, WireError):
            return cause
        reason = str(cause) or type(cause).__name__
        return ResourceError(f"{method} {self.url}{target}: the connection failed ({reason}); is the service running?")


def at_once(requests: Sequence[Callable[[], T]], most: int) -> list[T]:
    """Results of functions without arguments, a limited number at a time."""
    if len(requests) < 2:
        return [request() for request in requests]
    with ThreadPoolExecutor(min(most, len(requests)), thread_name_prefix="feature-store-http") as pool:
        return list(pool.map(lambda request: request(), requests))


def _given_up(error: UserError, tries: int, deadline: float) -> UserError:
    return type(error)(f"{error} (failed after {tries} tries within {deadline:g} s)")


def _frame(answer: Response, out: Mapping[str, np.ndarray] | None) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    return frames.read_frame(answer.readinto, content_length(answer), out)


def content_length(answer: Response) -> int:
    """Bytes of its body.

    Raises:
        WireError: It does not say, or claims what no object or frame has.
    """
    length = answer.getheader("content-length", "")
    if not (length.isascii() and length.isdecimal() and len(length) < _MAX_DIGITS and int(length) <= _MAX_BODY):
        raise WireError(
            f"the answer has Content-Length {length[:_MAX_DIGITS]!r}, expected its bytes; is this the service?"
        )
    return int(length)


def _json(answer: Response) -> Any:
    try:
        return json.loads(_text(answer))
    except (ValueError, RecursionError) as error:
        raise WireError("the answer is not JSON; is this the service?") from error


def _text(answer: Response) -> bytes:
    """A whole short body."""
    text = answer.read(_MAX_TEXT + 1)
    if len(text) > _MAX_TEXT:
        raise WireError(f"the answer has more than {_MAX_TEXT:,} bytes; is this the service?")
    return text


def _problem(answer: Response) -> dict[str, Any]:
    try:
        found = json.loads(_text(answer))
    except (ValueError, WireError, RecursionError):  # something in between answered
        return {}
    return found if isinstance(found, dict) else {}


def _retry_after(answer: Response) -> float:
    """Seconds a Retry-After asks for, given as a number or a date; 0 without one."""
    given = answer.getheader("retry-after", "")
    if given.isdecimal():
        return float(given)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(given).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0
