"""A small teacher with a class token, and a batch of it for methods to be called with."""

from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from feature_store.format.manifest import SplitInfo
from feature_store.teacher import split_teacher
from student_trainer.methods import (
    DistillBatch,
    Method,
    StudentOutput,
    StudentShape,
    TeacherOutput,
    TeacherShape,
    Terms,
    find_method,
)

CLASSES = 5


@dataclass
class SmallBatch:
    """What a student gives for two images, and what the teacher gives."""

    shape: StudentShape
    teacher: TeacherShape
    student: StudentOutput
    batch: DistillBatch

    def build(self, method: str = "scalekd", **options: Any) -> Any:
        """A method by name, its options beside the defaults."""
        found = find_method(method)
        return found(found.Config(**options), self.shape, self.teacher)

    def terms(self, method: Method, **change: Any) -> Terms:
        """Its terms; fields of TeacherOutput may be exchanged."""
        return method(self.student, self.batch._replace(teacher=self.batch.teacher._replace(**change)))


def small_batch(seed: int = 0) -> SmallBatch:
    """Two images; maps and student logits are leaves."""
    torch.manual_seed(seed)
    model = timm.create_model("test_vit", pretrained=False, img_size=(48, 64), num_classes=CLASSES).eval()
    early, later = split_teacher(model, depth=1)
    images = torch.randn(2, 3, 48, 64)
    with torch.no_grad():
        tokens = early(images)
        final = later(tokens)
        logits = model.forward_head(final)
    prefix = later.info.prefix_tokens
    maps = torch.randn(2, 6, 6, 8, requires_grad=True), torch.randn(2, 10, 3, 4, requires_grad=True)
    return SmallBatch(
        StudentShape((6, 10), ((6, 8), (3, 4)), CLASSES),
        TeacherShape(later.info, CLASSES, lambda: later),
        StudentOutput(maps, torch.randn(2, CLASSES, requires_grad=True)),
        DistillBatch(
            images,
            torch.tensor([0, 4]),
            TeacherOutput({"stage4": final[:, prefix:], "stage3_prefix": tokens[:, :prefix]}, logits),
        ),
    )


def logits_batch(student_BK: Tensor, teacher_BK: Tensor, labels_B: Tensor | None = None) -> SmallBatch:
    """Logits alone, for methods that read no maps."""
    labels_B = torch.zeros(len(student_BK), dtype=torch.int64) if labels_B is None else labels_B
    return SmallBatch(
        StudentShape((1, 1), ((1, 1), (1, 1)), student_BK.shape[1]),
        TeacherShape(split_of(1, (1, 1)), teacher_BK.shape[1], no_tail),
        StudentOutput((torch.empty(0), torch.empty(0)), student_BK),
        DistillBatch(torch.empty(0), labels_B, TeacherOutput({}, teacher_BK)),
    )


def maps_batch(student_BCHW: Tensor, teacher_BND: Tensor, grid: tuple[int, int]) -> SmallBatch:
    """Last maps alone, for methods that read no logits; the task loss of such a batch is log 1 = 0."""
    dims, size = (1, student_BCHW.shape[1]), (student_BCHW.shape[2], student_BCHW.shape[3])
    logits = torch.zeros(len(student_BCHW), 1, dtype=student_BCHW.dtype)
    return SmallBatch(
        StudentShape(dims, ((1, 1), size), 1),
        TeacherShape(split_of(teacher_BND.shape[2], grid), 0, no_tail),
        StudentOutput((torch.empty(0), student_BCHW), logits),
        DistillBatch(
            torch.empty(0), torch.zeros(len(logits), dtype=torch.int64), TeacherOutput({"stage4": teacher_BND})
        ),
    )


def split_of(dim: int, grid: tuple[int, int]) -> SplitInfo:
    """The split of a teacher whose two maps have one size."""
    return SplitInfo(
        family="vit", depth=1, input_dim=dim, input_grid=grid, output_dim=dim, output_grid=grid, prefix_tokens=0,
        prefix="none",
    )  # fmt: skip


def no_tail() -> Any:
    """For methods that must not load the later blocks."""
    pytest.fail("the later blocks were loaded")
