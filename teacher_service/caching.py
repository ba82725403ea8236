"""The cache job: tars through the frozen teacher into a store, unit by unit, resumable after any interruption."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console

from feature_store.store import open_store
from teacher_service.config import CacheConfig
from teacher_service.decoding import Task, warm_up
from teacher_service.pipeline import Pipeline, PipelineReport, UnitDone
from teacher_service.preparation import Job, prepared, remaining_tasks
from teacher_service.progress import Progress
from teacher_service.waits import StageTimes


@dataclass(frozen=True)
class CacheSummary:
    """What a cache job did.

    Attributes:
        store: The store's path.
        units: Units of the store.
        units_written: Units this run computed and committed.
        units_skipped: Units an earlier run had committed.
        images: View images this run put through the teacher.
        quarantined: Samples in the whole store that could not be used.
        teacher_seconds: Seconds of this run the teacher worked.
        seconds: Seconds of this run.
        images_per_second: View images per second of this run.
        stages: Share of its time each stage worked, 0..1.
        bottleneck: The stage the others waited for.
        batch_size: Images per forward pass at the end; less than asked for if memory ran out.
    """

    store: str
    units: int
    units_written: int
    units_skipped: int
    images: int
    quarantined: int
    teacher_seconds: float
    seconds: float
    images_per_second: float
    stages: dict[str, float]
    bottleneck: str
    batch_size: int


def cache(config: CacheConfig, console: Console | None = None, *, stop: threading.Event | None = None) -> CacheSummary:
    """Run the teacher over every unit that is not committed yet.

    Args:
        config: What to do.
        console: Where to show progress; None for nowhere.
        stop: Set to stop early, see Pipeline.run.

    Raises:
        InputError: Unknown teacher, unusable tars or checkpoint, or with strict an unreadable sample.
        MismatchError: The store was begun with other settings; names the field.
        ResourceError: Disk full, weights that cannot be fetched, a device that gave up.
    """
    started = time.perf_counter()
    warm_up(config.workers)
    with prepared(config) as job:
        tasks = remaining_tasks(job.store)
        with Progress(console or Console(quiet=True), job.store.manifest, tasks) as progress:
            report = run_in_process(job, tasks, progress.committed, progress.computed, stop)
        store = open_store(config.store)  # engines commit in other processes
        store.compact()
    seconds = time.perf_counter() - started
    written = {task.unit for task in report.committed}
    return CacheSummary(
        store=str(config.store),
        units=len(job.tars),
        units_written=len(written),
        units_skipped=len(job.tars) - len({task.unit for task in tasks}),
        images=report.images,
        quarantined=sum(len(record.quarantined) for record in store.committed.records),
        teacher_seconds=report.times.busy.get("forward", 0.0),
        seconds=seconds,
        images_per_second=report.images / seconds,
        stages={stage: report.times.share(stage) for stage in report.times.available},
        bottleneck=report.times.bottleneck,
        batch_size=report.batch_size,
    )


def run_in_process(
    job: Job,
    tasks: Sequence[Task],
    on_commit: Callable[[UnitDone], None],
    on_batch: Callable[[int, StageTimes], None],
    stop: threading.Event | None,
) -> PipelineReport:
    """The simplest engine: one pipeline in this process."""
    pipeline = Pipeline(job.config, job.store, job.teacher, job.tars)
    return pipeline.run(tasks, on_commit=on_commit, on_batch=on_batch, stop=stop)
