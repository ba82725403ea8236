"""FLOPs of every preset's step, with a live teacher and with either projector.

Predicted in the true shapes; takes no GPU.

python -m benchmarks.preset_flops > benchmarks/results/preset_flops.json
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.step import count_flops
from feature_store.teacher import LaterBlocks, split_teacher
from feature_store.teacher.model import build_model
from student_trainer.distilled import DistilledStudent
from student_trainer.methods import DistillBatch, TeacherOutput, TeacherShape
from student_trainer.plan import build_distilled
from student_trainer.recipes import PRESETS, Preset, preset_config
from student_trainer.teachers.config import StoreTeacher

CLASSES, SIZE = 1000, 224


def preset_flops(preset: Preset) -> dict[str, Any]:
    """GFLOP per sample of the teacher's forward pass, of the student alone, and of a step with either projector."""
    config = preset_config(PRESETS, preset.name, run=Path("-"), tars=("-",), teacher=StoreTeacher("-"))
    with torch.device("meta"):
        model = build_model(preset.teacher.name, preset.teacher.model_kwargs).eval()
        _, later_blocks = split_teacher(
            model.requires_grad_(False), preset.teacher.depth, drop_prefix=preset.teacher.drop_prefix
        )
        images = torch.empty(2, 3, SIZE, SIZE)
        teacher = count_flops(lambda: model(images))
        steps = {}
        for patchify in ("full", "separable"):
            chosen = replace(config, scalekd=replace(config.scalekd, patchify=patchify))
            shape = TeacherShape(later_blocks.info, CLASSES, lambda: later_blocks)
            distilled = build_distilled(chosen, CLASSES, (SIZE, SIZE), (shape,))
            steps[patchify] = step_flops(distilled, later_blocks)
        student = count_flops(lambda: distilled.student(images).logits.sum().backward())
    giga = {"teacher": teacher, "step": steps["full"], "step_separable": steps["separable"], "student_alone": student}
    return {
        **{name: round(count / 2e9, 1) for name, count in giga.items()},
        "step_over_student": round(steps["full"] / student, 2),
        "step_over_student_separable": round(steps["separable"] / student, 2),
        "live_over_store": round(1 + teacher / steps["full"], 2),
        "live_over_store_separable": round(1 + teacher / steps["separable"], 2),
    }


def step_flops(distilled: DistilledStudent, later_blocks: LaterBlocks) -> int:
    """FLOPs of student and method, forward and backward, on two samples."""
    split = later_blocks.info
    images, labels = torch.empty(2, 3, SIZE, SIZE), torch.zeros(2, dtype=torch.int64)
    taps = {"stage4": torch.empty(2, split.output_grid[0] * split.output_grid[1], split.output_dim)}
    if split.prefix == "cached":
        taps["stage3_prefix"] = torch.empty(2, split.prefix_tokens, split.input_dim)
    batch = DistillBatch(images, labels, TeacherOutput(taps, torch.empty(2, CLASSES)))
    return count_flops(lambda: distilled(batch).total.backward())


def main() -> None:
    print(json.dumps({name: preset_flops(preset) for name, preset in PRESETS.items()}, indent=2))


if __name__ == "__main__":
    main()
