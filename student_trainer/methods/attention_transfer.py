"""Attention transfer (Zagoruyko, Komodakis, ICLR 2017).

Shape legend: B batch, C channels, D teacher channels, H W grid, N teacher positions.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

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
from student_trainer.methods.precision import at_least_float32
from student_trainer.methods.resize import resized


@dataclass(frozen=True)
class AttentionTransferConfig:
    """Options of attention transfer; defaults are those of the released code's README.

    Attributes:
        beta: Weight of the attention term.
        p: Power of the activations in the attention map, mean over channels of |A|^p.
    """

    beta: float = 1e3
    p: float = 2.0

    def __post_init__(self) -> None:
        check_fields(self, "attention_transfer.")
        if not self.beta >= 0:
            raise InputError(f"beta of attention transfer is {self.beta}, expected a number of at least 0")
        if not self.p >= 1:
            raise InputError(f"p of attention transfer is {self.p}, expected a number of at least 1")


class AttentionTransfer(Method):
    """Total = L_task + beta L_AT, L_AT = mean over batch and positions of (Q_S / |Q_S| - Q_T / |Q_T|)^2.

    Q is the attention map of a last feature map A, the mean over channels of |A|^p as a vector over positions. The
    student's map is first resized to the teacher's grid where the two differ.

    Source: "Paying More Attention to Attention", arXiv:1612.03928, equation 2, and the released
    github.com/szagoruyko/attention-transfer at 893df54, utils.py, whose mean over positions stands in place of the
    paper's norm.
    """

    Config = AttentionTransferConfig
    needs = Needs(taps=("stage4",))

    def __init__(
        self,
        config: AttentionTransferConfig,
        student: StudentShape,
        teacher: TeacherShape,
        task: TaskLoss = cross_entropy,
    ) -> None:
        """See Method."""
        super().__init__(config, student, teacher, task)
        self.teacher_grid = teacher.split.output_grid

    def forward(self, student: StudentOutput, batch: DistillBatch) -> Terms:
        """Terms ``task`` and ``attention``."""
        A_S_BNC = resized(student.maps[-1], self.teacher_grid).flatten(2).transpose(1, 2)
        A_T_BND = batch.teacher.taps["stage4"]
        difference_BN = attention_map(A_S_BNC, self.config.p) - attention_map(A_T_BND, self.config.p)
        raw = {"task": self.task(student.logits, batch.labels), "attention": difference_BN.square().mean()}
        return Terms(raw, {"task": 1.0, "attention": self.config.beta})


def attention_map(A_BNC: Tensor, p: float) -> Tensor:
    """Q / |Q| [B, N] of tokens, in float32 or wider."""
    (A_BNC,) = at_least_float32(A_BNC)
    return F.normalize(A_BNC.abs().pow(p).mean(dim=2), dim=1)
