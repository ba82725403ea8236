"""The frozen teacher; only this folder imports torch."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from feature_store.teacher.split import EarlyStages, LaterBlocks, split_teacher

__all__ = ["EarlyStages", "LaterBlocks", "split_teacher"]


def __getattr__(name: str) -> Any:
    if (
        name in __all__
    ):  # on first use, because timm takes seconds to import: processes that decode images need none of it
        from feature_store.teacher import split

        return getattr(split, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
