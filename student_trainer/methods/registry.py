"""Methods by name: the built-in ones, or a user's own as ``package.module:Class``."""

import difflib

from feature_store.errors import InputError
from feature_store.own_code import import_object
from student_trainer.methods.attention_transfer import AttentionTransfer
from student_trainer.methods.base import Method
from student_trainer.methods.dist import DIST
from student_trainer.methods.fd import FD
from student_trainer.methods.kd import KD
from student_trainer.methods.nkd import NKD
from student_trainer.methods.none import TaskOnly
from student_trainer.methods.scalekd import ScaleKD

METHODS: dict[str, type[Method]] = {
    "scalekd": ScaleKD,
    "fd": FD,
    "kd": KD,
    "none": TaskOnly,
    "dist": DIST,
    "nkd": NKD,
    "attention_transfer": AttentionTransfer,
}
"""The built-in methods; each one's options are the field of its name in TrainConfig."""


def find_method(name: str) -> type[Method]:
    """The class of a method.

    Args:
        name: A key of METHODS, or ``package.module:Class``.

    Raises:
        InputError: No such method, module or class, or a class that is no Method.
    """
    if name in METHODS:
        return METHODS[name]
    if ":" not in name:
        close = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(METHODS)}"
        raise InputError(f"--method is {name!r}, {hint}; your own is given as package.module:Class")
    found = import_object(name, "--method")
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise InputError(f"--method {name} is {found!r}, expected a subclass of student_trainer.methods.Method")
    return found
