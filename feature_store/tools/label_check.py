"""Accuracy of a store's teacher on the stored labels."""

from typing import TYPE_CHECKING, NamedTuple

from feature_store.inputs.base import NO_LABEL

if TYPE_CHECKING:
    from feature_store.store import Store

_ROWS = 512


class TeacherAccuracy(NamedTuple):
    """Labelled rows, and those of which the teacher's largest logit is the label's."""

    rows: int
    correct: int

    def __str__(self) -> str:
        return f"{self.correct / self.rows:.1%} of {self.rows} labelled rows of the first unit"


def teacher_accuracy(store: "Store") -> TeacherAccuracy | None:
    """Top-1 of the stored logits on up to 512 rows; far below the teacher's own, class indexes are not the teacher's.

    Args:
        store: A store with at least one committed unit.

    Returns:
        None without logits or labels.
    """
    unit, source = store.committed.units[0], store.source(())
    rows, labels = source.unit_rows(unit, min(store.committed_views(unit))), store.labels(unit)
    rows = rows[labels[rows[:, 1]] != NO_LABEL][:_ROWS]
    logits = source.read(rows).logits if len(rows) else None
    if logits is None:
        return None
    return TeacherAccuracy(len(rows), int((logits.argmax(axis=1) == labels[rows[:, 1]]).sum()))
