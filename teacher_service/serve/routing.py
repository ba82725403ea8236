"""Route declarations: path, scope, limits, problems."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Depends, Request
from starlette.datastructures import Headers
from starlette.routing import compile_path

from teacher_service.serve.problems import Problem, documented
from teacher_service.serve.tokens import Scope

_ALWAYS = ("malformed", "headers-too-large", "internal")
_SCOPED = ("unauthorized", "forbidden", "misdirected", "overloaded", "invalid-request")


@dataclass(frozen=True)
class RouteRule:
    """Properties of a route that middleware reads.

    Attributes:
        path: Path template.
        scope: Scope a token needs; None if the route is public.
        probe: Whether it is answered outside the limits, and logged at level DEBUG.
        large_body: Whether bodies may have ``Limits.max_body_bytes``; otherwise they are JSON of a few megabytes.
        admit: Raises a UserError about a POST's headers if its body need not be sent.
    """

    path: str
    scope: Scope | None
    probe: bool = False
    large_body: bool = False
    admit: Callable[[Headers], None] | None = None


UNDECLARED = RouteRule("", "admin")
"""The rule of every path without a declared route."""


class Routes(APIRouter):
    """A router whose routes are declared with their rules; see declare.

    Attributes:
        rules: Those of its routes.
    """

    def __init__(self, *tags: str) -> None:
        super().__init__(tags=list(tags))
        self.rules: list[RouteRule] = []

    def declare(
        self,
        method: str,
        path: str,
        scope: Scope | None,
        *,
        problems: Iterable[str] = (),
        responses: Mapping[int | str, dict[str, Any]] | None = None,
        openapi_extra: Mapping[str, Any] | None = None,
        probe: bool = False,
        large_body: bool = False,
        admit: Callable[[Headers], None] | None = None,
        **options: Any,
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorator of a route's handler.

        Args:
            method: HTTP method.
            path: Path template.
            scope: See RouteRule.
            problems: Kinds of problems it reports, beside those every route of the scope may.
            responses: OpenAPI's entries of its other responses, by status.
            openapi_extra: More of its OpenAPI entry.
            probe: See RouteRule.
            large_body: See RouteRule.
            admit: See RouteRule.
            options: FastAPI's options of the route.
        """
        self.rules.append(RouteRule(path, scope, probe, large_body, admit))
        kinds = (*_ALWAYS, *(() if scope is None else _SCOPED), *problems)
        security = {} if scope is None else {"security": [{"token": [scope]}]}
        return self.api_route(
            path,
            methods=[method],
            responses={**documented(*dict.fromkeys(kinds)), **(responses or {})},
            openapi_extra={**security, **(openapi_extra or {})},
            dependencies=[] if scope is None or probe else [Depends(refuse_unknown_parameters)],
            **options,
        )


class RouteTable:
    """The rules of an application's routes."""

    def __init__(self, rules: Iterable[RouteRule]) -> None:
        self._rules = [(compile_path(rule.path)[0], rule) for rule in rules]

    def rule(self, path: str) -> RouteRule:
        """The rule of the route at a path; UNDECLARED without one."""
        return next((rule for regex, rule in self._rules if regex.fullmatch(path)), UNDECLARED)


async def refuse_unknown_parameters(request: Request) -> None:
    """Refuse query parameters the route does not have: a misspelt one would silently be a default.

    Raises:
        Problem: Names the first.
    """
    known = {parameter.alias for parameter in request.scope["route"].dependant.query_params}
    unknown = sorted(request.query_params.keys() - known)
    if unknown:
        accepted = ", ".join(sorted(known)) or "none"
        raise Problem(
            "invalid-request", f"query parameter {unknown[0][:100]!r} is not known; this route has: {accepted}"
        )
