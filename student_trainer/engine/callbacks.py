"""Callbacks: code of a user's own at fixed points of a run."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from student_trainer.train import Run


class Callback:
    """Called by ``train`` on every process; override what is needed.

    ``run.group.is_main`` tells the process that writes. What a callback raises ends the run.
    """

    def on_start(self, run: "Run") -> None:
        """Before the first step, after a checkpoint was restored."""

    def on_step(self, run: "Run") -> None:
        """After an optimizer step; ``run.progress.step`` counts it."""

    def on_epoch(self, run: "Run", values: Mapping[str, Any]) -> None:
        """After an epoch and its validation, before its checkpoint is written.

        Args:
            run: The run.
            values: The epoch's line of metrics.jsonl.
        """

    def on_end(self, run: "Run") -> None:
        """After the last epoch."""
