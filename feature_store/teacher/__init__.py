"""The frozen teacher; only this folder imports torch."""

from feature_store.teacher.split import EarlyStages, LaterBlocks, split_teacher

__all__ = ["EarlyStages", "LaterBlocks", "split_teacher"]
