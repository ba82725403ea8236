"""Progress of a job: a bar, or a line per unit."""

import time
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from feature_store.format.manifest import Manifest
from feature_store.tools.terminal import Console, ProgressBar
from teacher_service.cache.decode import Task
from teacher_service.cache.pipeline import UnitDone
from teacher_service.cache.stage_timer import StageTimes


class Progress:
    """A job's progress in view images; use as a context manager.

    Args:
        console: Where to show it.
        manifest: The store's.
        tasks: The run's tasks.
    """

    def __init__(self, console: Console, manifest: Manifest, tasks: Sequence[Task]) -> None:
        self._console, self._manifest = console, manifest
        self._left = Counter(task.unit for task in tasks)
        self._quarantined, self._committed = 0, 0
        self._images, self._total = 0, sum(manifest.tars[task.unit].samples * len(task.views) for task in tasks)
        self._started = time.perf_counter()
        self._bar = ProgressBar(
            TextColumn("{task.fields[units]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("cache", total=self._total, units=self._units(), rate="")

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def computed(self, images: int, times: StageTimes) -> None:
        """See Observer."""
        self._images = max(self._images, images)
        self._bar.update(self._task, completed=self._images, rate=f"{self._rate():,.0f} images/s, {times}")

    def committed(self, done: UnitDone) -> None:
        """See Observer."""
        self._left -= Counter([done.task.unit])
        self._quarantined += len(done.quarantined)
        self._committed += done.images
        self._images = max(self._images, self._committed)  # of other processes only commits are heard
        self._bar.update(self._task, units=self._units(), completed=self._images)
        if not self._console.is_terminal:
            self._console.print(self._line(done), soft_wrap=True)

    def _units_done(self) -> int:
        return len(self._manifest.tars) - len(self._left)

    def _units(self) -> str:
        suffix = f", {self._quarantined} quarantined" if self._quarantined else ""
        return f"unit {self._units_done()}/{len(self._manifest.tars)}{suffix}"

    def _line(self, done: UnitDone) -> str:
        left = timedelta(seconds=round((self._total - self._images) / self._rate()))
        quarantined = f", {len(done.quarantined)} quarantined" if done.quarantined else ""
        tar = self._manifest.tars[done.task.unit]
        return (
            f"{self._units_done()}/{len(self._manifest.tars)} {tar.name}: {tar.samples} samples{quarantined}, "
            f"{self._rate():,.1f} images/s, {left} left, {done.times}"
        )

    def _rate(self) -> float:
        return self._images / (time.perf_counter() - self._started)
