"""FD: distillation of the last feature map, the paper's baseline.

Shape legend: B batch, C student channels, D teacher channels, H W grid, N teacher positions.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from feature_store.errors import InputError
from feature_store.tools.options import check_fields
from student_trainer.methods.base import (
    DistillBatch,
    Method,
    Needs,
    StudentOutput,
    StudentShape,
    TaskLoss,
    TeacherShape,
    Terms,
)
from student_trainer.methods.criterion import cross_entropy
from student_trainer.methods.dfm import original_view_loss
from student_trainer.methods.resize import resized


@dataclass(frozen=True)
class FDConfig:
    """Options of FD.

    Attributes:
        alpha: Weight of the FD term.
    """

    alpha: float = 0.08

    def __post_init__(self) -> None:
        check_fields(self, "fd.")
        if not self.alpha >= 0:
            raise InputError(f"alpha of FD is {self.alpha}, expected a number of at least 0")


class FD(Method):
    """Total = L_task + alpha L_fd: the student's last map, on the teacher's width and grid, against F^t.

    A 1x1 convolution adapts the width where the two differ. Where the grids differ, which the released baseline does
    not support, the student's map is first resized to the teacher's grid.
    """

    Config = FDConfig
    needs = Needs(taps=("stage4",))

    def __init__(
        self, config: FDConfig, student: StudentShape, teacher: TeacherShape, task: TaskLoss = cross_entropy
    ) -> None:
        """See Method."""
        super().__init__(config, student, teacher, task)
        student_dim, teacher_dim = student.dims[1], teacher.split.output_dim
        self.teacher_grid = teacher.split.output_grid
        self.align = nn.Identity() if student_dim == teacher_dim else nn.Conv2d(student_dim, teacher_dim, 1)

    def forward(self, student: StudentOutput, batch: DistillBatch) -> Terms:
        """Terms ``task`` and ``fd``."""
        raw = {
            "task": self.task(student.logits, batch.labels),
            "fd": original_view_loss(self.project(student.maps[-1]), batch.teacher.taps["stage4"]),
        }
        return Terms(raw, {"task": 1.0, "fd": self.config.alpha})

    def project(self, student_BCHW: Tensor) -> Tensor:
        """The student's map as tokens [B, N, D] on the teacher's grid."""
        return self.align(resized(student_BCHW, self.teacher_grid)).flatten(2).transpose(1, 2)
