"""Distillation methods: what a student learns from a teacher's features."""

from student_trainer.methods.base import (
    DistillBatch,
    Method,
    Needs,
    StudentOutput,
    StudentShape,
    TeacherOutput,
    TeacherShape,
    Terms,
)
from student_trainer.methods.cap import CrossAttentionProjector
from student_trainer.methods.fd import FD, FDConfig
from student_trainer.methods.kd import KD, KDConfig
from student_trainer.methods.none import TaskOnly
from student_trainer.methods.registry import METHODS, find_method
from student_trainer.methods.scalekd import ScaleKD, ScaleKDConfig

__all__ = [
    "FD",
    "KD",
    "METHODS",
    "CrossAttentionProjector",
    "DistillBatch",
    "FDConfig",
    "KDConfig",
    "Method",
    "Needs",
    "ScaleKD",
    "ScaleKDConfig",
    "StudentOutput",
    "StudentShape",
    "TaskOnly",
    "TeacherOutput",
    "TeacherShape",
    "Terms",
    "find_method",
]
