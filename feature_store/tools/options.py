"""Option types, checks of option values."""

import difflib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import cache, partial
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro
from pydantic import BeforeValidator, ConfigDict, Discriminator, Tag, TypeAdapter, ValidationError, WrapValidator
from pydantic_core import ErrorDetails, PydanticCustomError
from typing_extensions import TypedDict  # pydantic takes typing's from Python 3.12 on
from tyro.constructors import PrimitiveConstructorSpec

from feature_store.errors import InputError

T = TypeVar("T")


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


def plain_defaults(kind: type[T]) -> type[T]:
    """Class decorator, before ``dataclass``: the help says "default", where tyro says "default if used".

    tyro says so of the options of a dataclass that a function makes a field of another one from.
    """
    hint = tyro.conf.arg(help_behavior_hint="(default: {})".format)
    kind.__annotations__ = {name: Annotated[given, hint] for name, given in kind.__annotations__.items()}
    return kind


def require(condition: bool, option: str, got: object, expected: str) -> None:
    """Refuse an option's value.

    Raises:
        InputError: The condition does not hold.
    """
    if not condition:
        raise InputError(f"{option} is {got}, expected {expected}")


def make_folder(folder: Path, option: str) -> None:
    """Make an option's folder and those above it, where they are missing.

    Raises:
        InputError: A file is in its place.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"{option} is {folder}, expected a folder: there is a file; choose another name") from error


def environment_number(name: str, default: int) -> int:
    """A whole number from an environment variable; the default where it is unset or empty.

    Raises:
        InputError: It is something else.
    """
    value = os.environ.get(name, "").strip()
    require(not value or value.isdecimal(), f"the environment variable {name}", repr(value), "a whole number; unset it")
    return int(value or default)


def check_fields(config: Any, prefix: str = "") -> None:
    """Check every field of a frozen config dataclass against its annotation, first thing in ``__post_init__``.

    Nothing is converted but what a notebook user writes for short: text for a path, one text or a list for a tuple, a
    whole number for a float, a mapping for a nested config. ``tyro.MISSING`` passes: tyro fills it in.

    Args:
        config: The dataclass; its fields are set to the converted values.
        prefix: Prefix of its options on the command line, e.g. ``optim.``.

    Raises:
        InputError: A value of another type, or none of a Literal's; names the option, the value, what is accepted.
    """
    given = {field.name: getattr(config, field.name) for field in fields(config) if field.init}
    given = {name: value for name, value in given.items() if value is not tyro.MISSING}
    try:
        checked = _fields_adapter(type(config)).validate_python(given)
    except ValidationError as error:
        option = partial(_option_name, type(config), prefix)
        raise InputError(_message(error.errors(include_url=False), given, option)) from None
    for name, value in checked.items():
        object.__setattr__(config, name, value)


def build_config(kind: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """A config dataclass from plain values, inverse of ``dataclasses.asdict`` and of its JSON form.

    Of a union of dataclasses, the one that has the given fields is built.

    Args:
        kind: The dataclass.
        values: Its fields; nested dataclasses as mappings, tuples as lists, paths as text.
        where: Prefix of names in messages, e.g. ``sweep.yaml: CAP: ``.

    Raises:
        InputError: A name that is no field, a field missing, or a value that ``check_fields`` refuses.
    """
    try:
        return _config_adapter(kind).validate_python(values)
    except ValidationError as error:
        raise InputError(_message(error.errors(include_url=False), values, lambda path: where + path)) from None


@cache
def _fields_adapter(kind: type) -> TypeAdapter[dict[str, Any]]:
    return TypeAdapter(_record(kind))


@cache
def _config_adapter(kind: type[T]) -> TypeAdapter[T]:
    return TypeAdapter(_checked(kind))


def _record(kind: type) -> Any:
    """The dataclass's fields as a type of strictly checked dictionaries."""
    hints = get_type_hints(kind)
    record: Any = TypedDict(kind.__name__, {name: _checked(hints[name]) for name in _names(kind)}, total=False)  # pyright: ignore
    record.__pydantic_config__ = ConfigDict(strict=True, arbitrary_types_allowed=True)
    return record


