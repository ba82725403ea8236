"""What a live teacher would add to every preset's step, predicted from FLOPs in the true shapes; takes no GPU.

python -m benchmarks.preset_flops > benchmarks/results/preset_flops.json
"""

import json
from pathlib import Path
from typing import Any

import torch
from student_trainer.trainee import ForwardPass

from benchmarks.step import count_flops
from feature_store.teacher import split_teacher
from feature_store.teacher.model import build_model
from student_trainer.plan import build_trainee
from student_trainer.recipes import PRESETS, Preset, preset_config

CLASSES, SIZE = 1000, 224


def preset_flops(preset: Preset) -> dict[str, Any]:
    """GFLOP per sample of the teacher's forward pass, and of student and loss forward and backward."""
    config = preset_config(PRESETS, preset.name, run=Path("-"), tars=("-",), store=Path("-"))
    with torch.device("meta"):
        model = build_model(preset.teacher.name, preset.teacher.model_kwargs).eval()
        _, later_blocks = split_teacher(
            model.requires_grad_(False), preset.teacher.depth, drop_prefix=preset.teacher.drop_prefix
        )
        split = later_blocks.info
        forward = ForwardPass(build_trainee(config, CLASSES, (SIZE, SIZE), later_blocks))
        images, labels = torch.empty(2, 3, SIZE, SIZE), torch.zeros(2, dtype=torch.int64)
        taps = {"stage4": torch.empty(2, split.output_grid[0] * split.output_grid[1], split.output_dim)}
        if split.prefix == "cached":
            taps["stage3_prefix"] = torch.empty(2, split.prefix_tokens, split.input_dim)
        logits = torch.empty(2, CLASSES)
        teacher = count_flops(lambda: model(images))
        step = count_flops(lambda: forward(images, labels, taps, logits)["total"].backward())
        student = count_flops(lambda: forward.trainee.student(images).logits.sum().backward())
    giga = {"teacher": teacher / 2e9, "step": step / 2e9, "student_alone": student / 2e9}
    return {**{name: round(count, 1) for name, count in giga.items()}, "live_over_store": round(1 + teacher / step, 2)}


def main() -> None:
    print(json.dumps({name: preset_flops(preset) for name, preset in PRESETS.items()}, indent=2))


if __name__ == "__main__":
    main()
