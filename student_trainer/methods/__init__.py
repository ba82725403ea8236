"""Distillation methods: what a student learns from a teacher's features."""

from student_trainer.methods.attention_transfer import AttentionTransfer, AttentionTransferConfig
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
from student_trainer.methods.dist import DIST, DISTConfig
from student_trainer.methods.fd import FD, FDConfig
from student_trainer.methods.kd import KD, KDConfig
from student_trainer.methods.nkd import NKD, NKDConfig
from student_trainer.methods.none import TaskOnly
from student_trainer.methods.registry import METHODS, find_method
from student_trainer.methods.scalekd import ScaleKD, ScaleKDConfig
from student_trainer.methods.several import SeveralTeachers

__all__ = [
    "DIST",
    "FD",
    "KD",
    "METHODS",
    "NKD",
    "AttentionTransfer",
    "AttentionTransferConfig",
    "CrossAttentionProjector",
    "DISTConfig",
    "DistillBatch",
    "FDConfig",
    "KDConfig",
    "Method",
    "NKDConfig",
    "Needs",
    "ScaleKD",
    "ScaleKDConfig",
    "SeveralTeachers",
    "StudentOutput",
    "StudentShape",
    "TaskOnly",
    "TeacherOutput",
    "TeacherShape",
    "Terms",
    "find_method",
]
