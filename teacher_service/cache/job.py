"""The cache job: all tars through the teacher into a store, resumable."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from feature_store.commits.locks import has_locks
from feature_store.commits.record import encode_record
from feature_store.store import Store, open_store
from feature_store.tools.options import environment_number
from feature_store.tools.terminal import Console
from teacher_service.cache.decode import Task, warm_up
from teacher_service.cache.observers import append_event
from teacher_service.cache.pipeline import PipelineReport
from teacher_service.cache.write_views import ViewTarWriter
from teacher_service.config import CacheConfig
from teacher_service.plan.forecast import forecast
from teacher_service.plan.sizes import remaining_bytes
from teacher_service.plan.survey import Survey, survey
from teacher_service.share import loop
from teacher_service.share.store_lock import preparing
from teacher_service.stopping import Stop


@dataclass(frozen=True)
class CacheSummary:
    """Result of a cache job.

    Attributes:
        store: The store's path.
        units: Units of the store.
        units_written: Units this run computed and committed.
        units_skipped: Units an earlier run had committed.
        units_left: Units that still lack views, because the run was stopped.
        images: View images this run put through the teacher.
        quarantined: Samples in the whole store that could not be used.
        teacher_seconds: Seconds of this run the teacher worked.
        seconds: Seconds of this run.
        predicted_seconds: Prediction of the timed samples; None without --time-samples.
        images_per_second: View images per second of this run.
        device_hours: Hours of its devices, from the first batch to the last commit, added up.
        bytes_written: Bytes of the units this run committed.
        predicted_bytes: The plan's prediction of them.
        stages: Share of its time each stage worked, 0..1.
        bottleneck: The stage the others waited for.
        batch_size: Images per forward pass at the end; less than asked for if memory ran out.
    """

    store: str
    units: int
    units_written: int
    units_skipped: int
    units_left: int
    images: int
    quarantined: int
    teacher_seconds: float
    seconds: float
    predicted_seconds: float | None
    images_per_second: float
    device_hours: float
    bytes_written: int
    predicted_bytes: int
    stages: dict[str, float]
    bottleneck: str
    batch_size: int


def cache(config: CacheConfig, console: Console | None = None, *, stop: Stop | None = None) -> CacheSummary:
    """Run the teacher over every unit that is not committed yet.

    Args:
        config: The job.
        console: Where to show progress; None for nowhere.
        stop: Set to stop early, see Pipeline.run; SIGTERM, SIGHUP and Ctrl-C set it too.

    Raises:
        InputError: Unknown teacher, unusable tars or checkpoint, or with strict an unreadable sample.
        MismatchError: The store was created with other settings; names the field.
        ResourceError: Disk full, weights that cannot be fetched, a failed device.
    """
    started = time.perf_counter()
    warm_up(config.compute.workers)
    here = config.sharing.engine == "local"  # Ray's actors make surveys of their own
    found = survey(config) if here or config.compute.time_samples else None
    surveyed = time.perf_counter()
    predicted = None
    if found is not None and config.compute.time_samples:
        processes = max(1, environment_number("WORLD_SIZE", 1))  # torchrun's, which time their samples at once
        predicted = forecast(found, config, processes).seconds
    started += time.perf_counter() - surveyed  # timing samples is no part of the run
    tasks, report = _run(found, config, console or Console(quiet=True), stop or Stop())
    store = _finish(config)
    seconds = time.perf_counter() - started
    summary = _summary(str(config.store), store, tasks, report, seconds, predicted)
    if config.reporting.log_jsonl is not None:
        append_event(config.reporting.log_jsonl, "end", **asdict(summary))
    return summary


def _finish(config: CacheConfig) -> Store:
    """The store as all processes left it, without orphans and with a new commit index."""
    store = open_store(config.store)
    with preparing(config.store):
        if has_locks(store.objects):
            store.remove_orphans()  # of killed workers; an object that is being written now has a lock
        if config.views.out is not None:
            ViewTarWriter(config.views.out, store).remove_orphans()
        store.write_commit_index()
    return store


def _summary(
    path: str, store: Store, tasks: Sequence[Task], report: PipelineReport, seconds: float, predicted: float | None
) -> CacheSummary:
    units = len(store.manifest.tars)
    return CacheSummary(
        store=path,
        units=units,
        units_written=len({task.unit for task in report.committed}),
        units_skipped=units - len({task.unit for task in tasks}),
        units_left=len(store.committed.missing_views()),
        images=report.images,
        quarantined=sum(len(store.quarantined(unit)) for unit in store.committed.units),
        teacher_seconds=report.times.busy.get("forward", 0.0),
        seconds=seconds,
        predicted_seconds=predicted,
        images_per_second=report.images / seconds,
        device_hours=report.times.available.get("forward", 0.0) / 3600,
        bytes_written=sum(_bytes(store, task) for task in report.committed),
        predicted_bytes=remaining_bytes(store.layout, _views(report.committed)),
        stages={stage: report.times.share(stage) for stage in report.times.available},
        bottleneck=report.times.bottleneck,
        batch_size=report.batch_size,
    )


def _bytes(store: Store, task: Task) -> int:
    """Bytes of a committed task's objects and of its record."""
    record = store.committed.record(task.unit, task.views.start)
    return sum(proof.bytes for proof in record.objects.values()) + len(encode_record(record))


def _views(tasks: Sequence[Task]) -> dict[int, list[int]]:
    views: dict[int, list[int]] = {}
    for task in tasks:
        views.setdefault(task.unit, []).extend(task.views)
    return views


def _run(found: Survey | None, config: CacheConfig, console: Console, stop: Stop) -> tuple[list[Task], PipelineReport]:
    """The tasks the store lacked, and the engine's report."""
    if found is None or config.sharing.engine == "ray":
        from teacher_service.share import ray  # an optional extra

        return ray.run(config, console, stop)
    return loop.run(found, config, console, stop)
