"""Errors of the service as RFC 9457 responses."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from feature_store.client.problems import KINDS, MEDIA_TYPE, URN, kind_of
from feature_store.errors import UserError
from teacher_service.serve.live.batcher import BusyError, DeadlineError, DeviceFaultError

RETRY_SECONDS = 1
MOST_ERRORS = 10
"""Errors of one problem: what is wrong with a body of megabytes is said in a few kilobytes."""
_MOST_DETAIL, _MOST_WHERE = 2000, 100
_SERVER_ERRORS: Mapping[type[UserError], str] = {
    BusyError: "overloaded",
    DeadlineError: "deadline",
    DeviceFaultError: "not-ready",
}


class ProblemDocument(BaseModel):
    """RFC 9457. ``type`` is stable: programs may compare it."""

    type: str = Field(examples=[URN + "uncommitted"])
    title: str
    status: int
    detail: str
    request_id: str = Field(description="X-Request-ID of the answer, also in the service's access log")
    errors: list[dict[str, Any]] | None = Field(None, description="Faults by place in the request, for invalid-request")


class Problem(HTTPException):
    """Raise it anywhere below the middleware; handlers turn it into an answer.

    Args:
        kind: One of KINDS.
        detail: What, got, expected, next step; nothing secret and no path of this machine.
        headers: More headers of the answer.
        retry_after: Seconds, for kinds that may succeed later.
        errors: Faults by their place in the request.
    """

    def __init__(
        self,
        kind: str,
        detail: str,
        *,
        headers: Mapping[str, str] | None = None,
        retry_after: float = RETRY_SECONDS,
        errors: list[dict[str, Any]] | None = None,
    ) -> None:
        self.kind, self.errors = kind, errors
        more = {"Retry-After": str(math.ceil(retry_after))} if KINDS[kind].retry else {}
        super().__init__(KINDS[kind].status, detail, {**more, **(headers or {})})

    def response(self, request_id: str) -> Response:
        """The answer."""
        kind, detail = KINDS[self.kind], _shortened(self.detail, _MOST_DETAIL)
        body = {
            "type": URN + self.kind, "title": kind.title, "status": kind.status, "detail": detail,
            "request_id": request_id,
        }  # fmt: skip
        if self.errors is not None:
            body["errors"] = self.errors
        # ASCII only: what a client sent may hold code points that no encoding has.
        return Response(json.dumps(body), kind.status, self.headers, MEDIA_TYPE)

    async def send(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer from a middleware, where no handler is above."""
        await self.response(request_id(scope))(scope, receive, send)


def request_id(scope: Scope) -> str:
    """The request's id, from the middleware that gives them out."""
    return scope.get("state", {}).get("request_id", "")


def problem_of(error: UserError) -> Problem:
    """One of this project's errors as a problem."""
    kind = next((name for known, name in _SERVER_ERRORS.items() if isinstance(error, known)), None) or kind_of(error)
    detail = "an error without a kind of its own; see the service's log" if kind == "internal" else str(error)
    return Problem(kind, detail, retry_after=getattr(error, "retry_after", RETRY_SECONDS))


def invalid_request(errors: Sequence[Mapping[str, Any]]) -> Problem:
    """The problem of a request that pydantic refuses, with the first of its errors."""
    found = [
        {"where": [_shortened(str(part), _MOST_WHERE) for part in each["loc"]], "what": _shortened(each["msg"])}
        for each in errors[:MOST_ERRORS]
    ]
    first = f"{'.'.join(found[0]['where'])}: {found[0]['what']}" if found else "the request is not valid"
    more = f" (the first {len(found)} errors)" if len(errors) > len(found) else ""
    return Problem("invalid-request", f"{first}{more}; see openapi.json", errors=found)


def _shortened(text: str, most: int = 200) -> str:
    """Text that a client may have sent, at most so long once it is JSON, where a character takes up to 12 bytes."""
    if len(json.dumps(text)) <= most + 2:
        return text
    kept = most if text[:most].isascii() and text[:most].isprintable() else most // 12
    return f"{text[:kept]}..."


def install(app: FastAPI) -> None:
    """Report the application's errors as problems; AccessLogMiddleware reports all others as internal."""
    for kind in (HTTPException, RequestValidationError, UserError):
        app.add_exception_handler(kind, _respond)


def documented(*kinds: str) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's ``responses`` for some kinds, each with an example."""
    found: dict[int | str, dict[str, Any]] = {}
    for name in kinds:
        kind = KINDS[name]
        entry = found.setdefault(
            kind.status, {"description": kind.title, "content": {MEDIA_TYPE: {"schema": _REFERENCE, "examples": {}}}}
        )
        entry["content"][MEDIA_TYPE]["examples"][name] = {"value": _example(name)}
        if kind.retry:
            entry["headers"] = {"Retry-After": {"description": "Seconds to wait", "schema": {"type": "integer"}}}
    return found


_REFERENCE = {"$ref": "#/components/schemas/ProblemDocument"}
_OF_STATUS = {
    400: "malformed", 401: "unauthorized", 403: "forbidden", 404: "not-found", 405: "method-not-allowed",
    413: "too-large", 415: "unsupported-media-type",
}  # fmt: skip


def _example(name: str) -> dict[str, Any]:
    kind = KINDS[name]
    return {
        "type": URN + name, "title": kind.title, "status": kind.status, "detail": "what, got, expected, next step",
        "request_id": "5f0c",
    }  # fmt: skip


async def _respond(request: Request, error: Exception) -> Response:
    """The response about what a handler raised."""
    if isinstance(error, Problem):
        problem = error
    elif isinstance(error, UserError):
        problem = problem_of(error)
    elif isinstance(error, RequestValidationError):
        problem = invalid_request(error.errors())
    else:
        assert isinstance(error, HTTPException)  # the framework's own
        what = f"{request.method} {_shortened(request.scope['path'])}: {error.detail}"
        kind = _OF_STATUS.get(error.status_code, "internal")
        problem = Problem(kind, f"{what}; see openapi.json", headers=error.headers)
    return problem.response(request_id(request.scope))
