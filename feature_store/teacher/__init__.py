"""The teacher as both sides know it: taps, split and block bundle. The only part that imports torch and timm."""

from feature_store.teacher.split import EarlyStages, LaterBlocks, split_teacher

__all__ = ["EarlyStages", "LaterBlocks", "split_teacher"]
