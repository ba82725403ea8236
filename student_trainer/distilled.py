"""Student plus method as one module."""

from torch import Tensor, nn

from feature_store.errors import InputError
from student_trainer.methods.base import DistillBatch, Method, Terms
from student_trainer.students.student import Student


class DistilledStudent(nn.Module):
    """Everything that learns, in one forward pass: what is compiled, and what DDP wraps."""

    def __init__(self, student: Student, method: Method) -> None:
        super().__init__()
        self.student, self.method = student, method

    def forward(self, batch: DistillBatch, task_factor: Tensor | None = None) -> Terms:
        """The terms of the method's loss.

        Args:
            batch: A micro-batch.
            task_factor: Factor on the term ``task``, see Run.task_factors; None for 1.

        Raises:
            InputError: A method of the user's returns no terms.
        """
        terms = self.method(self.student(batch.images), batch)
        if not isinstance(terms, Terms):
            raise InputError(
                f"{type(self.method).__name__}.forward returned a {type(terms).__name__}, expected "
                "student_trainer.methods.Terms(raw, weights); see docs/how-to/own-method.md"
            )
        if task_factor is None or "task" not in terms.raw:
            return terms
        return terms._replace(raw={**terms.raw, "task": task_factor * terms.raw["task"]})

    def no_weight_decay(self) -> set[str]:
        """The student's parameters free of weight decay besides norms and biases, such as position embeddings."""
        return {f"student.{name}" for name in self.student.no_weight_decay()}

    def projector_positions(self) -> set[str]:
        """The projectors' position embeddings."""
        return {f"method.{name}" for name, _ in self.method.named_parameters() if name.endswith("position")}
