"""Parameters that several routes take."""

from typing import Annotated, Any

from fastapi import Depends, Header, Path, Query

from feature_store.client import frames
from teacher_service.serve.service import Service, service_of

MAX_INT = 2**31 - 1
TEACHER, COMPUTE = "/v1/teacher", "/v1/features:compute"
VERIFY = (
    "Read and check every row before the status line. Otherwise a damaged row of a response of more than 2 MiB "
    "ends the connection; ask again with true for the problem that names the row."
)
Unit = Annotated[int, Path(ge=0, le=MAX_INT, description="Unit: index of its tar.", examples=[0])]
View = Annotated[int, Path(ge=0, le=MAX_INT, description="View: index of the augmented crop.", examples=[0])]
Taps = Annotated[
    str | None,
    Query(description="Tap names, comma separated; default all.", max_length=256, examples=["stage4"]),
]
Decode = Annotated[bool, Query(description="Values; false for the codec's arrays as stored, which are smaller.")]
Verify = Annotated[bool, Query(description=VERIFY)]
Conditional = Annotated[str | None, Header()]
Served = Annotated[Service, Depends(service_of)]


def frame_answer(description: str) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's entry of a response that is a frame."""
    binary = {"type": "string", "format": "binary"}
    return {200: {"description": description, "content": {frames.MEDIA_TYPE: {"schema": binary}}}}
