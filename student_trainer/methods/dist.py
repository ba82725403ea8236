"""DIST: relations of probabilities, after Huang et al., NeurIPS 2022.

Shape legend: B batch, K classes.
"""

from dataclasses import dataclass

from torch import Tensor

from feature_store.errors import InputError
from feature_store.tools.options import check_fields
from student_trainer.methods.base import DistillBatch, Method, Needs, StudentOutput, Terms
from student_trainer.methods.kd import require_same_classes
from student_trainer.methods.precision import at_least_float32


@dataclass(frozen=True)
class DISTConfig:
    """Options of DIST; defaults are those of the released ImageNet runs (beta and gamma 1, times a loss weight of 2).

    Attributes:
        beta: Weight of the inter-class relation.
        gamma: Weight of the intra-class relation.
        tau: Temperature, which divides the logits of both sides.
    """

    beta: float = 2.0
    gamma: float = 2.0
    tau: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self, "dist.")
        for name in ("beta", "gamma"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} of DIST is {getattr(self, name)}, expected a number of at least 0")
        if not self.tau > 0:
            raise InputError(f"tau of DIST is {self.tau}, expected a number above 0")


class DIST(Method):
    """Total = L_task + beta L_inter + gamma L_intra, on probabilities y = softmax(z / tau).

    Source: "Knowledge Distillation from A Stronger Teacher", arXiv:2205.10536, equations 9 to 11, and the released
    github.com/hunto/image_classification_sota at 6f7a70a, lib/models/losses/dist_kd.py.
    """

    Config = DISTConfig
    shared_terms = frozenset({"task", "inter", "intra"})
    needs = Needs(logits=True)

    def forward(self, student: StudentOutput, batch: DistillBatch) -> Terms:
        """Terms ``task``, ``inter`` and ``intra``."""
        tau = self.config.tau
        y_t_BK = batch.teacher.probabilities(tau)
        require_same_classes(student.logits, y_t_BK)
        (z_s_BK,) = at_least_float32(student.logits)
        y_s_BK = z_s_BK.div(tau).softmax(dim=1)
        raw = {
            "task": self.task(student.logits, batch.labels),
            "inter": tau**2 * pearson_distance(y_s_BK, y_t_BK),  # over the classes of each sample
            "intra": tau**2 * pearson_distance(y_s_BK.T, y_t_BK.T),  # over the samples of each class
        }
        return Terms(raw, {"task": 1.0, "inter": self.config.beta, "intra": self.config.gamma})


def pearson_distance(a_MN: Tensor, b_MN: Tensor, eps: float = 1e-8) -> Tensor:
    """1 - mean over rows of Pearson's correlation, a scalar.

    Args:
        a_MN: M rows of N values.
        b_MN: As many.
        eps: Added to the product of norms, as released; constant rows then correlate 0.
    """
    a_MN, b_MN = (x - x.mean(dim=1, keepdim=True) for x in (a_MN, b_MN))
    return 1 - ((a_MN * b_MN).sum(dim=1) / (a_MN.norm(dim=1) * b_MN.norm(dim=1) + eps)).mean()
