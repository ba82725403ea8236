"""Bodies of batch requests, parsed at a bounded cost."""

import json
from itertools import islice
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    FailFast,
    Field,
    Tag,
    TypeAdapter,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from starlette.datastructures import Headers

from teacher_service.serve.problems import MOST_ERRORS, Problem, invalid_request
from teacher_service.serve.routes.parameters import MAX_INT, VERIFY
from teacher_service.serve.row_frames import require_rows

_MAX_ITEMS = 1 << 16
_FIRST_ITEMS, _GROWTH = 256, 8


def _number(value: Any) -> Any:
    """JSON has one kind of number, 1.0 is an integer; but "1" and true are none."""
    if isinstance(value, str | bool):
        raise ValueError("expected a number")  # noqa: TRY004 - pydantic reports ValueError
    return value


_Exact = Annotated[int, Field(strict=True, ge=0, le=MAX_INT)]
_ROWS: TypeAdapter[list[tuple[int, int, int]]] = TypeAdapter(
    Annotated[list[tuple[_Exact, _Exact, _Exact]], Field(min_length=1, max_length=_MAX_ITEMS), FailFast()]
)


def _from_the_first(items: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """Validate growing prefixes: collecting the errors of 65,536 wrong items would take seconds."""
    try:
        return _ROWS.validate_python(items)  # most bodies, and faster: _number is a call from Rust to Python
    except ValidationError:
        pass
    most = _FIRST_ITEMS
    while isinstance(items, list) and most < len(items):
        validate(items[:most])
        most *= _GROWTH
    return validate(items)


Index = Annotated[int, Field(strict=False, ge=0, le=MAX_INT), BeforeValidator(_number)]
_ARRAY = Field(strict=False)  # JSON has no tuples


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    taps: list[Annotated[str, Field(max_length=64)]] | None = Field(None, max_length=64, examples=[["stage4"]])
    decode: bool = Field(True, description="Values; false for the codec's arrays as stored, which are smaller.")
    verify: bool = Field(False, description=VERIFY)


class BatchByRow(_Strict):
    """Rows by address, in any order."""

    rows: Annotated[
        list[Annotated[tuple[Index, Index, Index], _ARRAY]],
        Field(
            min_length=1, max_length=_MAX_ITEMS, description="Unit, position and view.",
            examples=[[[0, 0, 0], [0, 1, 0]]],
        ),
        WrapValidator(_from_the_first),
    ]  # fmt: skip


class BatchByKey(_Strict):
    """Rows by sample key and view, in any order."""

    keys: Annotated[
        list[Annotated[tuple[Annotated[str, Field(max_length=4096)], Index], _ARRAY]],
        Field(
            min_length=1, max_length=_MAX_ITEMS, description="Sample key and view.",
            examples=[[["n01440764_10026", 0]]],
        ),
        WrapValidator(_from_the_first),
    ]  # fmt: skip


def _kind(asked: Any) -> str:
    return "keys" if isinstance(asked, dict) and "keys" in asked else "rows"


_BATCH: TypeAdapter[BatchByRow | BatchByKey] = TypeAdapter(
    Annotated[Annotated[BatchByRow, Tag("rows")] | Annotated[BatchByKey, Tag("keys")], Discriminator(_kind)]
)
_FIELDS = BatchByRow.model_fields.keys() | BatchByKey.model_fields.keys()


def schema() -> dict[str, Any]:
    """The body's JSON schema; ``$defs`` are OpenAPI's components."""
    return _BATCH.json_schema(ref_template="#/components/schemas/{model}")


def require_json(headers: Headers) -> None:
    """Refuse a body of another type.

    Raises:
        Problem: unsupported-media-type.
    """
    given = headers.get("content-type", "").partition(";")[0].strip().lower()
    if given != "application/json" and not (given.startswith("application/") and given.endswith("+json")):
        raise Problem(
            "unsupported-media-type",
            f"the body is {given or 'of no declared type'!r}, expected JSON; send Content-Type: application/json",
        )


def parse_batch(body: bytes, *, max_rows: int) -> BatchByRow | BatchByKey:
    """Rows and taps that a body requests.

    Raises:
        Problem: malformed, too-large or invalid-request.
    """
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError) as error:
        where = f" at byte {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise Problem("malformed", f"the body is no JSON{where}; see openapi.json") from error
    if isinstance(asked, dict):
        if "check" in asked:
            raise Problem("invalid-request", "body.check is not known; send verify (default false) in its place")
        unknown = islice((name for name in asked if name not in _FIELDS), MOST_ERRORS)
        asked = {name: asked[name] for name in (*(_FIELDS & asked.keys()), *unknown)}
        for items in (asked.get("rows"), asked.get("keys")):
            require_rows(max_rows, len(items) if isinstance(items, list) else 0)
    try:
        return _BATCH.validate_python(asked)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        raise invalid_request([{**each, "loc": ("body", *each["loc"])} for each in found]) from None
