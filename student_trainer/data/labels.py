"""Checks labels against the student's classes."""

from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from feature_store.errors import ImageError, InputError
from feature_store.inputs.base import NO_LABEL, SampleSource


def require_labels(
    tars: Sequence[SampleSource],
    num_classes: int,
    option: str,
    positions: Sequence[np.ndarray] | None = None,
    *,
    optional: bool = False,
) -> None:
    """Refuse sources with a label that the student has no class for; samples without a usable label are left out later.

    Args:
        tars: The sources.
        num_classes: K.
        option: The option that names them.
        positions: Samples to look at, one int array per source; default all.
        optional: Whether a sample may have no label.

    Raises:
        InputError: Names the first label out of range.
        ResourceError: A source cannot be read.
    """
    chosen = [np.arange(len(tar)) for tar in tars] if positions is None else positions
    for tar, unit in zip(tars, chosen, strict=True):
        for position in map(int, unit):
            with suppress(ImageError):
                require_label(
                    tar.label(position), num_classes, f"{option}: ", tar.keys[position], tar.url, optional=optional
                )


def require_label(label: int, num_classes: int, where: str, key: str, tar: str, *, optional: bool = False) -> None:
    """Refuse a label that the student has no class for, and NO_LABEL unless labels are optional.

    Raises:
        InputError: It is out of range, or missing.
    """
    if label == NO_LABEL:
        if optional:
            return
        raise InputError(
            f"{where}sample {key!r} in {tar} has no label, expected one of 0..{num_classes - 1}: accuracy is counted "
            "on labelled samples; leave it out or label it"
        )
    if not 0 <= label < num_classes:
        hint = " (are labels counted from one?)" if label == num_classes else ""
        raise InputError(
            f"{where}label of sample {key!r} in {tar} is {label}, expected 0..{num_classes - 1}{hint}; raise "
            "--num-classes or fix the tar"
        )
