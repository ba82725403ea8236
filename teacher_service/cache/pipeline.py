"""Pipeline of the cache job: decode, forward, encode, write.

Tasks go in, committed units come out; every queue between stages is bounded. In memory, per process, are at most
``decode.PREFETCH`` batches for each decode worker, ``BATCHES_AHEAD`` batches computed and not yet encoded, and three
units: one being written, one that waits for the writer, one being collected (more only where a unit is smaller than a
batch).
"""

import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from feature_store.errors import CommittedError, InputError
from feature_store.inputs.base import SampleSource
from feature_store.store import Store
from teacher_service.cache.decode import Task, ViewBatch, ViewDataset, batch_spans, read_batches
from teacher_service.cache.encode import UnitEncoder
from teacher_service.cache.forward import Features, Forward
from teacher_service.cache.prepare import Job
from teacher_service.cache.stage import Stage
from teacher_service.cache.stage_timer import StageTimer, StageTimes
from teacher_service.cache.write import write_unit
from teacher_service.cache.write_views import ViewTarWriter

ENCODERS = 2  # threads that share the encoding of each batch
BATCHES_AHEAD = 2  # keeps a GPU busy while one is being copied out and one encoded
FINISH_SECONDS = 5.0  # a stopped pipeline finishes the unit under way if this suffices


@dataclass(frozen=True)
class UnitDone:
    """A unit's views are committed; small, and fit to cross processes.

    Attributes:
        task: Which ones.
        images: View images of them, quarantined ones included.
        quarantined: Reason by position of samples that could not be used.
        bytes: Bytes of the objects written.
        times: The pipeline's working times so far.
    """

    task: Task
    images: int
    quarantined: dict[int, str]
    bytes: int
    times: StageTimes


@dataclass(frozen=True)
class PipelineReport:
    """Work done by one or several pipelines.

    Attributes:
        committed: Tasks they committed.
        abandoned: Tasks they had taken and did not commit: they were stopped, or another process was first.
        images: View images that went through the teacher.
        seconds: Seconds they ran; of several, the longest.
        times: Their stages' working times.
        batch_size: Images per forward pass at the end; less than asked for if memory ran out.
    """

    committed: tuple[Task, ...]
    abandoned: tuple[Task, ...]
    images: int
    seconds: float
    times: StageTimes
    batch_size: int

    @classmethod
    def together(cls, reports: Sequence["PipelineReport"]) -> "PipelineReport":
        """Of at least one pipeline that ran side by side."""
        return cls(
            committed=tuple(task for report in reports for task in report.committed),
            abandoned=tuple(task for report in reports for task in report.abandoned),
            images=sum(report.images for report in reports),
            seconds=max(report.seconds for report in reports),
            times=StageTimes.together(report.times for report in reports),
            batch_size=min(report.batch_size for report in reports),
        )


class Pipeline:
    """Computes units and commits them; several processes may each run one on the same store.

    The bytes of a store depend on neither workers nor the order of tasks. A batch size (``--batch-size``, and what
    remains of it after the device ran out of memory) can change the last bits of a float, nothing else.

    Args:
        job: The job to compute. Each unit is locked while it is written, the store as a whole is not.
        dataset: Gives batches by span; default the tars' views.
    """

    def __init__(self, job: Job, dataset: Any = None) -> None:
        compute, manifest = job.compute, job.store.manifest
        self._compute, self._strict, self._store, self._tars = compute, job.strict, job.store, job.tars
        self._dataset = dataset or ViewDataset(job.tars, manifest.policy, manifest.seed, manifest.view_encoding)
        self._views_out = None if job.views_out is None else ViewTarWriter(job.views_out, job.store)
        self._images = 0
        self._timer = StageTimer({"decode": max(1, compute.workers)})
        self._forward = Forward(
            job.teacher, tuple(manifest.taps), compute.batch_size, self._timer, compile=compute.compile
        )

    def run(
        self,
        tasks: Iterable[Task],
        *,
        on_commit: Callable[[UnitDone], None],
        on_batch: Callable[[int, StageTimes], None] | None = None,
        stop: threading.Event | None = None,
    ) -> PipelineReport:
        """Compute and commit tasks until there are no more, or until told to stop.

        A task is pulled when a decode worker has room for it, so at most ``PREFETCH`` batches per worker ahead of the
        teacher: an iterator may hand out tasks from a queue that others take from, too. It is asked in the calling
        thread and should not make it wait long.

        After a stop no task is pulled; the unit the teacher is at is finished if that takes ``FINISH_SECONDS`` at most
        and dropped otherwise, finished units are written, the rest leaves nothing in the store.

        Args:
            tasks: Tasks, in order.
            on_commit: Told of each committed task, in the writer's thread.
            on_batch: Told after each batch how many images this pipeline computed in all its runs, and stage times.
            stop: Set to stop early.

        Raises:
            UserError: See ``teacher_service.cache.job.cache``; committed units stay.
        """
        timer, started = self._timer, time.perf_counter()
        run = _Run(self._store, self._views_out, self._tars, on_commit, timer)
        stopping = _Stopping(stop or threading.Event())
        with (
            closing(self._batches(run.pulled(tasks, stopping.requested))) as batches,
            Stage("unit-writer", threads=1, waiting=0) as writer,
            ThreadPoolExecutor(ENCODERS, thread_name_prefix="encoder") as pool,
            Stage("encoder", threads=1, waiting=BATCHES_AHEAD) as encoder,
        ):
            for batch in batches:
                timer.start()
                timer.add("decode", batch.seconds)
                self._require_readable(batch)
                if not stopping.goes_on(batch, run.images_left(batch)):
                    break
                features = self._forward(batch.pixels.flatten(0, 1))
                encoder.submit(run.encode, batch, features, run.encoder_of(batch), pool, writer)
                run.images += batch.images
                self._images += batch.images
                if on_batch is not None:
                    on_batch(self._images, timer.times())
        return run.report(time.perf_counter() - started, self._forward.batch_size)

    def _batches(self, tasks: Iterable[Task]) -> Generator[ViewBatch, None, None]:
        sizes, views = [len(tar) for tar in self._tars], self._store.manifest.num_views
        return read_batches(
            self._dataset,
            batch_spans(tasks, sizes, self._compute.batch_size),
            most_images=max(views, min(views * max(sizes), self._compute.batch_size)),
            workers=self._compute.workers,
            pin_memory=self._forward.device.type == "cuda",
        )

    def _require_readable(self, batch: ViewBatch) -> None:
        if self._strict and batch.quarantined:
            position, reason = next(iter(batch.quarantined.items()))
            tar = self._tars[batch.task.unit]
            raise InputError(
                f"sample {tar.keys[position]!r} of {tar.url} cannot be used: {reason}; "
                "fix the tar, or run without --strict to quarantine it"
            )


