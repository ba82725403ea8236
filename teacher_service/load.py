"""Loads the frozen teacher of a job or a store."""

from pathlib import Path
from typing import cast

from feature_store.format.manifest import Manifest
from feature_store.teacher.model import Teacher, load_teacher
from teacher_service.config import ComputeDtype, TeacherSpec
from teacher_service.devices import find_device


def load(spec: TeacherSpec, device: str, *, checkpoint: Path | None = None, pretrained: bool = True) -> Teacher:
    """The teacher a job asks for, on its device.

    Args:
        spec: Which teacher.
        device: Name of the device, see find_device.
        checkpoint: Its weights; default timm's pretrained ones.
        pretrained: False leaves weights random where there is no checkpoint.

    Raises:
        InputError: Unknown teacher, or a checkpoint that does not fit it.
        ResourceError: Its weights cannot be fetched, or the device cannot be used.
    """
    return load_teacher(
        spec.name,
        checkpoint=checkpoint,
        pretrained=pretrained,
        model_kwargs=spec.model_kwargs,
        depth=spec.depth,
        drop_prefix=spec.drop_prefix,
        compute_dtype=spec.compute_dtype,
        device=find_device(device),
    )


def spec_of(manifest: Manifest) -> TeacherSpec:
    """The teacher a store was written with."""
    teacher, split = manifest.teacher, manifest.split
    return TeacherSpec(
        name=teacher.name,
        model_kwargs=teacher.model_kwargs,
        depth=split.depth or None,
        drop_prefix=split.drops_prefix,
        compute_dtype=cast(ComputeDtype, teacher.compute_dtype),  # load_teacher refuses others
    )
