"""Methods by name: the built-in ones, or a user's own as ``package.module:Class``."""

import difflib
from importlib import import_module

from feature_store.errors import InputError
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
    module, colon, attribute = name.partition(":")
    if not colon:
        close = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(METHODS)}"
        raise InputError(f"--method is {name!r}, {hint}; your own is given as package.module:Class")
    try:
        found = getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise InputError(
            f"--method {name}: {error}; the module must be importable from here, e.g. with PYTHONPATH=FOLDER"
        ) from error
    except AttributeError as error:
        raise InputError(f"--method {name}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise InputError(f"--method {name} is {found!r}, expected a subclass of student_trainer.methods.Method")
    return found
