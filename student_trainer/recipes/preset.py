"""What a preset is."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import tyro

from student_trainer.config import ExpectConfig, TrainConfig
from student_trainer.recipes.schedules import Schedule
from student_trainer.scalekd import ScaleKDConfig


@dataclass(frozen=True)
class Teacher:
    """A teacher a preset is for.

    Attributes:
        name: timm model name with its pretrained tag.
        model_kwargs: Extra arguments of ``timm.create_model``, for ``teacher-service cache --model-kwargs``.
    """

    name: str
    model_kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        """The name without its pretrained tag."""
        return self.name.split(".")[0]


@dataclass(frozen=True)
class Published:
    """The paper's ImageNet-1K top-1 in percent, not this project's.

    Attributes:
        baseline: Without distillation.
        scalekd: With this teacher.
    """

    baseline: float
    scalekd: float


@dataclass(frozen=True)
class Preset:
    """A released pair of teacher and student with its schedule.

    Attributes:
        name: How it is asked for.
        teacher: What the store must be written with.
        student: timm model name.
        schedule: How the student is trained.
        scalekd: The distillation loss.
        options: Options of TrainConfig that are the pair's own: task, label smoothing...
        published: The paper's accuracies, where it gives them.
    """

    name: str
    teacher: Teacher
    student: str
    schedule: Schedule
    scalekd: ScaleKDConfig = field(default_factory=ScaleKDConfig)
    options: Mapping[str, Any] = field(default_factory=dict)
    published: Published | None = None

    def config(self) -> TrainConfig:
        """Defaults for the command line: everything but ``run`` and where views come from."""
        return TrainConfig(
            run=tyro.MISSING,
            student=self.student,
            scalekd=self.scalekd,
            expect=ExpectConfig(teacher=self.teacher.architecture, policy=self.schedule.policy),
            **self.schedule.options(),
            **self.options,
        )
