"""Plain training: the task loss without a teacher."""

from student_trainer.methods.base import DistillBatch, Method, Needs, StudentOutput, Terms


class TaskOnly(Method):
    """Total = L_task."""

    requires_teacher = False
    needs = Needs(some_labels=True)

    def forward(self, student: StudentOutput, batch: DistillBatch) -> Terms:
        """The term ``task``."""
        return Terms({"task": self.task(student.logits, batch.labels)}, {"task": 1.0})
