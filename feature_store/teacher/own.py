"""A user's own teacher, from ``package.module:build``."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from feature_store.errors import InputError, Remedy, one_line
from feature_store.own_code import import_object

_NOT_OWN = ("hf-hub", "hf_hub", "local-dir")  # timm's own prefixes
_CONFIG = ("input_size", "mean", "std")


def is_own(name: str) -> bool:
    """Whether a teacher's name has the form ``package.module:build``."""
    return ":" in name and name.partition(":")[0] not in _NOT_OWN


def require_named(name: str) -> None:
    """Refuse to import code because a store names it: its writer could have any function called.

    Args:
        name: The teacher's name in a store's manifest.

    Raises:
        InputError: It is a user's own teacher.
    """
    if is_own(name):
        raise InputError(
            f"the store's teacher is {name}, which is code, and is imported only if you name it yourself",
            remedy=Remedy.NAME_TEACHER,
        )


def build_own(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Import a function of a user's own and have it build the teacher, with its weights.

    Args:
        name: ``package.module:build``.
        arguments: The function's arguments.

    Raises:
        InputError: It cannot be imported or called, or what it returns is no teacher.
    """
    build = import_object(name, "teacher")
    if not callable(build):
        raise InputError(f"teacher {name} is {build!r}, expected a function that returns the teacher")
    try:
        model = build(**arguments)
    except TypeError as error:
        raise InputError(f"teacher {name} cannot be called with {dict(arguments)}: {one_line(error)}") from error
    except Exception as error:  # of any library's
        raise InputError(
            f"teacher {name} failed with {dict(arguments)}: {type(error).__name__}: {one_line(error)}; call it in "
            "Python to see where"
        ) from error
    if not isinstance(model, nn.Module) or not callable(getattr(model, "forward_intermediates", None)):
        raise InputError(
            f"teacher {name} gave a {type(model).__name__}, expected a torch module with timm's interface: "
            "forward_intermediates(images, indices=...), see docs/how-to/own-teacher.md"
        )
    config = getattr(model, "pretrained_cfg", None)
    missing = [field for field in _CONFIG if not isinstance(config, Mapping) or field not in config]
    if missing:
        raise InputError(
            f"teacher {name}: its attribute pretrained_cfg lacks {', '.join(missing)}; set it to a dict of "
            "input_size (3, H, W), and mean and std per RGB channel on the 0..1 scale"
        )
    classes = getattr(model, "num_classes", 0)
    if classes and not callable(getattr(model, "forward_head", None)):
        raise InputError(
            f"teacher {name} has num_classes {classes} but no forward_head(features), which gives the logits; add "
            "it, or set num_classes to 0"
        )
    return model
