"""Preset: the settings of one released pair."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import tyro

from student_trainer.config import ExpectConfig, TrainConfig
from student_trainer.methods.scalekd import ScaleKDConfig
from student_trainer.recipes.schedules import Schedule


@dataclass(frozen=True)
class Teacher:
    """A teacher a preset is for.

    Attributes:
        name: timm model name with its pretrained tag.
        input_size: Height and width of its views, in pixels.
        model_kwargs: Extra arguments of ``timm.create_model``, for ``teacher-service cache --model-kwargs``.
        depth: Number of its later blocks; None where the family has one possible cut.
        drop_prefix: Whether students run the later blocks on grid tokens alone.
    """

    name: str
    input_size: tuple[int, int] = (224, 224)
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    depth: int | None = None
    drop_prefix: bool = False

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
class Source:
    """The released config a preset follows.

    Attributes:
        commit: Of github.com/deep-optimization/ScaleKD.
        file: Path of the config in that repository.
    """

    commit: str
    file: str


@dataclass(frozen=True)
class Preset:
    """A released pair of teacher and student with its schedule.

    Attributes:
        name: Its name on the command line.
        source: The released config.
        teacher: Teacher that the store must be written with.
        student: timm model name.
        schedule: Schedule of the student's training.
        differs: Differences from the released config: by setting, the released value, this one, and why.
        scalekd: The distillation loss.
        options: Options of TrainConfig that are the pair's own: task, crop_pct...; they rule over the schedule's.
        published: The paper's accuracies, where it gives them.
    """

    name: str
    source: Source
    teacher: Teacher
    student: str
    schedule: Schedule
    differs: Mapping[str, str]
    scalekd: ScaleKDConfig = field(default_factory=ScaleKDConfig)
    options: Mapping[str, Any] = field(default_factory=dict)
    published: Published | None = None

    def config(self) -> TrainConfig:
        """Defaults for the command line: everything but ``run`` and where views come from."""
        teacher = self.teacher
        return TrainConfig(
            run=tyro.MISSING,
            preset=self.name,
            student=self.student,
            scalekd=self.scalekd,
            expect=ExpectConfig(
                teacher=teacher.architecture,
                model_kwargs=teacher.model_kwargs,
                input_size=teacher.input_size,
                depth=teacher.depth,
                prefix="dropped" if teacher.drop_prefix else None,
                policy=self.schedule.policy,
            ),
            **{**self.schedule.options(), **self.options},
        )

    def cache_command(self, tars: str = "TARS", store: str = "STORE", views: int = 4) -> str:
        """Command line that caches the features this preset expects.

        Args:
            tars: The image tars.
            store: Where the store goes.
            views: Views per sample. The released code draws a new one every epoch; each one cached takes as much room.
        """
        teacher = self.teacher
        kwargs = ["--model-kwargs", json.dumps(teacher.model_kwargs)] if teacher.model_kwargs else []
        depth = [] if teacher.depth is None else ["--depth", str(teacher.depth)]
        prefix = ["--drop-prefix"] if teacher.drop_prefix else []
        return shlex.join(
            ["teacher-service", "cache", tars, "--teacher", teacher.name, *kwargs, *depth, *prefix,
             "--policy", self.schedule.policy, "--views", str(views), "--store", store]
        )  # fmt: skip
