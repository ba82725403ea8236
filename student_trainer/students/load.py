"""Trained students and their preprocessing, loaded from checkpoints."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from feature_store.errors import FailedError, InputError, one_line
from feature_store.teacher.model import normalise
from feature_store.teacher.weights import not_finite
from student_trainer.engine.checkpoint import load_checkpoint
from student_trainer.students.student import Student


@dataclass(frozen=True)
class Preprocessing:
    """How images reach a student; kept in checkpoints and exports.

    Attributes:
        input_size: Height and width, in pixels.
        mean: Normalisation mean per RGB channel on the 0..1 scale.
        std: Normalisation standard deviation per RGB channel on the 0..1 scale.
        interpolation: ``bilinear`` or ``bicubic``.
        crop_pct: Part of the shorter side that the centre crop keeps.
    """

    input_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float

    def normaliser(self, device: torch.device) -> "Normaliser":
        """uint8 pixels to images, on a device."""
        return Normaliser(self.mean, self.std, device)


class Normaliser:
    """uint8 pixels [B, H, W, 3] to normalised float32 images [B, 3, H, W], on a device."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        self._device = device
        self._mean = torch.tensor(mean, device=device) * 255.0
        self._std = torch.tensor(std, device=device) * 255.0

    def __call__(self, pixels_BHWC: Tensor) -> Tensor:
        """Images on the device."""
        return normalise(pixels_BHWC.to(self._device, non_blocking=True), self._mean, self._std)


@dataclass(frozen=True)
class Trained:
    """A student out of a checkpoint.

    Attributes:
        student: The student, with the checkpoint's weights.
        preprocessing: How images reach it.
        num_classes: K.
    """

    student: Student
    preprocessing: Preprocessing
    num_classes: int


def describe_student(student: Student, preprocessing: Preprocessing) -> dict[str, Any]:
    """What a checkpoint says of its student, inverse of load_student."""
    return {
        "name": student.name,
        "model_kwargs": dict(student.model_kwargs),
        "stages": student.stages,
        "preprocessing": asdict(preprocessing),
    }


def load_student(path: Path) -> Trained:
    """Build the student of a checkpoint file, or of a run's folder (its best checkpoint if there is one).

    It has the averaged weights if the run keeps any and evaluates them.

    Raises:
        InputError: No such checkpoint, or a damaged one.
        FailedError: Its weights are not finite: the training diverged.
    """
    if path.is_dir():
        path = next((path / name for name in ("best.pt", "last.pt") if (path / name).is_file()), path / "last.pt")
    checkpoint = load_checkpoint(path)
    described = checkpoint.student
    try:
        preprocessing = Preprocessing(**described["preprocessing"])
        name, kwargs = described["name"], dict(described["model_kwargs"])
        num_classes = kwargs.pop("num_classes")
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} does not describe its student: {error!r}; use the release that wrote it") from error
    student = Student(name, num_classes, preprocessing.input_size, kwargs, described.get("stages"))
    try:
        student.model.load_state_dict(checkpoint.trained)
    except RuntimeError as error:
        raise InputError(
            f"{path} does not fit timm's {student.name} any more: {one_line(error)}; "
            "use the timm version the run was made with"
        ) from error
    if broken := not_finite(student.model):
        raise FailedError(
            f"{path} holds NaN or infinite values in {len(broken)} tensors, first {broken[0]}: the training diverged; "
            "use an earlier checkpoint, or train again with a lower --optim.lr"
        )
    return Trained(student, preprocessing, num_classes)
