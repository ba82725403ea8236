"""Who may ask for what: everything needs a token with the path's scope, unless it is listed as public."""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from teacher_service.serve import tokens
from teacher_service.serve.page import files as page
from teacher_service.serve.problems import Problem
from teacher_service.serve.tokens import TokenFile

PUBLIC = frozenset({"/livez", "/readyz", *page.FILES})
"""Answered without a token: they say nothing about the store."""

_SCOPES: tuple[tuple[str, tokens.Scope], ...] = (
    ("/v1/features:compute", "compute"),
    ("/v1/teacher", "compute"),
    ("/v1/manifest", "read"),
    ("/v1/rows/", "read"),
    ("/v1/rows:batch", "read"),
    ("/v1/units/", "read"),
    ("/v1/blocks", "read"),
    ("/v1/zarr/", "read"),
    ("/v1/browse/", "read"),
    ("/openapi.json", "read"),
)
_CHALLENGE = {"WWW-Authenticate": 'Bearer realm="scalekd-cache"'}


def scope_of(path: str) -> tokens.Scope | None:
    """The scope a path needs; None if it is public. A path nobody thought of is for admins."""
    if path in PUBLIC:
        return None
    for known, scope in _SCOPES:
        if path == known or (known.endswith("/") and path.startswith(known)):
            return scope
    return "admin"


class AuthMiddleware:
    """Refuses every request that may not be answered, before anything else sees it.

    Args:
        app: What answers the others.
        tokens: Known tokens; None if everybody may ask.
    """

    def __init__(self, app: ASGIApp, *, tokens: TokenFile | None) -> None:
        self._app, self._tokens = app, tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or let the application."""
        if scope["type"] == "http":
            try:
                self._require(scope)
            except Problem as problem:
                return await problem.send(scope, receive, send)
        return await self._app(scope, receive, send)

    def _require(self, scope: Scope) -> None:
        needed = scope_of(scope["path"])
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
            headers = {
                "WWW-Authenticate": f'{_CHALLENGE["WWW-Authenticate"]}, error="insufficient_scope", scope="{needed}"'
            }
            raise Problem(
                "forbidden", f"token {token.name!r} lacks the scope {needed!r}; ask for one with it", headers=headers
            )
