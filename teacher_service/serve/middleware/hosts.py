"""Checks of a request's Host header."""

import ipaddress
import re

from starlette.types import ASGIApp, Receive, Scope, Send

from teacher_service.serve.problems import Problem

_HOST = re.compile(rb"[A-Za-z0-9._~!$&'()*+;=%:\[\]-]*")  # RFC 3986, without the comma of two in one


class HostMiddleware:
    """Refuses requests whose host is missing, given twice or malformed, RFC 9112 3.2.

    Args:
        app: The rest of the service.
        local_only: Whether only names of this machine are answered. Without tokens a page in a browser on this machine
            must not reach a service on loopback under a name of its own (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, *, local_only: bool) -> None:
        self._app, self._local_only = app, local_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or let the application."""
        if scope["type"] == "http":
            try:
                self._require(_host(scope))
            except Problem as problem:
                return await problem.send(scope, receive, send)
        return await self._app(scope, receive, send)

    def _require(self, host: str) -> None:
        if self._local_only and not _is_local(host):
            raise Problem(
                "misdirected",
                "without tokens this service answers to localhost and loopback addresses only; use --tokens",
            )


def _host(scope: Scope) -> str:
    given = [value for name, value in scope["headers"] if name == b"host"]
    if len(given) > 1 or (not given and scope["http_version"] != "1.0"):
        raise Problem("malformed", f"the request has {len(given)} Host headers, expected one")
    host = given[0] if given else b""
    if not _HOST.fullmatch(host):
        raise Problem("malformed", "the Host header is no host name or address with or without a port")
    return host.decode("ascii")


def _is_local(host: str) -> bool:
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
    name = name.removeprefix("[").removesuffix("]")
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
