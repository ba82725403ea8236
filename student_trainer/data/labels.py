"""Checks labels of tars before a run's first step."""

from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from feature_store.errors import ImageError, InputError
from feature_store.inputs.tar import Tar


def require_labels(
    tars: Sequence[Tar], num_classes: int, option: str, positions: Sequence[np.ndarray] | None = None
) -> None:
    """Refuse tars with a label that the student has no class for; samples without a usable label are left out later.

    Args:
        tars: The tars.
        num_classes: K.
        option: The option that names them.
        positions: Samples to look at, one int array per tar; default all.

    Raises:
        InputError: Names the first label out of range.
        ResourceError: A tar cannot be read.
    """
    chosen = [np.arange(len(tar)) for tar in tars] if positions is None else positions
    for tar, unit in zip(tars, chosen, strict=True):
        for position in unit.tolist():
            with suppress(ImageError):
                require_label(tar.label(position), num_classes, f"{option}: ", tar.keys[position], tar.url)


def require_label(label: int, num_classes: int, where: str, key: str, tar: str) -> None:
    """Refuse a label that the student has no class for.

    Raises:
        InputError: It is out of range.
    """
    if not 0 <= label < num_classes:
        hint = " (are labels counted from one?)" if label == num_classes else ""
        raise InputError(
            f"{where}label of sample {key!r} in {tar} is {label}, expected 0..{num_classes - 1}{hint}; raise "
            "--num-classes or fix the tar"
        )
