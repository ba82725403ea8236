"""KD: distillation of logits (Hinton et al., 2015).

Shape legend: B batch, K classes.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from feature_store.errors import InputError
from feature_store.tools.options import check_fields
from student_trainer.methods.base import DistillBatch, Method, Needs, StudentOutput, Terms
from student_trainer.methods.precision import at_least_float32


@dataclass(frozen=True)
class KDConfig:
    """Options of KD.

    Attributes:
        alpha: Weight alpha_kd of the KD term; the task loss is weighted by 1 - alpha.
        temperature: T, which divides the logits of both sides.
    """

    alpha: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self, "kd.")
        if not 0 <= self.alpha <= 1:
            raise InputError(f"alpha of KD is {self.alpha}, expected 0..1")
        if not self.temperature > 0:
            raise InputError(f"temperature of KD is {self.temperature}, expected a number above 0")


class KD(Method):
    """Total = (1 - alpha_kd) L_task + alpha_kd L_kd."""

    Config = KDConfig
    shared_terms = frozenset({"task", "kd"})
    needs = Needs(logits=True)

    def forward(self, student: StudentOutput, batch: DistillBatch) -> Terms:
        """Terms ``task`` and ``kd``."""
        alpha, T = self.config.alpha, self.config.temperature
        raw = {
            "task": self.task(student.logits, batch.labels),
            "kd": kd_loss(student.logits, batch.teacher.probabilities(T), T),
        }
        return Terms(raw, {"task": 1 - alpha, "kd": alpha})


def kd_loss(student_BK: Tensor, probabilities_BK: Tensor, temperature: float = 1.0) -> Tensor:
    """L_kd = -T^2 mean_n sum_k p_k log softmax(s / T)_k.

    The cross entropy with the teacher; the KL form differs by the teacher's entropy, a constant here.

    Args:
        student_BK: Student logits s.
        probabilities_BK: The teacher's probabilities p at temperature T, softmax(z / T).
        temperature: T.

    Returns:
        The loss, a scalar in float32 or wider.

    Raises:
        InputError: The two have different shapes.
    """
    require_same_classes(student_BK, probabilities_BK)
    student_BK, probabilities_BK = at_least_float32(student_BK, probabilities_BK)
    # log_softmax stays finite at any logit gap; the released log(softmax) overflows from about 100 on
    cross_entropy_B = -(probabilities_BK * F.log_softmax(student_BK / temperature, dim=1)).sum(dim=1)
    return temperature**2 * cross_entropy_B.mean()


def require_same_classes(student_BK: Tensor, teacher_BK: Tensor) -> None:
    """Refuse logits that cannot be compared.

    Raises:
        InputError: The two have different shapes.
    """
    if student_BK.shape != teacher_BK.shape:
        raise InputError(
            f"student logits have shape {tuple(student_BK.shape)}, the teacher's {tuple(teacher_BK.shape)}; "
            "give the student the teacher's number of classes or switch logit distillation off"
        )
