"""What can go wrong for a client: RFC 9457 problems with stable types, and which error becomes which."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from feature_store.errors import (
    CorruptStoreError,
    InputError,
    QuarantinedError,
    ResourceError,
    UncommittedError,
    UserError,
    WireError,
)
from teacher_service.serve.live.batcher import BusyError, DeadlineError, DeviceFaultError

MEDIA_TYPE = "application/problem+json"
URN = "urn:scalekd-cache:problem:"
RETRY_SECONDS = 1
MOST_ERRORS = 10
"""Errors of one problem: what is wrong with a body of megabytes is said in a few kilobytes."""
_MOST_DETAIL, _MOST_WHERE = 2000, 100


@dataclass(frozen=True)
class Kind:
    """A kind of problem; its name is part of its type for good."""

    status: int
    title: str
    retry: bool = False
    """Whether the same request may succeed later; such answers carry Retry-After."""


KINDS = {
    "malformed": Kind(400, "The request cannot be read"),
    "unauthorized": Kind(401, "A bearer token is needed"),
    "forbidden": Kind(403, "The token's scopes do not include this"),
    "not-found": Kind(404, "There is nothing at this path"),
    "unknown-key": Kind(404, "No committed unit holds this sample key"),
    "unknown-tap": Kind(404, "The store has no such tap"),
    "uncommitted": Kind(404, "No commit record vouches for this row"),
    "method-not-allowed": Kind(405, "The path does not take this method"),
    "request-timeout": Kind(408, "The request's body did not arrive in time"),
    "quarantined": Kind(410, "The row's sample was quarantined: it has no features"),
    "object-missing": Kind(410, "A committed object is missing: the store is damaged"),
    "precondition-failed": Kind(412, "The object is another one by now"),
    "too-large": Kind(413, "The request or its answer is larger than this service allows"),
    "unsupported-media-type": Kind(415, "The request's body has a type that is not taken here"),
    "range-not-satisfiable": Kind(416, "The range starts after the object's end"),
    "misdirected": Kind(421, "This host name is not this service's"),
    "invalid-request": Kind(422, "The request does not have the form the API describes"),
    "overloaded": Kind(429, "The service has as much to do as it takes", retry=True),
    "headers-too-large": Kind(431, "The request's headers are larger than this service allows"),
    "internal": Kind(500, "The service has a fault"),
    "corrupt-store": Kind(500, "Committed bytes of the store are damaged"),
    "not-ready": Kind(503, "The service is loading, draining, or has lost its device", retry=True),
    "resource": Kind(503, "Disk, network or device gave up", retry=True),
    "deadline": Kind(503, "There was no answer by the deadline", retry=True),
}


class ProblemDocument(BaseModel):
    """RFC 9457. ``type`` is stable: programs may compare it."""

    type: str = Field(examples=[URN + "uncommitted"])
    title: str
    status: int
    detail: str
    request_id: str = Field(description="X-Request-ID of the answer, also in the service's access log")
    errors: list[dict[str, Any]] | None = Field(None, description="What is wrong where, for invalid-request")


class Problem(HTTPException):
    """Raise it anywhere below the middleware; handlers turn it into an answer.

    Args:
        kind: One of KINDS.
        detail: What, got, expected, next step; nothing secret and no path of this machine.
        headers: More headers of the answer.
        retry_after: Seconds, for kinds that may succeed later.
        errors: What is wrong where.
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
    """This project's errors as problems; a server must not answer with anything else."""
    match error:
        case UncommittedError():
            return Problem("uncommitted", str(error))
        case QuarantinedError():
            return Problem("quarantined", str(error))
        case CorruptStoreError():
            return Problem("corrupt-store", str(error))
        case BusyError():
            return Problem("overloaded", str(error), retry_after=error.retry_after)
        case DeadlineError():
            return Problem("deadline", str(error))
        case DeviceFaultError():
            return Problem("not-ready", str(error), retry_after=30)
        case WireError() | InputError():  # only the client's own bodies are decoded here
            return Problem("invalid-request", str(error))
        case ResourceError():
            return Problem("resource", str(error))
    return Problem("internal", "an error without a kind of its own; the service's log says more")


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
    """Make every error of the application a problem; what nobody foresaw is left to the outermost middleware."""
    app.add_exception_handler(HTTPException, _http_exception)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(UserError, _user_error)


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


async def _http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # what it is installed for
    problem = error if isinstance(error, Problem) else _problem_of_framework(error, request)
    return problem.response(request_id(request.scope))


def _problem_of_framework(error: HTTPException, request: Request) -> Problem:
    kind = _OF_STATUS.get(error.status_code, "internal")
    what = f"{request.method} {_shortened(request.scope['path'])}: {error.detail}"
    return Problem(kind, f"{what}; see openapi.json", headers=error.headers)


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return invalid_request(error.errors()).response(request_id(request.scope))


async def _user_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, UserError)
    return problem_of(error).response(request_id(request.scope))
