"""Class indexes of samples, from members, columns or folder names."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from feature_store.errors import ImageError, InputError
from feature_store.inputs.base import NO_LABEL
from feature_store.inputs.tar_index import CLASS_INDEX, LABEL_EXTENSION, LabelRule

Labels = Literal["required", "optional", "none"]

MEMBERS = ("cls", "txt", "json")
"""Members of tars that hold labels."""

_MOST_DIGITS = 18  # what an int64 holds for certain
_MOST_BYTES = 1 << 20  # of a member with a label
_INDEX = "a class index in decimal digits"


@dataclass(frozen=True)
class LabelReader:
    """Turns what an input says of a sample's class into a class index.

    Attributes:
        policy: Whether samples need labels: ``required``, ``optional``, or ``none`` to read none.
        classes: Class names in order of their indexes; none if labels are indexes.
    """

    policy: Labels = "required"
    classes: Sequence[str] = field(default=())

    @cached_property
    def _indexes(self) -> Mapping[str, int]:
        return {name: index for index, name in enumerate(self.classes)}

    @cached_property
    def _misplaced(self) -> str | None:
        """The first class name that is the number of another class, as 10 is in 0, 1, 10, 2."""
        below = len(self.classes)
        numbers = ((name, index) for index, name in enumerate(self.classes) if _is_number(name))
        return next((name for name, index in numbers if int(name) != index and int(name) < below), None)

    def index(self, value: Any) -> int:
        """Class index of a value: an int, or the text or bytes of a number or class name; NO_LABEL for None and -1.

        Raises:
            ImageError: The sample cannot be used: no label though one is required, or nothing that is a label.
            InputError: All labels are in doubt: the index is above the classes', or classes are named by the numbers of
                others, so that a number in a text may be a name or an index.
        """
        if self.policy == "none":
            return NO_LABEL
        text = value.decode(errors="replace").strip() if isinstance(value, bytes) else value
        text = text.strip() if isinstance(text, str) else text
        if text is None or text == NO_LABEL or (text == "-1" and self.policy == "optional"):
            if self.policy == "optional":
                return NO_LABEL
            raise ImageError(f"no label: it is {text}, expected {self._expected}")
        if isinstance(text, str) and self._misplaced is not None and _is_number(text):
            raise InputError(
                f"label {text!r} may be a class name or a class index: class {self._misplaced!r} has the index "
                f"{self._indexes[self._misplaced]}, expected names that are no numbers, or number n for class n; give "
                "the class folders in place of these labels, leave --classes out if they are indexes, or rename the "
                "classes"
            )
        if isinstance(text, str) and text in self._indexes:
            return self._indexes[text]
        return self._number(value.strip() if isinstance(value, bytes) else text)

    def _number(self, value: Any) -> int:
        digits = value if isinstance(value, bytes) else str(value).encode()
        if isinstance(value, bool | float) or not digits.isdigit() or len(digits) > _MOST_DIGITS:
            raise ImageError(f"label is {value!r}, expected {self._expected}")
        index = int(digits)
        if self.classes and index >= len(self.classes):
            hint = "labels are counted from one: subtract one from each, or write" if index == len(self.classes) else (
                "give the names of all classes, or write"
            )  # fmt: skip
            raise InputError(
                f"label {index} is above the {len(self.classes)} classes, expected 0 to {len(self.classes) - 1}; "
                f"{hint} class names as labels"
            )
        return index

    @property
    def _expected(self) -> str:
        if not self.classes:
            return _INDEX
        return f"{_INDEX} or one of {len(self.classes)} class names ({', '.join(self.classes[:2])}...)"


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS


def json_field(content: bytes, path: Sequence[str]) -> Any:
    """Value at a path of a JSON object; None if it is not there.

    Raises:
        ImageError: Not JSON.
    """
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ImageError(f"the json member with its label is not JSON: {error}") from error
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def read_classes(path: Path) -> tuple[str, ...]:
    """Class names of a text file, one a line in order of their indexes.

    Raises:
        InputError: It cannot be read, is empty, or lists a name twice.
    """
    try:
        lines = path.expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"the list of classes {path} cannot be read: {error}; name a text file of one class name a line"
        ) from error
    names = tuple(line.strip() for line in lines)
    while names and not names[-1]:
        names = names[:-1]
    if not names or "" in names:
        where = f"line {names.index('') + 1} is empty" if names else "it is empty"
        raise InputError(
            f"the list of classes {path}: {where}, expected one class name a line in order of the indexes; correct it"
        )
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"the list of classes {path} has {twice!r} twice, expected each class once; correct it")
    return names


def require_same_indexes(given: Sequence[str], known: Sequence[str], where: str) -> None:
    """Refuse class names in another order than elsewhere; as many names none of which is known rename the classes.

    Args:
        given: Class names of ``--classes``.
        known: Class names that are fixed.
        where: Their source, for the message.

    Raises:
        InputError: Names the first index that has another class.
    """
    if len(given) == len(known) and not set(given) & set(known):
        return
    for index, (name, expected) in enumerate(zip(given, known, strict=False)):
        if name != expected:
            raise InputError(
                f"--classes has {name!r} as class {index}, expected {expected!r} as in {where}; leave it out for class "
                "folders; tars need labels in that order, which `teacher-service pack --classes FILE` writes"
            )


@dataclass(frozen=True)
class TarLabels:
    """Where the labels of tars are, and how they are read.

    Attributes:
        rule: The member that holds a label.
        path: Names of nested fields of a json member.
        reader: Turns its value into a class index.
    """

    rule: LabelRule = CLASS_INDEX
    path: tuple[str, ...] = ()
    reader: LabelReader = LabelReader()

    @classmethod
    def of(cls, policy: Labels, field: str | None, classes: Sequence[str]) -> "TarLabels":
        """From options; a field is the extension of a member, ``json.NAME`` for a field of the json member.

        Raises:
            InputError: No such field.
        """
        member, *path = (field or LABEL_EXTENSION).split(".")
        if member not in MEMBERS or bool(path) != (member == "json") or "" in path:
            raise InputError(f"label_field is {field!r}, expected for tars: cls, txt, or json.NAME such as json.label")
        plain = member == LABEL_EXTENSION and not classes
        rule = LabelRule(member, policy == "required", CLASS_INDEX.most_bytes if plain else _MOST_BYTES)
        reader = LabelReader(policy, tuple(classes))
        return cls(LabelRule("", required=False) if policy == "none" else rule, tuple(path), reader)

    def index(self, content: bytes) -> int:
        """Class index in a member; errors as for LabelReader.index."""
        return self.reader.index(json_field(content, self.path) if self.path else content)
