"""HTTP/1.1 connections kept open, bodies read into the caller's memory.

``http.client`` because its ``readinto`` fills memory that is given: urllib3, httpx and requests read a body into memory
of their own first, which costs as much CPU as receiving it.
"""

import http.client
import io
import socket
import ssl
import sys
import time
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from multiprocessing.connection import wait
from typing import Protocol, TypeAlias
from urllib.parse import urlsplit

from feature_store.errors import InputError
from feature_store.processes import PerProcess

Body: TypeAlias = bytes | Sequence[bytes | memoryview]

LOST = (OSError, http.client.HTTPException)
"""Errors of a transport whose connection cannot be made or breaks."""
SLOWEST = 64 << 10
"""Bytes a second below which a body counts as stalled, although single bytes arrive."""
_BULK_BYTES = 64 << 10  # memory of at least this size is filled by one system call


class Response(Protocol):
    """A response; its body can be read once.

    Attributes:
        status: HTTP status.
    """

    status: int

    def getheader(self, name: str, default: str, /) -> str:
        """A header by name; case does not matter."""
        ...

    def readinto(self, memory: memoryview, /) -> int:
        """Fill some of the memory; how many bytes, 0 at the body's end."""
        ...

    def read(self, amount: int, /) -> bytes:
        """Up to a number of bytes of the body."""
        ...


class Transport(Protocol):
    """Sends requests to one server. Used from many threads, pickled, and used again in forked processes."""

    url: str

    def send(
        self, method: str, target: str, headers: Mapping[str, str], body: Body, timeout: float
    ) -> AbstractContextManager[Response]:
        """One request; the answer is good until the context ends.

        Args:
            method: HTTP method.
            target: Path and query.
            headers: Beside Host and Content-Length.
            body: Bytes, or buffers sent one after the other.
            timeout: Seconds without a byte after which the connection counts as lost, and that all headers may take;
                a body may be as many seconds behind SLOWEST.

        Raises:
            OSError, http.client.HTTPException: The connection could not be made, or broke.
        """
        ...


class _Paced(io.RawIOBase):
    """Bytes that a socket receives, with a minimum rate: a peer cannot hold a reader by single bytes.

    Args:
        raw: The socket's file.
        sock: The socket, for its timeout.
    """

    def __init__(self, raw: io.RawIOBase, sock: socket.socket) -> None:
        self._raw, self._sock = raw, sock
        self._timeout = self._set = sock.gettimeout() or 0.0
        self._end = time.monotonic() + self._timeout
        self._least = 1
        self.in_body = self.ended = False

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, memory) -> int | None:
        """See RawIOBase.readinto.

        Raises:
            TimeoutError: Too little came in time.
        """
        if self.ended:
            return 0
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"the answer comes too slowly, less than {SLOWEST:,} bytes a second")
        remaining = min(self._timeout, left)
        if remaining != self._set:  # a system call, which a body that comes fast never needs
            self._sock.settimeout(remaining)
            self._set = remaining
        if self.in_body:
            # Half of what the slowest body brings in time; sleeping until then halves the cost of a fast one.
            least = min(len(memory), int(remaining * SLOWEST / 2))
            self._least = _wake_at(self._sock, least if least >= _BULK_BYTES else 1, self._least)
        got = self._sock.recv_into(memory)
        if self.in_body:  # not for headers: a flood of them would earn its own time
            self._end += got / SLOWEST
        return got

    def close(self) -> None:
        """Close the socket's file too."""
        self._raw.close()
        super().close()


class _Buffered(io.BufferedReader):
    """A reader that says, once it is closed, whether more had come than was read."""

    def __init__(self, raw: _Paced) -> None:
        super().__init__(raw)
        self._paced, self.left_over = raw, False

    def close(self) -> None:
        if not self.closed:
            self._paced.ended = True  # looking into the buffer shall not wait for more
            self.left_over = bool(self.peek(1))
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args, **kwargs) -> None:
        super().__init__(sock, *args, **kwargs)
        self._paced = _Paced(self.fp.detach(), sock)
        self.fp = self._buffer = _Buffered(self._paced)

    @property
    def left_over(self) -> bool:
        """Whether unexpected bytes followed the body."""
        return self._buffer.left_over

    def begin(self) -> None:
        """Read status and headers."""
        super().begin()
        self._paced.in_body = True


