"""The contract between teacher_service and student_trainer: views, rows, the store and the teacher split."""

from feature_store.sample import RowId
from feature_store.source import FeatureBatch, FeatureSource
from feature_store.store import Store, open_store

__all__ = ["FeatureBatch", "FeatureSource", "RowId", "Store", "open_store"]
