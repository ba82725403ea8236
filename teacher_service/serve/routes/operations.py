"""Routes for those who run the service: is it alive, should it get requests, what does it do."""

from fastapi import APIRouter, Response
from pydantic import BaseModel, Field

from teacher_service.serve import metrics
from teacher_service.serve.problems import Problem, documented
from teacher_service.serve.routes.rows import Served


class Health(BaseModel):
    """An answer to a probe."""

    status: str = Field(examples=["ok"])


def operations_router() -> APIRouter:
    """The routes."""
    router = APIRouter(tags=["operations"])

    @router.get("/livez")
    async def livez() -> Health:
        """The process answers; if this fails, restart it."""
        return Health(status="ok")

    @router.get("/readyz", responses=documented("not-ready"))
    async def readyz(service: Served) -> Health:
        """Whether to send requests here: not while loading or draining, nor after the device or the store was lost."""
        if reason := service.not_ready or await service.away():
            raise Problem("not-ready", reason)
        return Health(status="ok")

    @router.get(
        "/metrics",
        response_class=Response,
        responses={
            200: {"description": "Prometheus' text format", "content": {"text/plain": {"schema": {"type": "string"}}}}
        },
    )
    def scrape(service: Served) -> Response:
        """Requests, bytes, queue, batches, latencies, memory: of all workers together."""
        return Response(service.metrics.text(), media_type=metrics.CONTENT_TYPE)

    return router
