"""Trained students with their preprocessing, saved, loaded."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from feature_store.backends.files import replacing
from feature_store.errors import FailedError, InputError, ResourceError, one_line
from feature_store.teacher.weights import not_finite, read_file
from student_trainer.students.preprocessing import Preprocessing
from student_trainer.students.student import Student

BEST, LAST = "best.safetensors", "last.pt"
CHECKPOINT_FORMAT = 2
"""Number of the layout of last.pt; 1 is no longer read."""

_FILES = (BEST, "best.pt", LAST)  # of a run, the first there is; best.pt was written before 0.2
_DESCRIPTION = "student"  # key of the file's metadata


@dataclass(frozen=True)
class LoadedStudent:
    """A student out of a file.

    Attributes:
        student: The student, with the file's weights.
        preprocessing: Preprocessing of its images.
        num_classes: K.
        classes: Class names in order of their indexes; empty if they are unknown.
    """

    student: Student
    preprocessing: Preprocessing
    num_classes: int
    classes: tuple[str, ...] = ()


def describe_student(student: Student, preprocessing: Preprocessing, classes: Sequence[str] = ()) -> dict[str, Any]:
    """A file's description of its student, enough to build it again and to know its classes."""
    return {
        "name": student.name,
        "model_kwargs": dict(student.model_kwargs),
        "stages": student.stages,
        "preprocessing": asdict(preprocessing),
        "classes": list(classes),
    }


def save_student(path: Path, description: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write a student alone as safetensors, durably and whole or not at all.

    Args:
        path: The file.
        description: Result of describe_student, kept as JSON in the file's metadata.
        weights: State dict of the timm model.

    Raises:
        ResourceError: The disk is full or refuses; the file that was there before stays.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    try:
        with replacing(path, durable=True) as partial:
            save_file(tensors, partial, metadata={_DESCRIPTION: json.dumps(description)})
    except (OSError, SafetensorError) as error:
        raise ResourceError(
            f"{path} cannot be written: {one_line(error)}; make room on the disk and run the same command with --resume"
        ) from error


def load_student(path: Path) -> LoadedStudent:
    """Build the student of a file (.safetensors, or a checkpoint .pt), or of a run's folder: its best, else its last.

    It has the averaged weights if the run keeps any and evaluates them.

    Raises:
        InputError: No such file, or a damaged one.
        FailedError: Its weights are not finite: the training diverged.
    """
    if path.is_dir():
        path = next((path / name for name in _FILES if (path / name).is_file()), path / LAST)
    if not path.exists():
        raise InputError(f"checkpoint {path} does not exist; give the folder or a file of a training run")
    described, weights = (_read_safetensors if path.suffix == ".safetensors" else _read_checkpoint)(path)
    try:
        preprocessing = Preprocessing(**described["preprocessing"])
        height, width = preprocessing.input_size
        name, kwargs = described["name"], dict(described["model_kwargs"])
        num_classes, classes = kwargs.pop("num_classes"), tuple(described.get("classes", ()))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} does not describe its student: {error!r}; use the release that wrote it") from error
    student = Student(name, num_classes, (height, width), kwargs, described.get("stages"))
    try:
        student.model.load_state_dict(weights)
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
    return LoadedStudent(student, preprocessing, num_classes, classes)


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description and weights of a student's own file."""
    try:
        with safe_open(path, framework="pt") as file:
            described = json.loads((file.metadata() or {})[_DESCRIPTION])
            return described, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except KeyError as error:
        raise InputError(
            f"{path} does not describe its student: it was not written by student-trainer train; give the run's folder"
        ) from error
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {one_line(error)}; restore it, or use the run's {LAST}") from error


def _read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description and weights to use of a run's checkpoint: the averaged ones if it keeps and evaluates any."""
    try:
        saved = read_file(path)
    except InputError as error:
        reason = str(error).removeprefix(f"checkpoint {path} ")
        raise InputError(f"{path} is not a checkpoint of student-trainer: it {reason}") from error
    if not isinstance(saved, dict) or saved.get("format") is None:
        raise InputError(
            f"{path} is not a checkpoint of student-trainer: it has no format number; give the run's folder, or its "
            f"{BEST} or {LAST}"
        )
    if saved["format"] != CHECKPOINT_FORMAT:
        raise InputError(
            f"{path} has checkpoint format {saved['format']!r}, this build reads {CHECKPOINT_FORMAT}; use the release "
            "that wrote it"
        )
    averaged = saved.get("ema") is not None and saved.get("ema_eval", True)
    try:
        return saved["student"], saved["ema" if averaged else "weights"]
    except KeyError as error:
        raise InputError(f"{path} is incomplete: it has no {error}; use the release that wrote it") from error