class _Idle:
    """Open connections not in use; closed with this object, in a forked process without telling the server."""

    def __init__(self) -> None:
        self.connections: deque[http.client.HTTPConnection] = deque()
        # Not __del__: of garbage in a cycle, the sockets could go first, and warn that they were not closed.
        weakref.finalize(self, _close, self.connections)


def _wake_at(sock: socket.socket, least: int, before: int) -> int:
    """Let a read wait for a number of bytes or the end, unless it does (``before``); TLS takes bytes as they come."""
    # Linux keeps it below what the receive buffer can hold.
    if least != before and sys.platform == "linux" and not isinstance(sock, ssl.SSLSocket):
        with suppress(OSError):  # not every emulation has it
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, least)
    return least


def _pending(sock: socket.socket) -> int:
    """Bytes that TLS has taken from the socket already."""
    return sock.pending() if isinstance(sock, ssl.SSLSocket) else 0


def _close(connections: "deque[http.client.HTTPConnection]") -> None:
    for connection in connections:
        connection.close()


class HttpTransport:
    """Connections to one server, used again; each process has its own.

    Args:
        url: ``http://host:port`` or ``https://...``, with a path if the service is below one.
        cafile: Certificates to trust, in a PEM file; None for the system's.

    Raises:
        InputError: The URL names no web server, or holds a user name.
    """

    def __init__(self, url: str, *, cafile: str | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
            raise InputError(
                f"cannot reach {url!r}: expected http://host:port or https://host:port; see docs/how-to/http.md"
            )
        self.url, self._cafile = url.rstrip("/"), cafile
        self._prefix = parts.path.rstrip("/")
        self._idle: PerProcess[_Idle] = PerProcess(_Idle)

    def __reduce__(self):
        return partial(HttpTransport, cafile=self._cafile), (self.url,)

    @contextmanager
    def send(
        self, method: str, target: str, headers: Mapping[str, str], body: Body, timeout: float
    ) -> Iterator[http.client.HTTPResponse]:
        """See Transport.send."""
        idle = self._idle()
        connection = self._connection(idle, timeout)
        answer, done = None, False
        try:
            answer = self._ask(connection, method, target, headers, body)
            yield answer
            # Read to the end, with nothing after it, and the server keeps it open.
            done = answer.isclosed() and not answer.will_close and not getattr(answer, "left_over", False)
        finally:
            if done:
                idle.connections.append(connection)
            else:
                connection.close()
                if answer is not None:  # one that ends its connection has the socket to itself
                    answer.close()

    def _connection(self, idle: _Idle, timeout: float) -> http.client.HTTPConnection:
        while True:
            try:
                connection = idle.connections.pop()
            except IndexError:
                return self._new_connection(timeout)
            if connection.sock is not None:
                _wake_at(connection.sock, 1, 0)
            # Readable while nothing was asked: the server has closed it, or says something that is no answer to us.
            if connection.sock is not None and not wait([connection.sock], 0) and not _pending(connection.sock):
                connection.sock.settimeout(timeout)
                return connection
            connection.close()

    def _new_connection(self, timeout: float) -> http.client.HTTPConnection:
        parts = urlsplit(self.url)
        assert parts.hostname is not None  # __init__ saw to it
        if parts.scheme == "http":
            connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout)
        else:
            context = ssl.create_default_context(cafile=self._cafile)
            connection = http.client.HTTPSConnection(parts.hostname, parts.port, timeout=timeout, context=context)
        connection.response_class = _Response
        return connection

    def _ask(
        self, connection: http.client.HTTPConnection, method: str, target: str, headers: Mapping[str, str], body: Body
    ) -> http.client.HTTPResponse:
        parts = [body] if isinstance(body, bytes) else body
        length = {"Content-Length": str(sum(map(len, parts)))} if method == "POST" else {}
        try:
            connection.request(
                method, self._prefix + target, body=parts if length else None, headers={**headers, **length}
            )
        except (BrokenPipeError, ConnectionResetError) as broken:
            # A server that refuses a body may close the connection while it is sent; its answer is there to be read.
            try:
                answer = connection.getresponse()
            except LOST:
                raise broken from None
            answer.will_close = True  # half a request is on this connection: it cannot take another
            return answer
        return connection.getresponse()
