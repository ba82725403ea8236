"""Routes of probes, metrics, the OpenAPI description."""

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from teacher_service.serve import metrics
from teacher_service.serve.problems import Problem
from teacher_service.serve.routes.parameters import Served
from teacher_service.serve.routing import Routes


class Health(BaseModel):
    """An answer to a probe."""

    status: str = Field(examples=["ok"])


def operations_router() -> Routes:
    """The routes."""
    router = Routes("operations")

    @router.declare("GET", "/livez", None, probe=True)
    async def livez() -> Health:
        """Liveness: restart the process if this fails."""
        return Health(status="ok")

    @router.declare("GET", "/readyz", None, probe=True, problems=["not-ready"])
    async def readyz(service: Served) -> Health:
        """Readiness: 503 while loading or draining, or after the device or the store was lost."""
        if reason := service.not_ready or await service.away():
            raise Problem("not-ready", reason)
        return Health(status="ok")

    @router.declare(
        "GET",
        "/metrics",
        "admin",
        probe=True,
        response_class=Response,
        responses={
            200: {"description": "Prometheus' text format", "content": {"text/plain": {"schema": {"type": "string"}}}}
        },
    )
    def scrape(service: Served) -> Response:
        """Requests, bytes, queue, batches, latencies, memory: of all workers together."""
        return Response(service.metrics.text(), media_type=metrics.CONTENT_TYPE)

    @router.declare("GET", "/openapi.json", "read", include_in_schema=False)
    def openapi(request: Request) -> Response:
        """This description."""
        return JSONResponse(request.app.openapi())

    return router
