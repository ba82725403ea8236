"""NKD: normalised distillation of logits, after Yang et al., ICCV 2023.

Shape legend: B batch, K classes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from feature_store.errors import InputError
from feature_store.tools.options import check_fields
from student_trainer.methods.base import DistillBatch, Method, Needs, StudentOutput, Terms
from student_trainer.methods.kd import require_same_classes
from student_trainer.methods.precision import at_least_float32


@dataclass(frozen=True)
class NKDConfig:
    """Options of NKD; defaults are those of the released ImageNet runs.

    Attributes:
        gamma: Weight of the non-target term.
        temperature: lambda, which divides the logits of the non-target classes.
    """

    gamma: float = 1.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self, "nkd.")
        if not self.gamma >= 0:
            raise InputError(f"gamma of NKD is {self.gamma}, expected a number of at least 0")
        if not self.temperature > 0:
            raise InputError(f"temperature of NKD is {self.temperature}, expected a number above 0")


class NKD(Method):
    """Total = L_task + L_target + gamma L_non_target.

    With S, T the probabilities of student and teacher, t a sample's label, and N(.) the probabilities at temperature
    lambda, normalised to a sum of 1 over the classes other than t::

        L_target = -mean_n T_t log S_t
        L_non_target = -lambda^2 mean_n sum_(k != t) N(T)_k log N(S)_k

    Source: "From Knowledge Distillation to Self-Knowledge Distillation", arXiv:2303.13005, equation 8, and the released
    github.com/yzd-v/cls_KD at 1e5d48f, mmcls/models/dis_losses/nkd.py.
    """

    Config = NKDConfig
    shared_terms = frozenset({"task", "target", "non_target"})
    needs = Needs(logits=True, labels=True)

    def forward(self, student: StudentOutput, batch: DistillBatch) -> Terms:
        """Terms ``task``, ``target`` and ``non_target``."""
        temperature, t_B1 = self.config.temperature, batch.labels.long()[:, None]
        T_BK = batch.teacher.probabilities()
        require_same_classes(student.logits, T_BK)
        (s_BK,) = at_least_float32(student.logits)
        log_S_t_B1 = F.log_softmax(s_BK, dim=1).gather(1, t_B1)
        is_target_BK = torch.zeros_like(s_BK, dtype=torch.bool).scatter(1, t_B1, True)
        N_T_BK = batch.teacher.probabilities(temperature).masked_fill(is_target_BK, 0)
        smallest = torch.finfo(N_T_BK.dtype).tiny  # a teacher certain of the label leaves nothing to normalise
        N_T_BK = N_T_BK / N_T_BK.sum(dim=1, keepdim=True).clamp_min(smallest)
        log_N_S_BK = F.log_softmax((s_BK / temperature).masked_fill(is_target_BK, -torch.inf), dim=1)
        log_N_S_BK = log_N_S_BK.masked_fill(is_target_BK, 0)
        raw = {
            "task": self.task(student.logits, batch.labels),
            "target": -(T_BK.gather(1, t_B1) * log_S_t_B1).mean(),
            "non_target": -(temperature**2) * (N_T_BK * log_N_S_BK).sum(dim=1).mean(),
        }
        return Terms(raw, {"task": 1.0, "target": 1.0, "non_target": self.config.gamma})
