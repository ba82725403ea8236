"""Student and method of a preset, built beside a teacher's later blocks alone."""

from typing import Any

from feature_store.teacher import LaterBlocks
from student_trainer.config import TrainConfig
from student_trainer.distilled import DistilledStudent
from student_trainer.methods import TeacherShape
from student_trainer.plan import build_distilled


def distilled(
    config: TrainConfig, num_classes: int, view_size: tuple[int, int], later: LaterBlocks, **where: Any
) -> DistilledStudent:
    """What a run would train; the teacher has as many classes as the student."""
    return build_distilled(
        config, num_classes, view_size, (TeacherShape(later.info, num_classes, lambda: later),), **where
    )
