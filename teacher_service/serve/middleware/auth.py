"""Bearer token checks, by the scope each route declares."""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from teacher_service.serve.problems import Problem
from teacher_service.serve.routing import UNDECLARED, RouteTable
from teacher_service.serve.tokens import TokenFile

_CHALLENGE = {"WWW-Authenticate": 'Bearer realm="scalekd-cache"'}


class AuthMiddleware:
    """Refuses requests without a token of the route's scope.

    Undeclared paths are 401 without a token and 404 with one; only an admin's requests for them reach the application.

    Args:
        app: The rest of the service.
        table: Scopes of its routes.
        tokens: Known tokens; None without authentication.
    """

    def __init__(self, app: ASGIApp, *, table: RouteTable, tokens: TokenFile | None) -> None:
        self._app, self._table, self._tokens = app, table, tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or let the application."""
        if scope["type"] == "http":
            try:
                self._require(scope)
            except Problem as problem:
                return await problem.send(scope, receive, send)
        return await self._app(scope, receive, send)

    def _require(self, scope: Scope) -> None:
        rule = self._table.rule(scope["path"])
        needed = rule.scope
        if self._tokens is None or needed is None:
            return
        kind, _, secret = Headers(scope=scope).get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not secret:
            raise Problem("unauthorized", "send Authorization: Bearer TOKEN", headers=_CHALLENGE)
        token = self._tokens.find(secret.strip())
        if token is None:
            headers = {"WWW-Authenticate": f'{_CHALLENGE["WWW-Authenticate"]}, error="invalid_token"'}
            raise Problem("unauthorized", "this token is not known here; ask for a new one", headers=headers)
        scope["state"]["token_name"] = token.name
        if not token.allows(needed):
            if rule is UNDECLARED:
                raise Problem("not-found", f"{scope['path'][:200]!r} is no part of the API; see openapi.json")
            headers = {
                "WWW-Authenticate": f'{_CHALLENGE["WWW-Authenticate"]}, error="insufficient_scope", scope="{needed}"'
            }
            raise Problem(
                "forbidden", f"token {token.name!r} lacks the scope {needed!r}; ask for one with it", headers=headers
            )
