"""uvicorn's HTTP protocol with limits per connection."""

import re
import uuid
from asyncio import TimerHandle, Transport
from typing import Any

from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from feature_store.client.problems import KINDS
from teacher_service.serve.config import Limits
from teacher_service.serve.middleware.access_log import HEADER
from teacher_service.serve.problems import Problem

_HEAD_PIECE = 16 << 10  # most bytes of headers parsed before their number is looked at
_MAX_HEADERS = 256  # each costs far more than its bytes: 64 kB of "a:" would be megabytes
_CHUNKED_PIECE = 512  # of a body whose end the parser alone can find: few requests fit behind it
_PARSE_SECONDS = 0.0005  # at once: a body in chunks of one byte would keep other connections waiting
_PROBE_SECONDS = 1.0
_UPGRADE = re.compile(rb"\r\nupgrade:", re.IGNORECASE)


def limited_protocol(limits: Limits) -> type[HttpToolsProtocol]:
    """A protocol class for uvicorn that keeps these limits."""

    class LimitedProtocol(_LimitedProtocol):
        bounds = limits

    return LimitedProtocol


class _Flow(FlowControl):
    """Flow control that stays paused while enough unparsed bytes wait."""

    full = False

    def resume_reading(self) -> None:
        if not self.full:
            super().resume_reading()


