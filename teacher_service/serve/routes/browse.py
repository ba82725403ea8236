"""Routes under ``/v1/browse``: store, progress, single rows for a viewer."""

import io
import time
from typing import Annotated, Any

import numpy as np
from fastapi import Path, Query
from fastapi.responses import Response
from PIL import Image
from pydantic import BaseModel, BeforeValidator, Field
from starlette.concurrency import run_in_threadpool

from feature_store.format.addressing import RowId
from feature_store.store import Store
from feature_store.tools.terminal import printable
from teacher_service.serve.feature_browser import TAP, FeatureBrowser, Prediction, predictions
from teacher_service.serve.problems import Problem
from teacher_service.serve.routes.parameters import MAX_INT, Served, Unit, View
from teacher_service.serve.routing import Routes
from teacher_service.serve.service import Service

_SHOWN_CLASSES, _SHOWN_NEIGHBOURS = 5, 8
Shown = Annotated[str, BeforeValidator(printable)]
"""Text from outside: names of files may hold what has no form in UTF-8, and overrides of the direction of writing."""
Position = Annotated[int, Path(ge=0, le=MAX_INT, description="Position in the unit.", examples=[0])]
First = Annotated[int, Query(ge=0, le=MAX_INT, description="First entry.")]
Count = Annotated[int, Query(ge=1, le=500, description="Most entries.")]
_ROW_PROBLEMS = ("uncommitted", "quarantined", "corrupt-store", "not-ready", "resource")
_BASE = "/v1/browse"
_ROW = _BASE + "/units/{unit}/views/{view}/rows/{position}"
_PICTURE: dict[int | str, dict[str, Any]] = {
    200: {"description": "A picture", "content": {"image/png": {"schema": {"type": "string", "format": "binary"}}}}
}


class Summary(BaseModel):
    """Summary of the store."""

    teacher: Shown
    weights: str = Field(description="sha256 of the teacher's weights")
    input_size: list[int]
    classes: int
    taps: dict[str, str]
    logits: Shown
    views: Shown
    units: int
    samples: int
    rows: int = Field(description="Committed rows")
    of_rows: int
    bytes: int
    objects: int
    quarantined: int
    num_views: int
    fingerprint: str
    licence: Shown
    live: bool = Field(description="Whether the service computes features too")
    pixels: bool = Field(description="Whether views can be shown")


class Activity(BaseModel):
    """Counters since the service began; rates are differences of two answers."""

    seconds: float = Field(description="This machine's clock")
    requests: float
    bytes: float
    rows: float = Field(description="Cached rows served")
    computed: float = Field(description="Views through the live teacher")
    queue: float = Field(description="Views that wait for it")
    committed: int = Field(description="Units times views that may be read")
    of_committed: int


class UnitEntry(BaseModel):
    """One tar."""

    unit: int
    tar: Shown
    samples: int
    views: list[int] = Field(description="Committed views")


class Units(BaseModel):
    """Some of the tars."""

    units: list[UnitEntry]
    total: int


class SampleEntry(BaseModel):
    """One sample of a tar."""

    position: int
    key: Shown
    label: int
    quarantined: bool


class Samples(BaseModel):
    """Some of a tar's samples."""

    samples: list[SampleEntry]
    total: int


class NeighbourEntry(BaseModel):
    """A row that is like another one."""

    unit: int
    position: int
    view: int
    key: Shown
    similarity: float


class RowEntry(BaseModel):
    """One row, to look at."""

    unit: int
    position: int
    view: int
    tar: Shown
    key: Shown
    label: int
    classes: list[Prediction]
    neighbours: list[NeighbourEntry]


class QuarantineEntry(BaseModel):
    """A sample that could not be used."""

    tar: Shown
    position: int
    key: Shown
    reason: Shown


class Quarantine(BaseModel):
    """Some of the samples that could not be used."""

    samples: list[QuarantineEntry]
    total: int


