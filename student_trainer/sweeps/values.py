"""Configs out of YAML: a file's values, merged and checked as strictly as a command line's."""

import difflib
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from feature_store.errors import InputError

T = TypeVar("T")


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars, so that ``off`` is a word and ``1e-3`` a number; a key given twice is an error."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own way to say it
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] in ("null", "int", "merge")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]  # pyright: ignore[reportUnknownMemberType]
        twice = [key for i, key in enumerate(keys) if key in keys[:i]]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_FLOAT = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|false)$"), list("tf"))


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text.

    Raises:
        InputError: Not YAML; the message says where.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # nosec B506 # a SafeLoader
    except yaml.YAMLError as error:
        raise InputError(f"{where} is not YAML: {' '.join(str(error).split())}") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping a YAML file holds.

    Raises:
        InputError: No such file, not YAML, or not a mapping.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise InputError(f"{path} holds a {type(values).__name__}, expected a mapping of names to values")
    return values


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Later layers over earlier ones, nested mappings merged, everything else replaced."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.items():
            old = merged.get(name)
            both = isinstance(old, Mapping) and isinstance(value, Mapping)
            merged[name] = merge(old, value) if both else value  # pyright: ignore[reportArgumentType]
    return merged


def parse_assignments(assignments: Sequence[str], option: str) -> dict[str, Any]:
    """``["optim.lr=0.1"]`` as ``{"optim": {"lr": 0.1}}``; values are YAML.

    Raises:
        InputError: No ``=``, or a value that is not YAML.
    """
    values: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not name:
            raise InputError(f"{option} {assignment!r} assigns nothing; expected NAME=VALUE, e.g. optim.lr=0.1")
        value = parse_yaml(text, f"{option} {name}")
        for part in reversed(name.split(".")):
            value = {part: value}
        values = merge(values, value)
    return values


def build_config(kind: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """A config dataclass from plain values, inverse of ``config_to_dict``.

    Args:
        kind: The dataclass.
        values: Its fields; nested dataclasses as mappings, tuples as lists, paths as text.
        where: What to put before names in messages, e.g. ``sweep.yaml: CAP: ``.

    Raises:
        InputError: A name that is no field, a field missing, or a value of another kind.
    """
    known = {field.name: field for field in fields(kind)}  # pyright: ignore[reportArgumentType]
    for name in values:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(known)}"
            raise InputError(f"{where}{name} is no setting of a run; {hint}")
    for name, field in known.items():
        if name not in values and field.default is MISSING and field.default_factory is MISSING:
            raise InputError(f"{where}{name} is missing; set it in the file or with --set {name}=...")
    hints = get_type_hints(kind)
    return kind(**{name: _value(hints[name], value, f"{where}{name}") for name, value in values.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    """A plain value as what a field's type says."""
    options, origin = get_args(hint), get_origin(hint)
    if origin in (Union, UnionType):
        if value is None and NoneType in options:
            return None
        hint = next(option for option in options if option is not NoneType)  # of text and path, text: it may be a URL
        return _value(hint, value, where)
    if is_dataclass(hint):
        return build_config(hint, _require(value, Mapping, where, "a mapping"), f"{where}.")  # pyright: ignore[reportArgumentType]
    if origin is Literal:
        if value not in options:
            raise InputError(f"{where} is {value!r}, expected one of {', '.join(map(str, options))}")
        return value
    if origin is tuple:
        if options == (str, ...) and isinstance(value, str):  # one brace pattern; in a YAML list it needs quotes
            return (value,)
        return _tuple(options, _require(value, (list, tuple), where, "a list"), where)
    return _plain(origin or hint, value, where)


def _tuple(options: tuple[Any, ...], values: Sequence[Any], where: str) -> tuple[Any, ...]:
    if options[-1] is Ellipsis:
        options = options[:1] * len(values)
    if len(values) != len(options):
        raise InputError(f"{where} has {len(values)} values, expected {len(options)}")
    return tuple(
        _value(hint, value, f"{where}[{i}]") for i, (hint, value) in enumerate(zip(options, values, strict=True))
    )


_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
    dict: "a mapping",
}


def _plain(hint: type, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is int and isinstance(value, bool):
        raise InputError(f"{where} is {value}, expected a whole number")
    return _require(value, hint, where, _WORDS.get(hint, hint.__name__))


def _require(value: Any, kind: type | tuple[type, ...], where: str, words: str) -> Any:
    if not isinstance(value, kind):
        raise InputError(f"{where} is {value!r}, expected {words}")
    return value
