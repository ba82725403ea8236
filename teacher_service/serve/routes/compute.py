"""Routes of the live teacher.

Shape legend: n views, H W pixels, N tokens, C channels, K classes.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import Query, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers

from feature_store.client import frames
from feature_store.errors import InputError
from feature_store.teacher.model import Teacher
from teacher_service.serve.config import Limits
from teacher_service.serve.live.decoders import ImageDecoders
from teacher_service.serve.live.teacher import LOGITS, LiveTeacher, Outputs
from teacher_service.serve.problems import Problem
from teacher_service.serve.responses import frame_response, unless_gone
from teacher_service.serve.routes.parameters import COMPUTE, TEACHER, Taps, frame_answer
from teacher_service.serve.routing import Routes

MAX_IMAGE_PIXELS = 64_000_000  # 0.2 GB as RGB; a larger image is far from anything a teacher sees
TIMEOUT = 60.0
"""Seconds after which a request fails."""
_FRAME_HEADER_BYTES = 4096  # enough for the header of a frame that holds pixels alone
_DTYPES = {"f16": np.float16, "f32": np.float32}
_CROP = r"^\d{1,9},\d{1,9},\d{1,9},\d{1,9}$"

Precision = Annotated[Literal["f16", "f32"], Query(description="Float format of taps and logits in the response.")]
Crop = Annotated[
    str | None,
    Query(description="Of an image: left,top,width,height in its pixels; default the middle.", pattern=_CROP),
]
Flip = Annotated[bool, Query(description="Of an image: mirror it left to right.")]


class TeacherDescription(BaseModel):
    """The live teacher, as a client must know it."""

    identity: str = Field(
        description="Hash of everything that decides how features are computed; in the metadata of every response"
    )
    teacher: dict[str, Any]
    split: dict[str, Any]
    taps: dict[str, list[int]]
    max_batch: int = Field(description="Most views of one forward pass, and of one body: the best number to send")
    max_rows: int = Field(description="Most views of one body")

    model_config = {
        "json_schema_extra": {
            "examples": [
                {
                    "identity": "9f2c",
                    "teacher": {"name": "swin_large_patch4_window7_224", "input_size": [224, 224]},
                    "split": {"family": "swin", "depth": 2},
                    "taps": {"stage4": [49, 1536]},
                    "max_batch": 64,
                    "max_rows": 1024,
                }
            ]
        }
    }


_BODY = {
    "requestBody": {
        "required": True,
        "description": "One encoded image; or a frame with `pixels`, uint8 [n, H, W, 3], views of the teacher's size.",
        "content": {
            "image/*": {"schema": {"type": "string", "format": "binary"}},
            frames.MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}},
        },
    }
}
_ANSWERS = frame_answer(
    "A frame: an array [n, N, C] per tap, `logits` [n, K]; metadata `teacher`: its weights' sha256, `identity`: see "
    "/v1/teacher."
)


def compute_router(
    live: LiveTeacher,
    *,
    max_body_bytes: int = Limits.max_body_bytes,
    timeout: float = TIMEOUT,
    max_pixels: int = MAX_IMAGE_PIXELS,
) -> Routes:
    """Routes over a live teacher.

    Args:
        live: The teacher.
        max_body_bytes: Most bytes of a request's body, see Limits.
        timeout: Seconds after which a request fails.
        max_pixels: Images with more are refused before they are decoded.
    """
    router = Routes("live teacher")
    decoders = ImageDecoders()

    @router.declare("GET", TEACHER, "compute", problems=["not-ready", "resource"])
    async def teacher() -> TeacherDescription:
        """Which teacher computes, what it gives, and how many views may come at once."""
        return TeacherDescription(**describe(live, max_body_bytes))

    @router.declare(
        "POST",
        COMPUTE,
        "compute",
        large_body=True,
        admit=_admission(live, timeout),
        problems=[
            "unknown-tap", "request-timeout", "too-large", "unsupported-media-type", "not-ready", "resource",
            "deadline",
        ],
        responses=_ANSWERS,
        openapi_extra=_BODY,
        response_class=Response,
    )  # fmt: skip
    async def compute(
        request: Request, taps: Taps = None, dtype: Precision = "f16", crop: Crop = None, flip: Flip = False
    ) -> Response:
        """The teacher's taps and logits of an image or of views; requests of all callers are batched together."""
        names = _known(live.taps, taps)
        body, size = await request.body(), live.teacher.info.input_size
        if _media_type(request.headers) == frames.MEDIA_TYPE:
            if crop is not None or flip:
                raise InputError("crop and flip are of images; views are computed as they are sent: cut them before")
            pixels = await run_in_threadpool(_views_of_frame, body)
        else:
            decoding = decoders.view(body, size, max_pixels=max_pixels, crop=crop, flip=flip)
            pixels = await unless_gone(request.receive, decoding)
        outputs = await unless_gone(request.receive, live.batcher.compute(pixels, timeout=timeout))
        return frame_response(await run_in_threadpool(_frame, outputs, names, dtype, live.teacher))

    return router


