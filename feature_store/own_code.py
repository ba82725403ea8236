"""Objects of a user's own code, imported by ``package.module:name``."""

from importlib import import_module
from typing import Any

from feature_store.errors import InputError


def import_object(name: str, option: str) -> Any:
    """Object of a name of the form ``package.module:name``.

    Importing runs the module: only names that the user gave on this command line are passed here, never a store's.

    Args:
        name: The name.
        option: The option that it was given with, for errors.

    Raises:
        InputError: No such module, or the module has no such name.
    """
    module, _, attribute = name.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise InputError(
            f"{option} {name}: {error}; the module must be importable from here, e.g. with PYTHONPATH=FOLDER"
        ) from error
    except AttributeError as error:
        raise InputError(f"{option} {name}: {error}") from error
