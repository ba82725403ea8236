"""Several teachers: one method for each, their own terms weighted."""

from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from feature_store.errors import InputError
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


class SeveralTeachers(Method):
    """Total = the method's shared terms + sum over teachers i of w_i times the terms of teacher i alone.

    Each teacher has a method, i.e. a set of projectors, of its own. Shared terms (task, KD) count once; they see the
    weighted mean of the probabilities of those teachers that have a classifier, whose weights are normalised to 1.

    Attributes:
        methods: The methods, in the teachers' order; ``methods[i].needs`` is what is read of teacher i.
        teacher_weights: w_i.
    """

    def __init__(
        self,
        method: type[Method],
        config: Any,
        student: StudentShape,
        teachers: Sequence[TeacherShape],
        teacher_weights: Sequence[float],
        task: TaskLoss = cross_entropy,
    ) -> None:
        """Build a method for each teacher.

        Args:
            method: Their class.
            config: Its options, the same for all.
            student: Sizes of the student.
            teachers: Sizes of the teachers.
            teacher_weights: As many weights above 0.
            task: The task loss.

        Raises:
            InputError: Weights that cannot be used, or options that do not fit a teacher.
        """
        if not teachers or len(teachers) != len(teacher_weights) or not all(weight > 0 for weight in teacher_weights):
            raise InputError(
                f"weights of {len(teachers)} teachers are {tuple(teacher_weights)}, expected one above 0 for each"
            )
        super().__init__(config, student, teachers[0], task)
        methods = [method(config, student, teacher, task) for teacher in teachers]
        self.methods, self.teacher_weights = nn.ModuleList(methods), tuple(teacher_weights)
        self.notes = tuple(f"teacher {i}: {note}" for i, each in enumerate(methods, 1) for note in each.notes)
        needs = [each.needs for each in methods]
        self.needs = Needs(
            taps=tuple(dict.fromkeys(tap for need in needs for tap in need.taps)),
            logits=any(need.logits for need in needs),
            labels=any(need.labels for need in needs),
            tail=any(need.tail for need in needs),
            some_labels=any(need.some_labels for need in needs),
        )
        self._has_logits = [need.logits for need in needs]
        self._shared_terms = method.shared_terms

    @property
    def needs_of_teachers(self) -> tuple[Needs, ...]:
        """Needs of each teacher, in their order."""
        return tuple(cast(Method, each).needs for each in self.methods)

    def forward(self, student: StudentOutput, batch: DistillBatch) -> Terms:
        """The shared terms under their names, and each teacher's own as ``teacher1_NAME``, ``teacher2_NAME``...

        Raises:
            InputError: The batch does not carry as many teachers.
        """
        teachers = (batch.teacher, *batch.others)
        if len(teachers) != len(self.methods):
            raise InputError(f"the batch carries {len(teachers)} teachers, expected {len(self.methods)}")
        total = sum(w for w, has_logits in zip(self.teacher_weights, self._has_logits, strict=True) if has_logits)
        mixture = tuple(
            (w / total, teacher.logits)
            for w, teacher, has_logits in zip(self.teacher_weights, teachers, self._has_logits, strict=True)
            if has_logits and teacher.logits is not None
        )
        found: list[Terms] = [
            method(student, batch._replace(teacher=teacher._replace(mixture=mixture), others=()))
            for method, teacher in zip(self.methods, teachers, strict=True)
        ]
        # a method whose teacher has no classifier lacks the terms of logits
        first = found[self._has_logits.index(True) if True in self._has_logits else 0]
        raw = {name: value for name, value in first.raw.items() if name in self._shared_terms}
        weights = {name: first.weights[name] for name in raw}
        for i, (w, terms) in enumerate(zip(self.teacher_weights, found, strict=True), 1):
            for name, value in terms.raw.items():
                if name not in self._shared_terms:
                    raw[f"teacher{i}_{name}"], weights[f"teacher{i}_{name}"] = value, w * terms.weights[name]
        return Terms(raw, weights)