def _admission(live: LiveTeacher, timeout: float) -> Callable[[Headers], None]:
    """Refuses a request by its headers: a refusal before the body is received costs little.

    It raises what ``Batcher.require_room`` raises for as many views as the body's length allows, or a ResourceError
    while the teacher is loading.
    """

    def admit(headers: Headers) -> None:
        length, batcher = headers.get("content-length", ""), live.batcher
        rows = 1  # an image, or who knows
        if _media_type(headers) == frames.MEDIA_TYPE and length.isdecimal():
            rows = int(length[:20]) // math.prod((*live.teacher.info.input_size, 3))  # its header is shorter than a row
        batcher.require_room(min(max(1, rows), batcher.queue_rows), timeout=timeout)

    return admit


def describe(live: LiveTeacher, max_body_bytes: int) -> dict[str, Any]:
    """The live teacher in JSON's types; see TeacherDescription.

    Raises:
        ResourceError: It is not there (yet).
    """
    teacher = live.teacher
    fitting = max(1, (max_body_bytes - _FRAME_HEADER_BYTES) // math.prod((*teacher.info.input_size, 3)))
    return {
        "identity": _identity(teacher),
        "teacher": asdict(teacher.info),
        "split": asdict(teacher.split),
        "taps": {name: teacher.tap_shapes[name] for name in live.taps},
        "max_batch": min(live.batcher.max_rows, fitting),
        "max_rows": min(live.batcher.queue_rows, fitting),
    }


def _identity(teacher: Teacher) -> str:
    """Identity of a live teacher: differs where the same views may give other numbers."""
    text = json.dumps([asdict(teacher.info), asdict(teacher.split)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _media_type(headers: Headers) -> str:
    """Raises a Problem for a body that is neither an image nor a frame."""
    given = headers.get("content-type", "").partition(";")[0].strip().lower()
    if given == frames.MEDIA_TYPE or given.startswith("image/"):
        return given
    raise Problem(
        "unsupported-media-type",
        f"the body is {given or 'of no declared type'!r}, expected an image or a frame; send an encoded image as "
        f"image/jpeg, or views as {frames.MEDIA_TYPE}",
    )


def _known(taps: Sequence[str], asked: str | None) -> Sequence[str]:
    if asked is None:
        return taps
    names = [name for name in asked.split(",") if name]
    for name in names:
        if name not in taps:
            raise Problem("unknown-tap", f"the teacher has no tap {name!r}; it has: {', '.join(taps)}")
    return names


def _views_of_frame(body: bytes) -> np.ndarray:
    arrays, _ = frames.decode(body)
    if arrays.keys() != {"pixels"}:
        raise InputError(f"the frame holds {', '.join(arrays) or 'nothing'}; expected one array, pixels [n, H, W, 3]")
    return arrays["pixels"]


def _frame(outputs: Outputs, taps: Sequence[str], dtype: str, teacher: Teacher) -> frames.Frame:
    """Copies, so that a slow reader holds its own rows only and not those of the whole batch."""
    names = [*taps, *([LOGITS] if LOGITS in outputs else [])]
    with np.errstate(over="ignore"):  # beyond float16 is inf, as a store of f16 says by refusing it
        arrays = {name: np.array(outputs[name], _DTYPES[dtype]) for name in names}
    return frames.encode(arrays, {"teacher": teacher.info.weights_sha256, "identity": _identity(teacher)})