def _checked(hint: Any) -> Any:
    """An annotation with the conversions and messages of this module."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return _union(arguments)
    if origin is Literal:
        return Annotated[hint, WrapValidator(partial(_one_of, arguments))]
    if origin is tuple:
        inner = tuple(argument if argument is Ellipsis else _checked(argument) for argument in arguments)
        return Annotated[tuple[inner], BeforeValidator(partial(_as_tuple, arguments))]
    if hint is Path:
        return Annotated[Path, BeforeValidator(lambda value: Path(value) if isinstance(value, str) else value)]
    if is_dataclass(hint):
        return Annotated[_record(hint), WrapValidator(partial(_build, hint))]  # pyright: ignore[reportArgumentType]
    return hint


def _union(members: Sequence[Any]) -> Any:
    if not any(is_dataclass(member) for member in members):
        keep = str in members  # text stays text where both are accepted: it may be a URL
        return Union[tuple(m if keep and m is Path else _checked(m) for m in members)]  # noqa: UP007 - made at run time
    tagged = tuple(Annotated[_checked(member), Tag(str(i))] for i, member in enumerate(members))
    return Annotated[Union[tagged], Discriminator(lambda value: str(_member_of(members, value)))]  # noqa: UP007


def _member_of(members: Sequence[Any], value: Any) -> int:
    """Index of the member of a union that a value is meant for; of a mapping, the dataclass that has its names."""
    classes = [get_origin(member) or member for member in members]
    for i, kind in enumerate(classes):
        if isinstance(kind, type) and isinstance(value, (kind, list) if kind is tuple else kind):
            return i
    configs = [i for i, kind in enumerate(classes) if is_dataclass(kind)]
    return min(configs, key=lambda i: _misfit(classes[i], value)) if isinstance(value, Mapping) else configs[0]


def _misfit(kind: Any, values: Mapping[str, Any]) -> tuple[int, int, int]:
    unknown, missing = _unknown_names(kind, values), _missing_names(kind, values)
    return len([name for name in unknown if not _close(name, _names(kind))]), len(unknown), len(missing)


def _build(kind: Any, value: Any, validate: Callable[[Any], dict[str, Any]]) -> Any:
    if isinstance(value, kind):
        return value
    if isinstance(value, Mapping):
        for name in _unknown_names(kind, value):
            hint = _close(name, _names(kind)) or f"; expected one of {', '.join(_names(kind))}"
            raise PydanticCustomError("name", "is unknown{hint}", {"name": str(name), "hint": hint})
        for name in _missing_names(kind, value):
            raise PydanticCustomError("name", "is missing; give it a value", {"name": name})
    return kind(**validate(value))


def _names(kind: Any) -> list[str]:
    return [field.name for field in fields(kind) if field.init]


def _unknown_names(kind: Any, values: Mapping[str, Any]) -> list[str]:
    return [name for name in values if name not in _names(kind)]


def _missing_names(kind: Any, values: Mapping[str, Any]) -> list[str]:
    required = [f.name for f in fields(kind) if f.init and f.default is MISSING and f.default_factory is MISSING]
    return [name for name in required if name not in values]


def _close(got: object, known: Iterable[object]) -> str:
    close = difflib.get_close_matches(str(got), map(str, known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _one_of(options: Sequence[object], value: Any, validate: Callable[[Any], Any]) -> Any:
    try:
        return validate(value)
    except ValidationError:
        expected = f"one of {', '.join(map(str, options))}{_close(value, options)}"
        raise PydanticCustomError("expected", "{expected}", {"expected": expected}) from None


def _as_tuple(arguments: Sequence[Any], value: Any) -> Any:
    if isinstance(value, str) and arguments == (str, ...):  # one brace pattern
        return (value,)
    if not isinstance(value, list | tuple):
        return value
    if arguments[-1] is not Ellipsis and len(value) != len(arguments):
        raise PydanticCustomError("expected", "{expected}", {"expected": f"{len(arguments)} values"})
    return tuple(value)


_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "Path": "a path",
    "tuple": "a list",
    "dict": "a mapping",
}  # by the class, or the first word of pydantic's type of error


def _message(errors: Sequence[ErrorDetails], values: Mapping[str, Any], name_of: Callable[[str], str]) -> str:
    """The first refused value: its name, value, and everything accepted there."""
    path, error = _path(errors[0]["loc"], values), errors[0]
    if error["type"] == "name":
        name = error.get("ctx", {})["name"]
        return f"{name_of(f'{path}.{name}'.lstrip('.'))} {error['msg']}"
    if "[key]" in error["loc"]:
        path = _path(error["loc"][:-2], values)
        return f"{name_of(path)} has the name {error['input']!r}, expected text; put it in quotes"
    here = [one for one in errors if _path(one["loc"], values) == path]  # of a union, each member's
    expected = (one["msg"] if one["type"] == "expected" else _expected(one) for one in here)
    return f"{name_of(path)} is {error['input']!r}, expected {' or '.join(dict.fromkeys(expected))}"


def _expected(error: ErrorDetails) -> str:
    if error["type"] == "is_instance_of":
        kind = error.get("ctx", {})["class"]
        return _EXPECTED.get(kind, f"a {kind}")
    return _EXPECTED.get(error["type"].partition("_")[0], error["msg"])


def _path(location: Sequence[Any], values: Any) -> str:
    """The place of a value, without pydantic's names of the members of unions."""
    path = ""
    for step in location:
        if isinstance(values, Mapping) and step in values:
            path += f".{step}"
        elif isinstance(values, list | tuple) and isinstance(step, int):
            path += f"[{step}]"
        else:
            continue
        values = values[step]
    return path.lstrip(".")


def _option_name(kind: Any, prefix: str, path: str) -> str:
    """The name on the command line, ``tyro.conf.arg(name=...)`` included."""
    name = path.partition(".")[0].partition("[")[0]
    metadata = getattr(get_type_hints(kind, include_extras=True)[name], "__metadata__", ())
    renamed = next((own for one in metadata if (own := getattr(one, "name", None))), name)
    return f"--{prefix}{renamed}{path[len(name) :]}".replace("_", "-")