class _Run:
    """State of one run: tasks it pulled, and units from their first batch to their commit."""

    def __init__(
        self,
        store: Store,
        views_out: ViewTarWriter | None,
        tars: Sequence[SampleSource],
        on_commit: Callable[[UnitDone], None],
        timer: StageTimer,
    ) -> None:
        self._store, self._views_out, self._tars = store, views_out, tars
        self._on_commit, self._timer = on_commit, timer
        self._pulled: list[Task] = []
        self._committed: list[Task] = []
        self._encoder: UnitEncoder | None = None
        self.images = 0

    def pulled(self, tasks: Iterable[Task], stop: threading.Event) -> Iterator[Task]:
        """The tasks until told to stop."""
        iterator = iter(tasks)
        while not stop.is_set() and (task := next(iterator, None)) is not None:
            self._pulled.append(task)
            yield task

    def images_left(self, batch: ViewBatch) -> int:
        """View images of a batch's task from this batch on."""
        return (len(self._tars[batch.task.unit]) - batch.start) * len(batch.task.views)

    def encoder_of(self, batch: ViewBatch) -> UnitEncoder:
        """The encoder of a batch's unit; batches come task by task."""
        if self._encoder is None or batch.start == 0:
            self._encoder = UnitEncoder(self._store.layout, self._tars[batch.task.unit].keys, len(batch.task.views))
        return self._encoder

    def encode(self, batch: ViewBatch, features: Features, encoder: UnitEncoder, pool: Executor, writer: Stage) -> None:
        """Encode a batch; the unit's last one hands the unit to the writer. In the encode thread."""
        arrays = features.arrays()
        with self._timer.busy("encode"):
            encoder.add(batch, arrays, pool)
        if encoder.whole:
            writer.submit(self._write, batch.task, encoder)

    def _write(self, task: Task, encoder: UnitEncoder) -> None:
        unit = encoder.unit()
        try:
            with self._timer.busy("write"):
                if self._views_out is not None:  # before the commit, which says that they are there
                    self._views_out.write(task, encoder.views())
                write_unit(self._store, task, unit)
        except CommittedError:  # another worker was given it too, and was first
            return
        self._committed.append(task)
        record = self._store.committed.record(task.unit, task.views.start)
        self._on_commit(
            UnitDone(
                task=task,
                images=len(unit.keys) * len(task.views),
                quarantined=unit.quarantined,
                bytes=sum(proof.bytes for proof in record.objects.values()),
                times=self._timer.times(),
            )
        )

    def report(self, seconds: float, batch_size: int) -> PipelineReport:
        """The run's report."""
        done = set(self._committed)
        return PipelineReport(
            committed=tuple(self._committed),
            abandoned=tuple(task for task in self._pulled if task not in done),
            images=self.images,
            seconds=seconds,
            times=self._timer.times(),
            batch_size=batch_size,
        )


class _Stopping:
    """Decides which batches are still worth computing once a stop was requested."""

    def __init__(self, requested: threading.Event) -> None:
        self.requested = requested
        self._task: Task | None = None
        self._started, self._deadline, self._images = 0.0, 0.0, 0

    def goes_on(self, batch: ViewBatch, left: int) -> bool:
        """Whether to compute a batch; left counts the task's images from it on."""
        now = time.perf_counter()
        if not self.requested.is_set():
            self._started = self._started or now
            self._deadline, self._task = now + FINISH_SECONDS, batch.task
            self._images += batch.images
            return True
        seconds_per_image = (now - self._started) / max(1, self._images)
        return batch.task == self._task and now + left * seconds_per_image <= self._deadline
