"""uvicorn's HTTP protocol with the limits it lacks: how long headers may be, and how long they may take."""

from asyncio import TimerHandle, Transport
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from teacher_service.serving.config import Limits
from teacher_service.serving.problems import KINDS, MEDIA_TYPE, URN


def limited_protocol(limits: Limits) -> type[HttpToolsProtocol]:
    """A protocol class for uvicorn that keeps these limits."""

    class LimitedProtocol(_LimitedProtocol):
        bounds = limits

    return LimitedProtocol


class _LimitedProtocol(HttpToolsProtocol):
    """Closes connections whose next headers are too long or too slow; those complete are the application's."""

    bounds: Limits
    _head_bytes = 0
    _in_head = True
    _timer: TimerHandle | None = None

    def connection_made(self, transport: Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        if len(self.connections) > self.bounds.max_connections:
            self._refuse("overloaded")
        else:
            self._timer = self.loop.call_later(self.bounds.header_seconds, self._late)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._in_head:
            self._head_bytes += len(data)
            if self._timer is None:
                self._timer = self.loop.call_later(self.bounds.header_seconds, self._late)
        super().data_received(data)
        if self._in_head and self._head_bytes > self.bounds.max_header_bytes and not self.transport.is_closing():
            self._refuse("headers-too-large")

    def on_headers_complete(self) -> None:
        self._in_head, self._head_bytes = False, 0
        self._stop_timer()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_head = True
        super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _late(self) -> None:
        self._timer = None
        if not self.transport.is_closing():
            self._refuse("request-timeout")

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, kind: str) -> None:
        """Answer without a request to answer to, and close."""
        status, title = KINDS[kind].status, KINDS[kind].title
        body = f'{{"type": "{URN}{kind}", "title": "{title}", "status": {status}, "detail": "{title}"}}'.encode()
        retry = "Retry-After: 1\r\n" if KINDS[kind].retry else ""
        head = f"HTTP/1.1 {status} \r\nContent-Type: {MEDIA_TYPE}\r\n{retry}Connection: close\r\n"
        self.transport.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        self.transport.close()


def serving_options(limits: Limits) -> dict[str, Any]:
    """Arguments of uvicorn.Config that go with it."""
    return {"http": limited_protocol(limits), "ws": "none", "server_header": False, "proxy_headers": False}
