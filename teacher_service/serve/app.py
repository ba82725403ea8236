"""The service as an ASGI application."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.utils import get_openapi

from feature_store.backends.open import open_objects
from feature_store.commits.root import read_manifest
from feature_store.errors import CorruptStoreError
from teacher_service.serve import problems
from teacher_service.serve.feature_browser import FeatureBrowser
from teacher_service.serve.middleware.access_log import HEADER, AccessLogMiddleware
from teacher_service.serve.middleware.auth import AuthMiddleware
from teacher_service.serve.middleware.head import HeadMiddleware
from teacher_service.serve.middleware.hosts import HostMiddleware
from teacher_service.serve.middleware.limits import LimitsMiddleware
from teacher_service.serve.page.files import page_router
from teacher_service.serve.routes import batch_bodies as batches
from teacher_service.serve.routes.browse import browse_router
from teacher_service.serve.routes.operations import operations_router
from teacher_service.serve.routes.parameters import COMPUTE, TEACHER
from teacher_service.serve.routes.rows import rows_router
from teacher_service.serve.routes.zarr import zarr_router
from teacher_service.serve.routing import Routes, RouteTable
from teacher_service.serve.service import Service
from teacher_service.serve.tokens import TokenFile

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
        service: The service; loaded by the application's lifespan, or before.
        tokens: Known tokens; None without authentication.
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
        redoc_url=None, docs_url=None, openapi_url=None,
    )  # fmt: skip
    app.state.service = service
    problems.install(app)
    app.add_exception_handler(CorruptStoreError, _corrupt_store)
    config = service.config
    inputs = read_manifest(open_objects(config.store)).inputs if config.tars else None  # the store is opened later
    browse = browse_router(FeatureBrowser(lambda: service.store, config.tars, config, inputs))
    routers = [operations_router(), page_router(), rows_router(), zarr_router(), browse, _compute_router(service)]
    for router in routers:
        app.include_router(router)
    table = RouteTable(rule for router in routers for rule in router.rules)
    # The last one added is the outermost.
    app.add_middleware(HeadMiddleware)
    app.add_middleware(LimitsMiddleware, table=table, limits=service.config.limits)
    app.add_middleware(AuthMiddleware, table=table, tokens=tokens)
    if service.config.cors_origins:  # a browser asks without the token whether it may send one
        app.add_middleware(CORSMiddleware, allow_origins=service.config.cors_origins, **_CORS)
    app.add_middleware(HostMiddleware, local_only=tokens is None and service.config.loopback)
    app.add_middleware(AccessLogMiddleware, table=table, metrics=service.metrics)
    app.state.table = table
    app.openapi = lambda: _openapi(app)
    return app


async def _corrupt_store(request: Request, error: Exception) -> Response:
    """Report a store that was moved away as not ready: it is not damaged and must not be repaired."""
    assert isinstance(error, CorruptStoreError)
    away = await request.app.state.service.away()
    problem = problems.Problem("not-ready", away) if away else problems.problem_of(error)
    return problem.response(problems.request_id(request.scope))


def _compute_router(service: Service) -> Routes:
    if service.live is not None:
        from teacher_service.serve.routes.compute import compute_router  # imports torch

        return compute_router(service.live, max_body_bytes=service.config.limits.max_body_bytes)
    router = Routes()
    for method, path in (("GET", TEACHER), ("POST", COMPUTE)):

        @router.declare(method, path, "compute", include_in_schema=False)
        async def absent() -> Response:
            raise problems.Problem("not-found", "this service has no live teacher; start it with --teacher")

    return router


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's, with the components that routes refer to."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        components = schema.setdefault("components", {})
        components.setdefault("schemas", {})["ProblemDocument"] = problems.ProblemDocument.model_json_schema()
        components["schemas"].update(batches.schema()["$defs"])
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        app.openapi_schema = schema
    return app.openapi_schema


def _version() -> str:
    try:
        return version("scalekd-cache")
    except PackageNotFoundError:  # run from a checkout
        return "0"
