"""No teacher: views are drawn, nothing is distilled."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from student_trainer.data.batch import Batch
from student_trainer.methods.base import Needs, TeacherOutput, TeacherShape
from student_trainer.teachers.base import TeacherSide
from student_trainer.teachers.config import NoTeacher


class NoSide(TeacherSide):
    """A run without a teacher."""

    def __init__(self, config: NoTeacher, device: torch.device) -> None:
        super().__init__(device, views=config.views)

    def shapes(self) -> tuple[TeacherShape, ...]:
        """None."""
        return ()

    def outputs(self, batch: Batch, pixels_BHWC: Tensor, needs: Sequence[Needs]) -> tuple[TeacherOutput, ...]:
        """Nothing."""
        return ()

    def identity(self) -> dict[str, Any]:
        """Nothing to compare."""
        return {"features": "none", "store": None, "live_teacher": None}