class _LimitedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with limits that no middleware can add: they act before or after the application.

    - Headers have a deadline and a size; a body that follows an early response has a deadline and a size.
    - Pipelined requests are parsed one by one, and reading stops while they wait. uvicorn parses all that was read,
      and a parsed request costs a hundred times its bytes.
    - A client that half-closed its connection gets its responses; uvicorn closes at end of file. While reading is
      paused, an interim response tells whether the client has left.
    - Invalid HTTP, slow headers and too many connections are answered by problems; upgrades are ignored.
    """

    bounds: Limits
    _head_bytes = _forgotten_bytes = _body_left = 0
    _in_head = True
    _ended = _goes_on = False
    _timer: TimerHandle | None = None
    _running: RequestResponseCycle | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._unparsed = bytearray()

    def connection_made(self, transport: Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self.flow = self._flow = _Flow(transport)
        if len(self.connections) > self.bounds.max_connections:
            self._refuse("overloaded")
        else:
            self._timer = self.loop.call_later(self.bounds.header_seconds, self._late)

    def data_received(self, data: bytes) -> None:
        self._unparsed += data
        self._parse()

    def eof_received(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Continue for a client that ends its side after its request; TLS has no half-closed connections."""
        at_work = self._is_answering or self._goes_on
        self._ended = at_work and self.transport.get_extra_info("sslcontext") is None
        if self._ended:
            self._stop_reading()  # there is no more
        return self._ended

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # after a body in chunks they are trailers, which nothing here reads
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head, self._head_bytes = False, 0
        self._stop_timer()
        self._body_left = next((int(value) for name, value in self.headers if name == b"content-length"), 0)
        # After an upgrade the parser takes nothing more.
        upgrade = self.parser.should_upgrade()  # pyright: ignore[reportOptionalMemberAccess]
        super().on_headers_complete()
        self.headers = []  # for the next request; the scope keeps this one's
        if self.expect_100_continue or upgrade:  # refused, a client may leave its body out: what came next?
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        self._head_bytes, self._body_left = 0, self._body_left - len(body)
        super().on_body(body)
        if self.cycle.response_complete:
            self._forgotten_bytes += len(body)
            if self._forgotten_bytes > self.bounds.max_body_bytes:
                self.transport.close()

    def on_message_complete(self) -> None:
        self._in_head, self._head_bytes = True, 0
        super().on_message_complete()
        if self.cycle.response_complete and not self.transport.is_closing():  # the rest of its body has come
            self._stop_timer()
            self._keep_alive()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete and self.cycle.more_body and not self.transport.is_closing():
            self._forgotten_bytes = 0
            self._timer = self.loop.call_later(self.bounds.body_seconds, self.transport.close)
        self._parse()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)
        if self._running is not None:  # uvicorn tells only the request it parsed last
            self._running.disconnected = True
            self._running.message_event.set()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def send_400_response(self, msg: str) -> None:
        self._refuse("malformed")

    def _unsupported_upgrade_warning(self) -> None:
        """Log nothing: a server may ignore an upgrade."""

    @property
    def _is_answering(self) -> bool:
        """Whether a whole request waits for its response."""
        return self._in_head and self.cycle is not None and not self.cycle.response_complete

    def _parse(self) -> None:
        """Parse up to the end of a request; after a while the event loop serves other connections first."""
        end = self.loop.time() + _PARSE_SECONDS
        while self._unparsed and not (self._is_answering or self._goes_on or self.transport.is_closing()):
            piece = bytes(self._unparsed[: self._parsed_at_once()])
            del self._unparsed[: len(piece)]
            # After an upgrade the parser would take the body for another protocol.
            self._parse_piece(_UPGRADE.sub(b"\r\nx-upgrade:", piece) if self._in_head else piece)
            if self._unparsed and self.loop.time() > end:
                self._goes_on = True
                self.loop.call_soon(self._go_on)
        if self._ended and not (self._is_answering or self._goes_on):
            self.transport.close()
        if self.transport.is_closing():
            return
        if self._ended or len(self._unparsed) > HIGH_WATER_LIMIT:
            self._stop_reading()
        elif self._flow.full:
            self._flow.full = False
            self.flow.resume_reading()

    def _go_on(self) -> None:
        self._goes_on = False
        self._parse()

    def _stop_reading(self) -> None:
        if not self._flow.full:
            self._flow.full = True
            self.loop.call_later(_PROBE_SECONDS, self._probe, self.cycle)
        self.flow.pause_reading()

    def _parsed_at_once(self) -> int:
        """Number of bytes with at most one request's end; after a chunked body a few small ones may follow."""
        if self._in_head:
            end = self._unparsed.find(b"\r\n\r\n", 0, _HEAD_PIECE)
            return end + 4 if end >= 0 else _HEAD_PIECE
        return self._body_left if self._body_left > 0 else _CHUNKED_PIECE

    def _parse_piece(self, piece: bytes) -> None:
        self._head_bytes += len(piece)
        if self._in_head and self._timer is None:
            self._timer = self.loop.call_later(self.bounds.header_seconds, self._late)
        super().data_received(piece)
        many = len(self.headers or ()) > _MAX_HEADERS or self._head_bytes > self.bounds.max_header_bytes
        if many and not self.transport.is_closing():
            self._refuse("headers-too-large")

    def _late(self) -> None:
        self._timer = None
        if not self.transport.is_closing():
            self._refuse("request-timeout")

    def _keep_alive(self) -> None:
        """Start the keep-alive timer again, which the discarded body has stopped."""
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, kind: str) -> None:
        """Answer with a problem and close; a response that has begun is not mixed with it."""
        cycle = self.cycle
        if self._is_answering:
            cycle.keep_alive = False
            self._unparsed.clear()
            return
        if cycle is None or self._in_head or not cycle.response_started:
            self._write(Problem(kind, KINDS[kind].title, headers={"Connection": "close"}))
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
        self.transport.close()

    def _write(self, problem: Problem) -> None:
        request_id = uuid.uuid4().hex
        response = problem.response(request_id)
        response.headers[HEADER] = request_id
        lines = [b"HTTP/1.1 %d " % response.status_code, *(b"%s: %s" % header for header in response.raw_headers)]
        self.transport.write(b"\r\n".join([*lines, b"", bytes(response.body)]))

    def _probe(self, cycle: RequestResponseCycle) -> None:
        """Find out whether a client is there while nothing is read: only sending can tell."""
        if self.transport.is_closing() or not self._flow.full:
            return
        if cycle is self.cycle and not cycle.response_started and cycle.scope["http_version"] == "1.1":
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")  # which clients must look over, RFC 9110 15.2
        self.loop.call_later(_PROBE_SECONDS, self._probe, self.cycle)


def serving_options(limits: Limits) -> dict[str, Any]:
    """Arguments of uvicorn.Config that go with it."""
    return {"http": limited_protocol(limits), "ws": "none", "server_header": False, "proxy_headers": False}
