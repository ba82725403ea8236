"""YAML values: read, merged, assigned by name."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from feature_store.errors import InputError


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML 1.2 text: ``off`` is text, ``1e-3`` a number; a key given twice is an error.

    Raises:
        InputError: Not YAML; the message says where.
    """
    try:
        return YAML(typ="safe", pure=True).load(text)  # the C parser reads YAML 1.1
    except YAMLError as error:
        reason = str(error)
        if isinstance(error, MarkedYAMLError) and error.problem and error.problem_mark:
            reason = f"line {error.problem_mark.line + 1}: {error.problem}"
        raise InputError(f"{where} is not YAML: {' '.join(reason.split())}") from error


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
