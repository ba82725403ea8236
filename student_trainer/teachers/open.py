"""Opens the teacher that a run's config asks for."""

import torch

from student_trainer.teachers.base import TeacherSide
from student_trainer.teachers.config import LiveTeacher, NoTeacher, ServiceTeacher, StoreTeacher, TeacherConfig
from student_trainer.teachers.live import LiveSide
from student_trainer.teachers.none import NoSide
from student_trainer.teachers.service import ServiceSide
from student_trainer.teachers.store import StoreSide


def open_teacher(config: TeacherConfig, device: torch.device) -> TeacherSide:
    """The teacher of a run.

    Args:
        config: Which one.
        device: Where its features are used, and where a live one runs.

    Raises:
        UserError: It cannot be opened, or several do not fit together.
    """
    match config:
        case StoreTeacher():
            return StoreSide((config,), device)
        case tuple():
            return StoreSide(config, device)
        case ServiceTeacher():
            return ServiceSide(config, device)
        case LiveTeacher():
            return LiveSide(config, device)
        case NoTeacher():
            return NoSide(config, device)
