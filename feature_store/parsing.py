"""Strict parsing of JSON into frozen dataclasses, by pydantic."""

import json
import re
import reprlib
import sys
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, ConfigDict, Field, PlainValidator, Strict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from feature_store.errors import InputError, UnknownFieldError

T = TypeVar("T")

_DEPTH = 16
_SHOWN = 3
_UNKNOWN = "unexpected_keyword_argument"

STRICT = ConfigDict(extra="forbid")
"""``__pydantic_config__`` of a dataclass that parse makes; the dataclasses inside it follow."""


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    raise PydanticCustomError("text", "Input should be text")


def _number(value: Any) -> float:
    """Unchanged: 1 and 1.0 have different canonical JSON, so the manifest's hash would change."""
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
        return value
    raise PydanticCustomError("number", "Input should be a finite number")


def _positive(value: float) -> float:
    if value > 0:
        return value
    raise PydanticCustomError("positive", "Input should be a number over 0")


def _shallow(value: Any, depth: int = _DEPTH) -> Any:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if inside and depth == 0:
        raise PydanticCustomError("depth", "Input should be nested at most {depth} deep", {"depth": _DEPTH})
    for each in inside:
        _shallow(each, depth - 1)
    return value


def require_name(value: str) -> str:
    """A name that is one component of an object's path."""
    if re.fullmatch(r"\w[\w.-]*", value):
        return value
    raise PydanticCustomError("name", "Input should be a name of letters, digits, '_', '.' and '-'")


# pydantic takes "2", 2.0 and True for an int unless told otherwise, and refuses lone surrogates, which names of files
# may have. Lists become tuples.
Text = Annotated[str, PlainValidator(_text)]
Number = Annotated[float, PlainValidator(_number)]
Positive = Annotated[Number, AfterValidator(_positive)]
Natural = Annotated[int, Strict(), Field(ge=0, lt=2**63)]
Unsigned32 = Annotated[int, Strict(), Field(ge=0, lt=2**32)]
Unsigned64 = Annotated[int, Strict(), Field(ge=0, lt=2**64)]
Count = Annotated[int, Strict(), Field(ge=1, lt=2**31)]
Json = Annotated[Any, AfterValidator(_shallow)]
"""Any JSON value, not nested deeper than Python's own functions can follow."""


def load_json(raw: bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: It is none, or nested too deep.
    """
    try:
        return json.loads(raw)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def parse(adapter: TypeAdapter[T], data: Any, what: str) -> T:
    """A dataclass from JSON values.

    Args:
        adapter: Of the dataclass.
        data: As load_json gives it.
        what: Name of the value in errors.

    Raises:
        UnknownFieldError: It has a field the dataclass does not have.
        InputError: A field is missing, of another type or out of range. Each is named.
    """
    try:
        return adapter.validate_python(data)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False)
    if unknown := [_path(problem) for problem in problems if problem["type"] == _UNKNOWN]:
        raise UnknownFieldError(
            f"{what} was written by a newer release: field {_some(unknown, repr)} is unknown to this build; use the "
            "release that wrote it"
        )
    raise InputError(f"{what} is not valid: {_some(problems, _told)}; it was not written by this format")


def _path(problem: ErrorDetails) -> str:
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"] if part != "[key]"]
    return "".join(parts).removeprefix(".")


def _told(problem: ErrorDetails) -> str:
    if problem["type"] == "missing":
        return f"field {_path(problem)!r} is missing"
    expected = problem["msg"].removeprefix("Input should be ")
    return f"field {_path(problem)!r} is {reprlib.repr(problem['input'])}, expected {expected}"


def _some(values: list[Any], show: Any) -> str:
    shown = ", ".join(show(value) for value in values[:_SHOWN])
    return shown + (f" and {len(values) - _SHOWN} more" if len(values) > _SHOWN else "")
