"""Request ids, metrics, access log as JSON lines."""

import asyncio
import logging
import re
import time
import uuid
from datetime import UTC, datetime

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from feature_store.tools.terminal import json_text
from teacher_service.serve.metrics import Metrics
from teacher_service.serve.problems import Problem
from teacher_service.serve.routing import RouteTable

LOGGER = "teacher_service.access"
HEADER = "X-Request-ID"
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_UNROUTED = "none"  # one label for all paths without a route, so that clients cannot create time series


class AccessLogMiddleware:
    """Request ids, metrics and the access log.

    Query and headers are not logged: they may hold secrets.

    Args:
        app: The rest of the service.
        table: Rules of its routes.
        metrics: Counters.
    """

    def __init__(self, app: ASGIApp, *, table: RouteTable, metrics: Metrics) -> None:
        self._app, self._table, self._metrics = app, table, metrics
        self._logger = logging.getLogger(LOGGER)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on and record it."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        request = _Request(scope, receive, send)
        self._metrics.in_work.inc()
        try:
            await self._app(scope, request.receive, request.send)
        except ClientDisconnect:
            pass  # the recorded status stays 0
        except asyncio.CancelledError:  # the drain limit has passed; the server closes the connection
            if not request.status:
                await Problem("not-ready", "the service stops; ask another one").send(
                    scope, request.receive, request.send
                )
        except Exception as error:
            if request.status:  # too late for a problem: the server closes the connection
                raise
            self._logger.exception("request %s failed", scope["state"]["request_id"], exc_info=error)
            problem = Problem("internal", "see the service's log by this request id")
            await problem.send(scope, request.receive, request.send)
        finally:
            self._metrics.in_work.dec()
            self._record(request)

    def _record(self, request: "_Request") -> None:
        scope, seconds = request.scope, time.monotonic() - request.started
        route = getattr(scope.get("route"), "path", None) or scope["state"].get("route", _UNROUTED)
        self._metrics.requests.labels(route, scope["method"], request.status).inc()
        self._metrics.seconds.labels(route).observe(seconds)
        self._metrics.sent.labels(route).inc(request.sent)
        self._metrics.received.labels(route).inc(request.received)
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request_id": scope["state"]["request_id"],
            "client": scope["client"][0] if scope.get("client") else None,
            "token": scope["state"].get("token_name"),
            "method": scope["method"],
            "path": scope.get("raw_path", b"").decode("ascii", "replace"),
            "route": route,
            "status": request.status,
            "bytes": request.sent,
            "seconds": round(seconds, 6),
            "complete": request.complete,
        }
        level = logging.DEBUG if self._table.rule(scope["path"]).probe else logging.INFO
        self._logger.log(level, "%s", json_text(line))


class _Request:
    """Counts of one request, taken in its receive and send."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = Headers(scope=scope).get(HEADER, "")
        state = scope.setdefault("state", {})
        state["request_id"] = given if _ID.fullmatch(given) else uuid.uuid4().hex
        self.scope, self._receive, self._send = scope, receive, send
        self.started = time.monotonic()
        self.status, self.sent, self.received, self.complete = 0, 0, 0, False

    async def receive(self) -> Message:
        message = await self._receive()
        self.received += len(message.get("body", b""))
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers[HEADER] = self.scope["state"]["request_id"]
            headers["X-Content-Type-Options"] = "nosniff"
        await self._send(message)
        if message["type"] == "http.response.body":
            self.sent += len(message.get("body", b""))
            self.complete = not message.get("more_body", False)
