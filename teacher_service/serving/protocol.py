"""uvicorn's HTTP protocol with what it lacks: limits on how long headers may be and take, and sending files."""

import os
from asyncio import TimerHandle, Transport
from collections.abc import Sequence
from functools import partial
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from feature_store.reading.cached_rows import FileSpan
from teacher_service.serving.config import Limits
from teacher_service.serving.problems import KINDS, MEDIA_TYPE, URN
from teacher_service.serving.sendfile import FILES, send_spans


def limited_protocol(limits: Limits) -> type[HttpToolsProtocol]:
    """A protocol class for uvicorn that keeps these limits."""

    class LimitedProtocol(_LimitedProtocol):
        bounds = limits

    return LimitedProtocol


class _LimitedProtocol(HttpToolsProtocol):
    """Closes connections whose next headers are too long or too slow; those complete are the application's.

    A request may be answered before its body was read. The rest is then read and forgotten, since a connection closed
    over it would take the answer along, but has the limits of a body that is read.
    """

    bounds: Limits
    _head_bytes = _forgotten_bytes = 0
    _in_head = True
    _timer: TimerHandle | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._gone = self.loop.create_future()
        self.app = partial(self._with_files, self.app)

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
        if self.expect_100_continue:  # refused, the client may leave its body out: what came next could be either
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        if self.cycle.response_complete:
            self._forgotten_bytes += len(body)
            if self._forgotten_bytes > self.bounds.max_body_bytes:
                self.transport.close()

    def on_message_complete(self) -> None:
        self._in_head = True
        super().on_message_complete()
        if self.cycle.response_complete and not self.transport.is_closing():  # the rest of its body has come
            self._stop_timer()
            self._keep_alive()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete and self.cycle.more_body and not self.transport.is_closing():
            self._forgotten_bytes = 0
            self._timer = self.loop.call_later(self.bounds.body_seconds, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._gone.set_result(None)
        super().connection_lost(exc)

    async def _with_files(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """The application, which may send FILES unless the bytes have to be encrypted here."""
        cycle: RequestResponseCycle = send.__self__  # pyright: ignore[reportFunctionMemberAccess]

        async def send_any(message: Message) -> None:
            if message["type"] == FILES:
                await self._send_files(cycle, message["spans"])
            else:
                await send(message)

        if self.transport.get_extra_info("sslcontext") is None:
            scope["extensions"] = {FILES: {}}
        await app(scope, receive, send_any)

    async def _send_files(self, cycle: RequestResponseCycle, spans: Sequence[FileSpan]) -> None:
        if self.transport.get_write_buffer_size():  # what was sent before goes first
            self.transport.set_write_buffer_limits(0)
            await self.flow.drain()
            self.transport.set_write_buffer_limits()
        if cycle.disconnected:
            return
        cycle.expected_content_length -= sum(span.nbytes for span in spans)
        # The event loop wants a descriptor of its own for what is not sent by its transport.
        connection = os.dup(self.transport.get_extra_info("socket").fileno())
        try:
            await send_spans(connection, spans, self._gone)
        except ConnectionError:
            self.transport.abort()
        finally:
            os.close(connection)

    def _late(self) -> None:
        self._timer = None
        if not self.transport.is_closing():
            self._refuse("request-timeout")

    def _keep_alive(self) -> None:
        """Wait for the next request as long as after an answer: receiving what is forgotten has ended that."""
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

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
