"""Limits on concurrency, body size, body time of requests."""

import asyncio

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from feature_store.errors import UserError
from teacher_service.serve.config import Limits
from teacher_service.serve.problems import Problem, problem_of
from teacher_service.serve.routing import RouteRule, RouteTable

_SMALL_BODY_BYTES = 4 << 20  # of requests that are JSON


class LimitsMiddleware:
    """Refuses requests beyond the limits, by their headers where those suffice.

    Args:
        app: The rest of the service.
        table: Rules of its routes.
        limits: The limits.
    """

    def __init__(self, app: ASGIApp, *, table: RouteTable, limits: Limits) -> None:
        self._app, self._table, self._limits = app, table, limits
        self._in_work = self._body_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or let the application."""
        rule = self._table.rule(scope["path"]) if scope["type"] == "http" else None
        if rule is None or rule.probe:
            return await self._app(scope, receive, send)
        most = self._limits.max_body_bytes
        body = _Body(receive, most if rule.large_body else min(most, _SMALL_BODY_BYTES), self._limits.body_seconds)
        try:
            length = self._require(scope, rule, body)
        except Problem as problem:
            return await problem.send(scope, receive, send)
        except UserError as error:
            return await problem_of(error).send(scope, receive, send)
        self._in_work += 1
        self._body_bytes += length
        try:
            return await self._app(scope, body.receive, send)
        finally:
            self._in_work -= 1
            self._body_bytes -= length

    def _require(self, scope: Scope, rule: RouteRule, body: "_Body") -> int:
        """Bytes the body may have; raises what refuses the request."""
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        size = len(scope.get("raw_path", b"")) + len(scope["query_string"])
        size += sum(len(name) + len(value) for name, value in headers)
        if size > self._limits.max_header_bytes:
            raise Problem(
                "headers-too-large", f"path and headers have {size:,} bytes, at most {self._limits.max_header_bytes:,}"
            )
        length = _body_length(headers, body.most)
        if length > body.most:
            raise body.too_large()
        if self._in_work >= self._limits.max_requests:
            raise Problem(
                "overloaded", f"{self._in_work} requests are in work, at most {self._limits.max_requests}; try later"
            )
        together = self._body_bytes + length
        if self._body_bytes and together > self._limits.max_bytes_in_flight:
            raise Problem(
                "overloaded",
                f"{self._body_bytes:,} bytes of bodies are in work and this one may have {length:,} bytes, at most "
                f"{self._limits.max_bytes_in_flight:,} are allowed; try later",
            )
        if scope["method"] == "POST" and rule.admit is not None:
            scope["state"]["route"] = rule.path  # a refused request reaches no router that would set it
            rule.admit(Headers(raw=headers))
        return length


def _body_length(headers: list[tuple[bytes, bytes]], most: int) -> int:
    """Largest possible body in bytes: its Content-Length, or the limit if it is chunked."""
    for name, value in headers:
        if name == b"transfer-encoding":
            return most
        if name == b"content-length" and value.isdigit():
            return int(value[:20])
    return 0


class _Body:
    """A request's body as it arrives; raises a Problem in the code that waits for it."""

    def __init__(self, receive: Receive, most: int, seconds: float) -> None:
        self._receive, self.most, self._seconds = receive, most, seconds
        self._received, self._whole = 0, False
        self._deadline: float | None = None

    async def receive(self) -> Message:
        if self._whole:  # only a disconnect can follow, whenever it comes
            return await self._receive()
        loop = asyncio.get_running_loop()
        self._deadline = self._deadline or loop.time() + self._seconds
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            raise Problem(
                "request-timeout",
                f"the body took longer than {self._seconds:g} seconds",
                headers={"Connection": "close"},
            ) from None
        self._received += len(message.get("body", b""))
        self._whole = message["type"] == "http.disconnect" or not message.get("more_body", False)
        if self._received > self.most:
            raise self.too_large()
        return message

    def too_large(self) -> Problem:
        return Problem("too-large", f"the body has more than {self.most:,} bytes")
