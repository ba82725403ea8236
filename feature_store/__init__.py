"""The feature store: the contract between teacher_service, student_trainer."""

from typing import TYPE_CHECKING, Any

from feature_store.format.addressing import RowId
from feature_store.source import FeatureBatch, FeatureSource
from feature_store.store import Store, open_store

if TYPE_CHECKING:
    from feature_store.client.connection import connect

__all__ = ["FeatureBatch", "FeatureSource", "RowId", "Store", "connect", "open_store"]


def __getattr__(name: str) -> Any:
    if name == "connect":  # on first use, because it loads an HTTP client
        from feature_store.client.connection import connect

        return connect
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
