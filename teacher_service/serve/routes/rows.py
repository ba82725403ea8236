"""Routes of cached rows: manifest, one row, a batch, a unit."""

import asyncio
import hashlib
import json
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

import numpy as np
from fastapi import Path, Query, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool

from feature_store.commits.record import CommitRecord
from feature_store.errors import InputError
from feature_store.tools.terminal import json_text
from teacher_service.serve.conditions import not_modified
from teacher_service.serve.problems import Problem
from teacher_service.serve.responses import in_thread, unless_gone
from teacher_service.serve.routes.batch_bodies import (
    BatchByKey,
    BatchByRow,
    parse_batch,
    require_json,
    schema,
)
from teacher_service.serve.routes.parameters import (
    MAX_INT,
    Conditional,
    Decode,
    Served,
    Taps,
    Unit,
    Verify,
    View,
    frame_answer,
)
from teacher_service.serve.routing import Routes
from teacher_service.serve.row_frames import require_rows, rows_response
from teacher_service.serve.service import Service, StoreSnapshot

_SMALL_BODY = 16 << 10  # parsed by the event loop; a larger one would keep others waiting
_ANSWER_VERSION = 1  # part of every ETag: another one whenever the same rows are sent as other bytes


_ROWS = frame_answer(
    "A frame (safetensors): an array [B, N, C] per tap, `logits` [B, K], `rows` int64 [B, 3] with unit, position and "
    "view of each; metadata `store` (its identity) and `crc32c.<array>`."
)
_ETAG = {"ETag": {"description": "Of these bytes; send it as If-None-Match", "schema": {"type": "string"}}}
_NOT_MODIFIED: dict[int | str, dict[str, Any]] = {304: {"description": "The client has these bytes", "headers": _ETAG}}

_READ = ("unknown-tap", "uncommitted", "too-large", "corrupt-store", "not-ready", "resource")
_BATCH_BODY = {
    "requestBody": {"required": True, "content": {"application/json": {"schema": {"oneOf": schema()["oneOf"]}}}}
}


class Committed(BaseModel):
    """Committed part of the store."""

    units: int = Field(description="Units with at least one committed view")
    views: int = Field(description="Units times views that are committed")
    of_units: int
    of_views: int


class Described(BaseModel):
    """Manifest, committed part and limits, as a client needs them."""

    identity: str = Field(description="Names the store; the same for as long as it only grows")
    fingerprint: str = Field(description="sha256 of the manifest; another one once the store has grown")
    manifest: dict[str, Any] = Field(description="See feature_store/FORMAT.md")
    committed: Committed
    row_bytes: int = Field(description="Bytes of one undecoded row with all taps")
    max_rows: int = Field(description="Most rows of one answer")
    max_response_bytes: int = Field(description="Most bytes of one answer")
    live: bool = Field(description="Whether POST /v1/features:compute is there")