def browse_router(browser: FeatureBrowser) -> Routes:
    """The routes.

    Args:
        browser: Looks at rows.
    """
    router = Routes("browse")

    @router.declare("GET", f"{_BASE}/summary", "read", problems=["not-ready"])
    def summary(service: Served) -> Summary:
        """Summary of the store's content."""
        return _summary(service, browser)

    @router.declare("GET", f"{_BASE}/activity", "read", problems=["not-ready"])
    def activity(service: Served) -> Activity:
        """Committed rows, and totals of this service's work."""
        return _activity(service)

    @router.declare("GET", f"{_BASE}/units", "read", problems=["not-ready"])
    def units(service: Served, first: First = 0, count: Count = 100) -> Units:
        """Tars and their committed views."""
        store = service.store
        tars = store.manifest.tars
        numbers = range(first, min(first + count, len(tars)))
        return Units(units=[_unit(store, unit) for unit in numbers], total=len(tars))

    @router.declare("GET", _BASE + "/units/{unit}/samples", "read", problems=_ROW_PROBLEMS)
    def samples(service: Served, unit: Unit, first: First = 0, count: Count = 24) -> Samples:
        """Samples of a committed tar."""
        return _samples(service.store, unit, first, count)

    @router.declare("GET", _ROW, "read", problems=_ROW_PROBLEMS)
    def row(service: Served, unit: Unit, view: View, position: Position) -> RowEntry:
        """A row's most probable classes, and the nearest rows among a subset of the store."""
        return _row(service.store, browser, _known(service.store, RowId(unit, position, view)))

    @router.declare(
        "GET", f"{_ROW}/map.png", "read", problems=_ROW_PROBLEMS, responses=_PICTURE, response_class=Response
    )
    async def colours(service: Served, unit: Unit, view: View, position: Position) -> Response:
        """A row's features as colours, a pixel per token; a colour means the same in every row."""
        row = _known(service.store, RowId(unit, position, view))
        return await run_in_threadpool(lambda: _picture(browser.colours(row)))

    @router.declare(
        "GET",
        f"{_ROW}/view.png",
        "read",
        problems=[*_ROW_PROBLEMS, "not-found"],
        responses=_PICTURE,
        response_class=Response,
    )
    async def pixels(service: Served, unit: Unit, view: View, position: Position) -> Response:
        """A row's view, made from its tar and compared with what the teacher saw."""
        if not browser.has_pixels:
            raise Problem("not-found", "this service has no tars to show views from; start it with --tars")
        row = _known(service.store, RowId(unit, position, view))
        return await run_in_threadpool(lambda: _picture(browser.pixels(row)))

    @router.declare("GET", f"{_BASE}/quarantine", "read", problems=["not-ready"])
    def quarantine(service: Served, first: First = 0, count: Count = 100) -> Quarantine:
        """Samples that could not be used, and why."""
        found = service.opened.summary["quarantined"]
        return Quarantine(samples=[QuarantineEntry(**each) for each in found[first : first + count]], total=len(found))

    return router


def _summary(service: Service, browser: FeatureBrowser) -> Summary:
    opened = service.opened
    manifest, found = opened.store.manifest, opened.summary
    teacher, policy = manifest.teacher, manifest.policy
    return Summary(
        teacher=teacher.name,
        weights=teacher.weights_sha256,
        input_size=list(teacher.input_size),
        classes=teacher.num_classes,
        taps={
            name: f"{tap.tokens} tokens x {tap.channels} channels, {tap.codec}" for name, tap in manifest.taps.items()
        },
        logits=manifest.logits_codec or "none",
        views=f"{manifest.num_views} by policy {policy.name}, {policy.size[0]} x {policy.size[1]} pixels, "
        f"seed {manifest.seed}",
        units=len(manifest.tars),
        samples=found["samples"],
        rows=found["committed_rows"],
        of_rows=found["samples"] * manifest.num_views,
        bytes=found["bytes"],
        objects=found["objects"],
        quarantined=len(found["quarantined"]),
        num_views=manifest.num_views,
        fingerprint=found["fingerprint"],
        licence=manifest.licence,
        live=service.live is not None,
        pixels=browser.has_pixels,
    )


def _activity(service: Service) -> Activity:
    totals = service.metrics.totals()
    manifest = service.store.manifest
    return Activity(
        seconds=time.monotonic(),
        requests=totals.get("scalekd_http_requests_total", 0),
        bytes=totals.get("scalekd_http_response_bytes_total", 0),
        rows=totals.get("scalekd_rows_total", 0),
        computed=totals.get("scalekd_batch_rows_sum", 0),
        queue=totals.get("scalekd_queue_rows", 0),
        committed=int(totals.get("scalekd_committed_views", 0)),
        of_committed=len(manifest.tars) * manifest.num_views,
    )


def _unit(store: Store, unit: int) -> UnitEntry:
    tar = store.manifest.tars[unit]
    return UnitEntry(unit=unit, tar=tar.name, samples=tar.samples, views=sorted(store.committed_views(unit)))


def _known(store: Store, row: RowId) -> RowId:
    """The row, of a unit there is."""
    if row.unit >= len(store.manifest.tars):
        raise Problem(
            "uncommitted", f"there is no unit {row.unit}: the store has units 0..{len(store.manifest.tars) - 1}"
        )
    return row


def _samples(store: Store, unit: int, first: int, count: int) -> Samples:
    _known(store, RowId(unit, 0, 0))
    if not store.committed_views(unit):
        raise Problem("uncommitted", f"unit {unit} ({store.manifest.tars[unit].name}) is not committed yet")
    keys, labels, quarantined = store.keys(unit), store.labels(unit), store.quarantined(unit)
    positions = range(first, min(first + count, len(keys)))
    entries = [
        SampleEntry(position=at, key=keys[at], label=int(labels[at]), quarantined=at in quarantined) for at in positions
    ]
    return Samples(samples=entries, total=len(keys))


def _row(store: Store, browser: FeatureBrowser, row: RowId) -> RowEntry:
    batch = browser.read(row)
    features = batch.taps[TAP][0].astype(np.float32)
    classes = [] if batch.logits is None else predictions(batch.logits[0], _SHOWN_CLASSES)
    neighbours = browser.sample().neighbours(row, features, _SHOWN_NEIGHBOURS)
    return RowEntry(
        **row._asdict(),
        tar=store.manifest.tars[row.unit].name,
        key=store.keys(row.unit)[row.position],
        label=int(store.labels(row.unit)[row.position]),
        classes=classes,
        neighbours=[
            NeighbourEntry(**each.row._asdict(), key=each.key, similarity=each.similarity) for each in neighbours
        ],
    )


def _picture(pixels: np.ndarray) -> Response:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return Response(file.getvalue(), media_type="image/png", headers={"Cache-Control": "private, max-age=3600"})
