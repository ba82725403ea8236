"""The loop of every process: lease, compute, commit.

torchrun ranks, Slurm array tasks, Kubernetes pods, Ray actors and processes started by hand all run it. Nothing is
divided beforehand: a fast process does more, one that starts later joins in, a dead one's units are taken over.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain

from feature_store.backends.base import ObjectStore
from feature_store.commits.record import FOLDER, parse_record_path, record_path
from feature_store.inputs.tar import tar_notes
from feature_store.tools.terminal import Console
from teacher_service.cache.decode import Task
from teacher_service.cache.observers import observed
from teacher_service.cache.pipeline import Pipeline, PipelineReport, UnitDone
from teacher_service.cache.prepare import Job, consecutive_tasks, prepare, remaining_tasks
from teacher_service.cache.stage_timer import StageTimes
from teacher_service.config import CacheConfig
from teacher_service.plan.report import print_notes
from teacher_service.plan.survey import Survey
from teacher_service.share.leases import LEASE_SECONDS, Leases, open_leases
from teacher_service.stopping import Stop, stop_on_signals

_SHOWN = 5  # units named in a message


def run(survey: Survey, config: CacheConfig, console: Console, stop: Stop) -> tuple[list[Task], PipelineReport]:
    """Prepare a job and run its loop in this process.

    Args:
        survey: The job's inputs and destination.
        config: Options of the computation.
        console: Where to show progress; of several processes under torchrun, the first shows its own.
        stop: Set to stop early.

    Returns:
        What the store lacked, and what this process did of it.

    Raises:
        UserError: See ``teacher_service.cache.job.cache``.
    """
    job = prepare(survey, config)
    print_notes(tar_notes(job.tars), console)
    tasks = remaining_tasks(job.store)
    with observed(config.reporting, console, job.store.manifest, tasks) as observers, stop_on_signals(stop):
        report = compute(
            job,
            tasks,
            on_commit=observers.committed,
            on_batch=observers.computed,
            on_wait=partial(console.print, soft_wrap=True),
            lease_seconds=config.sharing.lease_seconds,
            stop=stop,
        )
        return tasks, report


def compute(
    job: Job,
    tasks: Sequence[Task],
    *,
    on_commit: Callable[[UnitDone], None],
    on_batch: Callable[[int, StageTimes], None] | None = None,
    on_wait: Callable[[str], None] = lambda message: None,
    lease_seconds: float = LEASE_SECONDS,
    stop: Stop,
) -> PipelineReport:
    """Compute tasks that are neither committed nor leased until all are committed; wait for those others compute.

    Args:
        job: The job.
        tasks: Tasks that its store lacks.
        on_commit: Told of each task this process committed.
        on_batch: See Pipeline.run.
        on_wait: Given a message when this process begins to wait for others.
        lease_seconds: Lease time of its units in a bucket.
        stop: Set to stop early.

    Raises:
        UserError: See ``teacher_service.cache.job.cache``.
    """
    pipeline, objects = Pipeline(job), job.store.objects
    report = PipelineReport((), (), 0, 0.0, StageTimes(), job.compute.batch_size)
    waits = False
    with open_leases(objects, lease_seconds) as leases:

        def committed(done: UnitDone) -> None:
            leases.release(done.task.unit)
            on_commit(done)

        while not stop.is_set() and (tasks := uncommitted(objects, tasks)):
            free = _leased(leases, objects, tasks)
            # Nothing waits inside of a round: with units of its own in hand, two processes could wait for each other.
            if (first := next(free, None)) is None:
                if not waits:
                    on_wait(_waiting(tasks, leases))
                waits = True
                stop.wait(leases.poll_seconds)
                continue
            waits = False
            more = pipeline.run(chain([first], free), on_commit=committed, on_batch=on_batch, stop=stop)
            for task in more.abandoned:
                leases.release(task.unit)
            report = _after(report, more)
        leases.sweep()
    return report


def uncommitted(objects: ObjectStore, tasks: Iterable[Task]) -> list[Task]:
    """The parts of tasks that are not committed; a job of fewer views may have committed some of a task's views."""
    committed: dict[int, set[int]] = defaultdict(set)
    for path in objects.list(FOLDER):
        if (record := parse_record_path(path)) is not None:
            unit, first, last = record
            committed[unit].update(range(first, last + 1))
    return [
        part
        for unit, views in tasks
        for part in consecutive_tasks(unit, [view for view in views if view not in committed[unit]])
    ]


def _leased(leases: Leases, objects: ObjectStore, tasks: Iterable[Task]) -> Iterator[Task]:
    """Tasks that are free when they are pulled, each leased from then on."""
    listed: frozenset[str] = frozenset()  # one listing spares a request for each unit that others committed
    for task in tasks:
        path = record_path(task.unit, task.views.start, task.views.stop - 1)
        if path in listed:
            continue
        if _exists(objects, path):
            listed = frozenset(objects.list(FOLDER))
        elif leases.take(task.unit):
            if _exists(objects, path):  # committed between the look and the lease
                leases.release(task.unit)
            else:
                yield task


def _exists(objects: ObjectStore, path: str) -> bool:
    try:
        objects.size(path)
    except FileNotFoundError:
        return False
    return True


def _waiting(tasks: Sequence[Task], leases: Leases) -> str:
    units = sorted({task.unit for task in tasks})
    more = "..." if len(units) > _SHOWN else ""
    names = f"{len(units)} units ({', '.join(map(str, units[:_SHOWN]))}{more})"
    return f"waiting for {names} that other processes compute; a unit is taken over {leases.takeover}"


def _after(first: PipelineReport, then: PipelineReport) -> PipelineReport:
    """Two runs of one pipeline as one; its times and its batch size are those of the later."""
    return replace(
        then,
        committed=first.committed + then.committed,
        abandoned=first.abandoned + then.abandoned,
        images=first.images + then.images,
        seconds=first.seconds + then.seconds,
    )
