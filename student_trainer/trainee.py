"""Everything that learns, and one forward pass of it.

Shape legend: B batch, C channels, H W pixels, K classes.
"""

from torch import Tensor, nn

from student_trainer.methods.base import DistillBatch, Method, TeacherOutput
from student_trainer.students.student import Student


class Trainee(nn.Module):
    """Everything that learns: the student, and the method with its projectors."""

    def __init__(self, student: Student, loss: Method) -> None:
        super().__init__()
        self.student, self.loss = student, loss

    def no_weight_decay(self) -> set[str]:
        """The student's parameters free of weight decay besides norms and biases: position embeddings and the like."""
        return {f"student.{name}" for name in self.student.no_weight_decay()}

    def projector_positions(self) -> set[str]:
        """The projectors' position embeddings."""
        return {f"loss.{name}" for name, _ in self.loss.named_parameters() if name.endswith("position")}


class ForwardPass(nn.Module):
    """Student and the method's loss as one module: what is compiled, and what DDP wraps."""

    def __init__(self, trainee: Trainee) -> None:
        super().__init__()
        self.trainee = trainee

    def forward(
        self, images_BCHW: Tensor, labels_B: Tensor, taps: dict[str, Tensor], teacher_logits_BK: Tensor | None
    ) -> dict[str, Tensor]:
        """Every weighted term of the method's loss, ``total`` being their sum."""
        teacher = TeacherOutput(taps, teacher_logits_BK)
        terms = self.trainee.loss(self.trainee.student(images_BCHW), DistillBatch(images_BCHW, labels_B, teacher))
        return {**terms.weighted, "total": terms.total}
