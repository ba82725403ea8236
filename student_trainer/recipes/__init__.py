"""Presets: the released pairs with their schedules."""

from student_trainer.recipes.pairs import PRESETS, preset_config, preset_rows
from student_trainer.recipes.preset import Preset, Published, Source, Teacher
from student_trainer.recipes.schedules import A1, A2, A3, SCHEDULES, T1, T2, Schedule

__all__ = [
    "A1", "A2", "A3", "PRESETS", "SCHEDULES", "T1", "T2", "Preset", "Published", "Schedule", "Source", "Teacher",
    "preset_config", "preset_rows",
]  # fmt: skip
