"""What a request may cost before any route sees it: how many at once, how large, how slow."""

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from teacher_service.serving.config import Limits
from teacher_service.serving.problems import Problem

_PROBES = frozenset({"/livez", "/readyz", "/metrics"})
_SMALL_BODY_BYTES = 4 << 20  # of requests that are JSON


class LimitsMiddleware:
    """Refuses requests beyond the limits.

    Args:
        app: What answers the others.
        limits: The limits.
        large_bodies: Paths that take bodies up to ``limits.max_body_bytes``; others take JSON.
    """

    def __init__(self, app: ASGIApp, *, limits: Limits, large_bodies: frozenset[str] = frozenset()) -> None:
        self._app, self._limits, self._large = app, limits, large_bodies
        self._in_work = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or let the application."""
        if scope["type"] != "http" or scope["path"] in _PROBES:
            return await self._app(scope, receive, send)
        try:
            body = _Body(receive, self._body_bytes(scope["path"]), self._limits.body_seconds)
            self._require(scope, body)
        except Problem as problem:
            return await problem.send(scope, receive, send)
        self._in_work += 1
        try:
            return await self._app(scope, body.receive, send)
        finally:
            self._in_work -= 1

    def _require(self, scope: Scope, body: "_Body") -> None:
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        size = len(scope.get("raw_path", b"")) + len(scope["query_string"])
        size += sum(len(name) + len(value) for name, value in headers)
        if size > self._limits.max_header_bytes:
            raise Problem(
                "headers-too-large", f"path and headers have {size:,} bytes, at most {self._limits.max_header_bytes:,}"
            )
        declared = next((value for name, value in headers if name == b"content-length"), b"0")
        if declared.isdigit() and int(declared[:20]) > body.most:
            raise body.too_large()
        if self._in_work >= self._limits.max_requests:
            raise Problem(
                "overloaded", f"{self._in_work} requests are in work, at most {self._limits.max_requests}; try later"
            )

    def _body_bytes(self, path: str) -> int:
        most = self._limits.max_body_bytes
        return most if path in self._large else min(most, _SMALL_BODY_BYTES)


class _Body:
    """A request's body as it arrives; raises a Problem in whatever waits for it."""

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
        # The rest of the body is still on its way: nobody will read it.
        return Problem("too-large", f"the body has more than {self.most:,} bytes", headers={"Connection": "close"})
