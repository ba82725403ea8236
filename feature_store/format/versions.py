"""Versions of the software that decides what a store's bytes are."""

import platform
from functools import cache
from importlib.metadata import version

PACKAGES = ("scalekd-cache", "numpy", "pillow", "torch", "timm", "zarr", "webdataset")


def software_versions() -> dict[str, str]:
    """Version per package, and Python's."""
    return dict(_versions())


@cache
def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
