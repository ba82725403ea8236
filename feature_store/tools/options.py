"""Option types of the command lines."""

import json
import os
from typing import Annotated, Any

from tyro.constructors import PrimitiveConstructorSpec

from feature_store.errors import InputError


def _json_object(arguments: list[str]) -> dict[str, Any]:
    try:
        value = json.loads(arguments[0])
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {value!r}")  # noqa: TRY004 - tyro reports ValueError
    return value


JsonObject = Annotated[
    dict[str, Any],
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="JSON",
        instance_from_str=_json_object,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [json.dumps(value)],
    ),
]


def require(condition: bool, option: str, got: object, expected: str) -> None:
    """Refuse an option's value.

    Raises:
        InputError: The condition does not hold.
    """
    if not condition:
        raise InputError(f"{option} is {got}, expected {expected}")


def environment_number(name: str, default: int) -> int:
    """A whole number from an environment variable; the default where it is unset or empty.

    Raises:
        InputError: It is something else.
    """
    value = os.environ.get(name, "").strip()
    require(not value or value.isdecimal(), f"the environment variable {name}", repr(value), "a whole number; unset it")
    return int(value or default)