def rows_router() -> Routes:
    """The routes."""
    router = Routes("cached rows")
    parsing = asyncio.Lock()  # of large bodies: objects of one take many times its bytes

    @router.declare("GET", "/v1/manifest", "read", problems=["not-ready"], response_model=Described)
    async def manifest(service: Served) -> Response:
        """The store's manifest, its committed part, and the limits of a request."""
        described = _described(service, service.opened)
        return Response(json_text(described.model_dump()), media_type="application/json")  # names may not be UTF-8

    @router.declare(
        "GET",
        "/v1/rows/{key:path}",
        "read",
        problems=["unknown-key", "quarantined", *_READ],
        responses=_ROWS,
        response_class=Response,
    )
    async def row(
        service: Served,
        request: Request,
        key: Annotated[
            str, Path(min_length=1, max_length=4096, description="Sample key.", examples=["n01440764_10026"])
        ],
        view: Annotated[int, Query(ge=0, le=MAX_INT, description="View.")] = 0,
        taps: Taps = None,
        decode: Decode = True,
        verify: Verify = False,
    ) -> Response:
        """One row by sample key."""
        opened = service.opened
        names = _known(opened, None if taps is None else taps.split(","))

        def answer() -> Response:
            return rows_response(service, opened, _found(opened, [(key, view)]), names, decode=decode, verify=verify)

        return await in_thread(request.receive, answer)

    @router.declare(
        "POST",
        "/v1/rows:batch",
        "read",
        problems=["unknown-key", "quarantined", "request-timeout", "unsupported-media-type", *_READ],
        responses=_ROWS,
        openapi_extra=_BATCH_BODY,
        response_class=Response,
    )
    async def batch(service: Served, request: Request) -> Response:
        """Many rows, in the order asked for; repeats are allowed."""
        opened = service.opened
        require_json(request.headers)
        body = await request.body()
        parse = partial(parse_batch, body, max_rows=service.config.limits.max_rows)

        async def parsed() -> BatchByRow | BatchByKey:
            async with parsing:
                return await run_in_threadpool(parse)

        asked = parse() if len(body) <= _SMALL_BODY else await unless_gone(request.receive, parsed())
        return await in_thread(request.receive, _batch_response, service, opened, asked)

    @router.declare(
        "GET",
        "/v1/units/{unit}/views/{view}",
        "read",
        problems=_READ,
        responses=_ROWS | _NOT_MODIFIED,
        response_class=Response,
    )
    async def unit_range(
        service: Served,
        request: Request,
        unit: Unit,
        view: View,
        start: Annotated[int, Query(ge=0, le=MAX_INT, description="First position.")] = 0,
        count: Annotated[int, Query(ge=1, le=MAX_INT, description="Positions; quarantined ones are left out.")] = 256,
        taps: Taps = None,
        decode: Decode = True,
        verify: Verify = False,
        if_none_match: Conditional = None,
    ) -> Response:
        """A unit's readable rows in position order. The bytes never change: keep them by their ETag."""
        opened = service.opened
        names = _known(opened, None if taps is None else taps.split(","))
        record = _record(opened, unit, view)
        positions = record.rows(view)[:, 1]
        rows = record.rows(view)[(start <= positions) & (positions < start + count)]
        require_rows(service.config.limits.max_rows, len(rows))
        tag = _etag(opened, record, view, [unit, view, start, count, names, decode])
        if (same := not_modified(tag, if_none_match)) is not None:
            return same
        headers = {"ETag": tag, "Cache-Control": "private, no-cache"}
        answer = partial(rows_response, decode=decode, verify=verify, headers=headers)
        return await in_thread(request.receive, answer, service, opened, rows, names)

    return router


def _described(service: Service, opened: StoreSnapshot) -> Described:
    manifest, committed, limits = opened.store.manifest, opened.store.committed, service.config.limits
    return Described(
        identity=manifest.identity(),
        fingerprint=manifest.fingerprint(),
        manifest=manifest.to_dict(),
        committed=Committed(
            units=len(committed.units),
            views=committed.places,
            of_units=len(manifest.tars),
            of_views=len(manifest.tars) * manifest.num_views,
        ),
        row_bytes=opened.source.row_bytes(),
        max_rows=limits.max_rows,
        max_response_bytes=limits.max_response_bytes,
        live=service.live is not None,
    )


def _batch_response(service: Service, opened: StoreSnapshot, asked: BatchByRow | BatchByKey) -> Response:
    names = _known(opened, asked.taps)
    by_key = isinstance(asked, BatchByKey)
    rows = _found(opened, asked.keys) if by_key else np.array(asked.rows, np.int64).reshape(-1, 3)
    return rows_response(service, opened, rows, names, decode=asked.decode, verify=asked.verify)


def _found(opened: StoreSnapshot, keys: Sequence[tuple[str, int]]) -> np.ndarray:
    try:
        rows = opened.store.rows([key for key, _ in keys], 0)
    except InputError as error:
        raise Problem("unknown-key", str(error)) from error
    rows[:, 2] = [view for _, view in keys]
    return rows


def _known(opened: StoreSnapshot, taps: Sequence[str] | None) -> tuple[str, ...]:
    stored = opened.source.tap_names
    for name in taps or ():
        if name not in stored:
            raise Problem("unknown-tap", f"the store has no tap {name!r}; it has: {', '.join(stored)}")
    return stored if taps is None else tuple(dict.fromkeys(taps))


def _record(opened: StoreSnapshot, unit: int, view: int) -> CommitRecord:
    try:
        return opened.store.committed.record(unit, view)
    except InputError as error:
        raise Problem("uncommitted", str(error)) from error


def _etag(opened: StoreSnapshot, record: CommitRecord, view: int, asked: list[Any]) -> str:
    """A strong tag: the store, the checksums of everything that decides the bytes, and what was asked for."""
    manifest = opened.store.manifest
    tables = [spec.checksums.object_path(record.unit, view) for spec in opened.store.layout.per_view if spec.sharded]
    proofs = [(path, record.proof(path).crc32c) for path in tables]
    text = json.dumps([_ANSWER_VERSION, manifest.identity(), sorted(record.quarantined), proofs, asked])
    return f'"{hashlib.sha256(text.encode()).hexdigest()[:32]}"'
