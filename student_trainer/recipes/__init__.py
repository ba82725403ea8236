"""Presets: the released teacher and student pairs with their schedules, as defaults that any option overrides."""

from student_trainer.recipes.pairs import PRESETS, preset_config, preset_rows
from student_trainer.recipes.preset import Preset, Published, Teacher
from student_trainer.recipes.schedules import A1, A2, SCHEDULES, T1, T2, Schedule

__all__ = [
    "A1", "A2", "PRESETS", "SCHEDULES", "T1", "T2", "Preset", "Published", "Schedule", "Teacher", "preset_config",
    "preset_rows",
]  # fmt: skip
