"""Routes of the store's zarr objects, with the later blocks."""

import asyncio
import json
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any

from fastapi import Header, Path
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool

from feature_store.client import frames
from feature_store.read.blocks import read_blocks
from teacher_service.serve.conditions import not_modified, parse_range, require_match
from teacher_service.serve.responses import StreamedResponse, frame_response, read_ahead
from teacher_service.serve.routes.parameters import Conditional, Served, frame_answer
from teacher_service.serve.routing import Routes
from teacher_service.serve.service import Service, StoreSnapshot
from teacher_service.serve.zarr_files import ServedObject, find_object

_PIECE = 4 << 20
_HEADER, _BINARY = {"schema": {"type": "string"}}, {"schema": {"type": "string", "format": "binary"}}
_OBJECT: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The object",
        "headers": {"ETag": _HEADER, "Accept-Ranges": _HEADER},
        "content": {"application/octet-stream": _BINARY, "application/json": {"schema": {}}},
    },
    206: {
        "description": "The bytes asked for",
        "headers": {"ETag": _HEADER, "Content-Range": _HEADER},
        "content": {"application/octet-stream": _BINARY, "application/json": _BINARY},
    },
    304: {"description": "The client has these bytes", "headers": {"ETag": _HEADER}},
}
ObjectPath = Annotated[
    str,
    Path(max_length=4096, description="Path below the store's root.", examples=["zarr.json", "taps/stage4/zarr.json"]),
]


def zarr_router() -> Routes:
    """The routes."""
    router = Routes("store")
    reading_blocks = asyncio.Lock()  # how much memory they take is known when they are read

    @router.declare(
        "GET",
        "/v1/blocks",
        "read",
        problems=["too-large", "corrupt-store", "not-ready", "resource"],
        responses=frame_answer(
            "A frame (safetensors): the later blocks' tensors by name; metadata `sha256` (the manifest's "
            "`blocks_sha256`), `split` and `teacher` as JSON, `store` (its identity)."
        )
        | {304: _OBJECT[304]},
        response_class=Response,
    )
    async def later_blocks(service: Served, if_none_match: Conditional = None) -> Response:
        """The teacher's later blocks, weights exactly as they were."""
        opened = service.opened
        tag = f'"{opened.store.manifest.blocks_sha256[:32]}"'
        if (same := not_modified(tag, if_none_match)) is not None:
            return same
        async with reading_blocks:
            frame = await run_in_threadpool(_blocks_frame, service, opened)
        return frame_response(frame, {"ETag": tag, "Cache-Control": "private, no-cache"})

    async def zarr_object(
        service: Served,
        path: ObjectPath,
        range_header: Annotated[str | None, Header(alias="range", description="One range of bytes.")] = None,
        if_none_match: Conditional = None,
        if_match: Conditional = None,
        if_range: Conditional = None,
    ) -> Response:
        """An object of the zarr hierarchy: `zarr.open("http://host/v1/zarr")` works with any zarr v3 client.

        404 means that nothing is committed there, and a client reads fill values; 410 that something should be.
        """
        found = await run_in_threadpool(find_object, service.opened, path)
        try:
            require_match(found.etag, if_match)
            if (same := not_modified(found.etag, if_none_match)) is not None:
                found.close()
                return same
            wanted = parse_range(range_header if if_range in (None, found.etag) else None, found.size)
            return _object_response(service, found, path, wanted)
        except BaseException:
            found.close()
            raise

    for method in ("GET", "HEAD"):
        router.declare(
            method,
            "/v1/zarr/{path:path}",
            "read",
            problems=(
                "not-found", "object-missing", "precondition-failed", "range-not-satisfiable", "corrupt-store",
                "not-ready", "resource",
            ),
            responses=_OBJECT,
            response_class=Response,
            operation_id=f"{method.lower()}_zarr_object",
        )(zarr_object)  # fmt: skip
    return router


def _blocks_frame(service: Service, opened: StoreSnapshot) -> frames.Frame:
    manifest = opened.store.manifest
    tensors = read_blocks(opened.store.objects)
    reservation = service.memory.reserve(sum(tensor.nbytes for tensor in tensors.values()))
    for tensor in tensors.values():
        reservation.bind(tensor)
    strings = {
        "sha256": manifest.blocks_sha256,
        "split": json.dumps(asdict(manifest.split)),
        "teacher": json.dumps(asdict(manifest.teacher)),
        "store": manifest.identity(),
    }
    return frames.encode(tensors, strings)


def _object_response(service: Service, found: ServedObject, path: str, wanted: range | None) -> Response:
    span = range(found.size) if wanted is None else wanted
    headers = {
        "ETag": found.etag,
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, no-cache",
    }
    if wanted is not None:
        headers["Content-Range"] = f"bytes {span.start}-{span.stop - 1}/{found.size}"
    kind = "application/json" if path.endswith(".json") else "application/octet-stream"
    reservation = service.memory.reserve(min(len(span), 3 * _PIECE))  # one sent, one read, one released

    def read(start: int) -> memoryview:
        memory = memoryview(service.memory.array(min(_PIECE, span.stop - start), reservation))
        found.read(start, memory)
        return memory

    readers = (partial(read, start) for start in range(span.start, span.stop, _PIECE))
    status = 200 if wanted is None else 206
    return StreamedResponse(
        read_ahead(readers), len(span), status=status, headers=headers, media_type=kind, close=found.close
    )
