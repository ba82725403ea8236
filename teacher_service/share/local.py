"""The local engine: this process, and any others of this machine that run the same job, share its tasks.

Nothing is divided beforehand. Each process claims a task when its pipeline has room for one, so a fast one does more,
one that comes later joins in, and what a dead one had in hand is taken over.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain

from feature_store.inputs.tar import tar_notes
from feature_store.tools.terminal import Console
from teacher_service.cache.decode import Task
from teacher_service.cache.observers import observed
from teacher_service.cache.pipeline import Pipeline, PipelineReport, UnitDone
from teacher_service.cache.prepare import Job, missing_parts, prepare, remaining_tasks
from teacher_service.cache.stage_timer import StageTimes
from teacher_service.config import CacheConfig
from teacher_service.plan.report import print_notes
from teacher_service.plan.survey import Survey
from teacher_service.share.claims import Claims, lock_folder
from teacher_service.stopping import Stop, stop_on_signals

POLL_SECONDS = 0.5


def run(survey: Survey, config: CacheConfig, console: Console, stop: Stop) -> tuple[list[Task], PipelineReport]:
    """What a store lacked, and what this process did of it.

    Args:
        survey: The job's inputs and destination.
        config: How to compute.
        console: Where to show progress; of several processes under torchrun, the first shows its own.
        stop: Set to stop early.

    Raises:
        UserError: See ``teacher_service.cache.job.cache``.
    """
    job = prepare(survey, config)
    print_notes(tar_notes(job.tars), console)
    tasks = remaining_tasks(job.store)
    with observed(config.reporting, console, job.store.manifest, tasks) as observers, stop_on_signals(stop):
        return tasks, compute(job, tasks, on_commit=observers.committed, on_batch=observers.computed, stop=stop)


def compute(
    job: Job,
    tasks: Sequence[Task],
    *,
    on_commit: Callable[[UnitDone], None],
    on_batch: Callable[[int, StageTimes], None],
    stop: Stop,
) -> PipelineReport:
    """See to it that all tasks are committed: compute those that are free, wait for those other processes compute.

    Args:
        job: The job.
        tasks: What its store lacks.
        on_commit: Told of each task this process committed.
        on_batch: See Pipeline.run.
        stop: Set to stop early.

    Raises:
        UserError: See ``teacher_service.cache.job.cache``.
    """
    pipeline = Pipeline(job)
    report = PipelineReport((), (), 0, 0.0, StageTimes(), job.compute.batch_size)
    with Claims(job.store, lock_folder(job.store.objects)) as claims:

        def committed(done: UnitDone) -> None:
            claims.release(done.task)
            on_commit(done)

        left = claims.uncommitted(tasks)
        while left and not stop.is_set():
            lost: list[Task] = []
            more = _round(pipeline, claims.take(left), committed, on_batch, stop)
            if more is None:
                stop.wait(POLL_SECONDS)
            else:
                report = _after(report, more)
                for task in more.abandoned:
                    claims.release(task)
                lost = missing_parts(job.store.objects, more.abandoned)
            left = [task for task in claims.uncommitted(left) if task not in report.abandoned] + lost
        claims.sweep()
    return report


def _round(
    pipeline: Pipeline,
    free: Iterator[Task],
    on_commit: Callable[[UnitDone], None],
    on_batch: Callable[[int, StageTimes], None],
    stop: Stop,
) -> PipelineReport | None:
    """Compute what is free now; None if nothing is.

    Nothing waits inside of a round: a process that waited for another with a task of its own in hand could wait for
    one that waits for it.
    """
    if (first := next(free, None)) is None:
        return None
    return pipeline.run(chain([first], free), on_commit=on_commit, on_batch=on_batch, stop=stop)


def _after(first: PipelineReport, then: PipelineReport) -> PipelineReport:
    """Two runs of one pipeline as one; its times and its batch size are those of the later."""
    return replace(
        then,
        committed=first.committed + then.committed,
        abandoned=first.abandoned + then.abandoned,
        images=first.images + then.images,
        seconds=first.seconds + then.seconds,
    )
