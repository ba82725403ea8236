"""The frozen teacher; only this folder imports torch."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from feature_store.teacher.split import EarlyStages, LaterBlocks, split_teacher

__all__ = ["EarlyStages", "LaterBlocks", "split_teacher"]


def __getattr__(name: str) -> Any:
    # On first use: processes that only decode images need no timm, which takes seconds to import.
    if name in __all__:
        from feature_store.teacher import split

        return getattr(split, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
