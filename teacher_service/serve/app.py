"""The application: routes, the layers around them, and an OpenAPI that tells all they answer."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.utils import get_openapi

from feature_store.errors import CorruptStoreError
from teacher_service.serve import problems
from teacher_service.serve.middleware.access_log import HEADER, AccessLogMiddleware
from teacher_service.serve.middleware.auth import AuthMiddleware, scope_of
from teacher_service.serve.middleware.head import HeadMiddleware
from teacher_service.serve.middleware.hosts import HostMiddleware
from teacher_service.serve.middleware.limits import LimitsMiddleware
from teacher_service.serve.page.browser import FeatureBrowser
from teacher_service.serve.page.files import page_router
from teacher_service.serve.page.routes import browse_router
from teacher_service.serve.routes import batch_bodies as batches
from teacher_service.serve.routes.operations import operations_router
from teacher_service.serve.routes.rows import rows_router
from teacher_service.serve.routes.zarr import zarr_router
from teacher_service.serve.service import Service
from teacher_service.serve.tokens import TokenFile

COMPUTE = "/v1/features:compute"
_CORS: dict[str, Any] = {
    "allow_methods": ("GET", "HEAD", "POST"),
    "allow_headers": ("Authorization", "Content-Type", "If-None-Match", "If-Range", "Range", HEADER),
    "expose_headers": ("Content-Range", "ETag", "Retry-After", HEADER),
}
_ABOUT = (
    "Teacher features over HTTP: cached rows, the later blocks, the zarr store itself, and the live teacher. Errors "
    "are RFC 9457 problems whose `type` is stable."
)


def create_app(
    service: Service, tokens: TokenFile | None = None, on_failure: Callable[[], None] = lambda: None
) -> FastAPI:
    """The service as an ASGI application.

    Args:
        service: What it serves; loaded by the application's lifespan, or before.
        tokens: Who may ask; None for everybody.
        on_failure: Called when the service could not be loaded.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(service.run(on_failure))
        yield
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        if service.live is not None:
            await asyncio.to_thread(service.live.close, service.config.drain_seconds)

    app = FastAPI(
        title="scalekd-cache", version=_version(), description=_ABOUT, lifespan=lifespan, redirect_slashes=False,
        redoc_url=None, docs_url=None,
    )  # fmt: skip
    app.state.service = service
    problems.install(app)
    app.add_exception_handler(CorruptStoreError, _corrupt_store)
    browse = browse_router(FeatureBrowser(lambda: service.store, service.config.tars, service.config))
    for router in (operations_router(), page_router()):
        app.include_router(router)
    strict = [Depends(refuse_unknown_parameters)]
    for router in (rows_router(), zarr_router(), browse):
        app.include_router(router, dependencies=strict)
    large_bodies = {}
    if service.live is not None:
        from teacher_service.serve.routes.compute import admission, compute_router

        large_bodies[COMPUTE] = admission(service.live)
        router = compute_router(service.live, max_body_bytes=service.config.limits.max_body_bytes)
        app.include_router(router, responses=_COMPUTE_PROBLEMS, dependencies=strict)
    # The last one added is the outermost.
    app.add_middleware(HeadMiddleware)
    app.add_middleware(LimitsMiddleware, limits=service.config.limits, large_bodies=large_bodies)
    app.add_middleware(AuthMiddleware, tokens=tokens)
    if service.config.cors_origins:  # a browser asks without the token whether it may send one
        app.add_middleware(CORSMiddleware, allow_origins=service.config.cors_origins, **_CORS)
    app.add_middleware(HostMiddleware, local_only=tokens is None and service.config.loopback)
    app.add_middleware(AccessLogMiddleware, metrics=service.metrics)
    app.openapi = lambda: _openapi(app)
    return app


async def _corrupt_store(request: Request, error: Exception) -> Response:
    """A store that was moved away is no damaged one: it must not be repaired."""
    assert isinstance(error, CorruptStoreError)  # what it is installed for
    away = await request.app.state.service.away()
    problem = problems.Problem("not-ready", away) if away else problems.problem_of(error)
    return problem.response(problems.request_id(request.scope))


async def refuse_unknown_parameters(request: Request) -> None:
    """A misspelt parameter would be a default in silence.

    Raises:
        Problem: Names the first that the route does not have.
    """
    known = {parameter.alias for parameter in request.scope["route"].dependant.query_params}
    unknown = sorted(request.query_params.keys() - known)
    if unknown:
        accepted = ", ".join(sorted(known)) or "none"
        raise problems.Problem(
            "invalid-request", f"query parameter {unknown[0][:100]!r} is not known; this route has: {accepted}"
        )


_COMPUTE_PROBLEMS = problems.documented(
    "request-timeout",
    "too-large",
    "unsupported-media-type",
    "invalid-request",
    "overloaded",
    "not-ready",
    "resource",
    "deadline",
)


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's, with the problems' schema and what every path needs and may answer whatever its route says."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        components = schema.setdefault("components", {})
        components.setdefault("schemas", {})["ProblemDocument"] = problems.ProblemDocument.model_json_schema()
        components["schemas"].update(batches.schema()["$defs"])
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        for path, operations in schema["paths"].items():
            for operation in operations.values():
                _complete(path, operation)
        app.openapi_schema = schema
    return app.openapi_schema


def _complete(path: str, operation: dict[str, Any]) -> None:
    answers = operation["responses"]
    if "422" in answers and problems.MEDIA_TYPE not in answers["422"].get("content", {}):
        answers["422"] = problems.documented("invalid-request")[422]
    more = ["malformed", "headers-too-large", "internal"]
    scope = scope_of(path)
    if scope is not None:
        answers.setdefault("422", problems.documented("invalid-request")[422])
        operation["security"] = [{"token": [scope]}]
        more += ["unauthorized", "forbidden", "misdirected", "overloaded"]
    for status, answer in problems.documented(*more).items():
        answers.setdefault(str(status), answer)


def _version() -> str:
    try:
        return version("scalekd-cache")
    except PackageNotFoundError:  # run from a checkout
        return "0"
