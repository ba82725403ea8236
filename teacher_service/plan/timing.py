"""Timing: a few samples through the pipeline, scaled to the whole job.

Symbols: V views a sample, N samples, f teacher seconds an image, c(V) seconds an image of the whole pipeline.
"""

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from feature_store.errors import InputError
from feature_store.format.codecs.bound import calibrated, needs_calibration
from feature_store.format.manifest import TarInfo
from feature_store.inputs.base import Sample, SampleSource
from feature_store.store import Store
from feature_store.teacher.bundle import bundle_state
from feature_store.teacher.model import Teacher
from teacher_service.cache.decode import Task, ViewDataset
from teacher_service.cache.pipeline import Pipeline
from teacher_service.cache.prepare import CALIBRATION_SAMPLES, Job, first_features
from teacher_service.cache.stage_timer import StageTimes
from teacher_service.config import ComputeSpec, TeacherSpec
from teacher_service.load import load
from teacher_service.plan.disk import folder_beside
from teacher_service.plan.survey import Survey
from teacher_service.plan.write_rate import WriteRate

SPLIT_SAMPLES = 16  # images whose decoding is timed apart from cutting views
SPLIT_VIEWS = 5


class TarPart:
    """Some consecutive samples of a source, as a unit of their own; see SampleSource."""

    def __init__(self, tar: SampleSource, positions: range) -> None:
        self.name, self.url, self.header_sha256 = tar.name, tar.url, tar.header_sha256
        self.keys = tuple(tar.keys[i] for i in positions)
        self.notes = ()
        self.problems = {at: tar.problems[i] for at, i in enumerate(positions) if i in tar.problems}
        self._tar, self._first = tar, positions.start

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, position: int) -> Sample:
        """See SampleSource."""
        return self._tar.read(self._first + position)

    def label(self, position: int) -> int:
        """See SampleSource."""
        return self._tar.label(self._first + position)

    def content_sha256(self) -> str:
        """See SampleSource."""
        return self._tar.content_sha256()


@dataclass(frozen=True)
class Timing:
    """Seconds per sample on this machine, by stage.

    Attributes:
        samples: Samples that were timed.
        views: Views of each.
        device: Where the teacher ran.
        startup: From the start to the second batch, once a job.
        calibration: Calibration of the codecs, once a store.
        workers: Decode workers; 0 decodes in the teacher's own process.
        read: Reading and decoding one sample, in one worker.
        cut: Cutting one view of it, in one worker.
        busy: Per image, of each stage after decoding.
        written: Bytes for which the write rate in it was measured.
        disk: The disk's own rate, if it was measured.
    """

    samples: int
    views: int
    device: str
    startup: float
    calibration: float
    workers: int
    read: float
    cut: float
    busy: dict[str, float]
    written: int = 0
    disk: WriteRate | None = None

    def with_disk(self, disk: WriteRate, bytes_per_image: float) -> "Timing":
        """The same with a disk whose rate was measured for longer: writing takes at least its steady rate."""
        write = max(self.busy["write"], bytes_per_image / disk.steady)
        return replace(self, busy=self.busy | {"write": write}, written=self.written + disk.bytes, disk=disk)

    def decode(self, views: int) -> float:
        """Per image, of all workers together, when V views are cut from each decode."""
        return (self.read / views + self.cut) / max(1, self.workers)

    def seconds_per_image(self, views: int) -> float:
        """c(V): stages overlap, so the slowest decides; without workers decoding and the teacher take turns."""
        decode = self.decode(views)
        first = [decode + self.busy["forward"]] if not self.workers else [decode, self.busy["forward"]]
        return max(*first, *self.busy.values())

    def seconds(self, images: float, views: int, *, new: bool = True) -> float:
        """A job's seconds for a number of images, V of each sample; an existing store already has its statistics."""
        return self.startup + self.calibration * new + images * self.seconds_per_image(views)

    def break_even_epochs(self, views: int) -> float:
        """Epochs of one student after which the cache has cost less than the teacher in the training loop.

        Online, each epoch of each student runs the teacher on N images: N f. The cache runs it once: N V c(V).
        Reading, decoding and augmenting images costs both ways the same, and rows are read while the student computes,
        so epochs = V c(V) / f: V if decoding keeps up with the teacher. It counts the teacher's time only: a cached
        run needs no memory for the teacher beside the student, either.
        """
        return views * self.seconds_per_image(views) / self.busy["forward"]

    def break_even_students(self, views: int, epochs: int) -> float:
        """Students of E epochs each after which it has: S E f = V c(V)."""
        return self.break_even_epochs(views) / epochs


def measure(survey: Survey, spec: TeacherSpec, compute: ComputeSpec) -> Timing:
    """Put the first samples through the pipeline into a store that is deleted again.

    The teacher has random weights: they take as long as trained ones, and need not be fetched.

    Args:
        survey: The surveyed job.
        spec: The teacher.
        compute: How.

    Raises:
        UserError: As the job would.
    """
    total = sum(map(len, survey.tars))
    if total < 2:
        raise InputError("--time-samples needs two samples to time, the tars hold one; leave it out")
    started, views = time.perf_counter(), survey.manifest.num_views
    teacher = load(spec, compute.device, pretrained=False)
    parts = tuple(_parts(survey.tars, views, compute))  # as much of a tar as the pipeline needs
    with _scratch_job(survey, compute, teacher, parts) as (job, calibration):
        pipeline = Pipeline(job)
        first, *rest = [Task(unit, range(views)) for unit in range(len(parts))]
        warm_up = pipeline.run([first], on_commit=lambda done: None)
        startup = time.perf_counter() - started - calibration
        written = list[int]()
        timed = pipeline.run(rest, on_commit=lambda done: written.append(done.bytes))
    busy = {stage: value / timed.images for stage, value in _difference(timed.times, warm_up.times).items()}
    read, cut = _split(ViewDataset(parts, survey.manifest.policy, survey.manifest.seed), views)
    scale = busy.pop("decode") * views / (read + views * cut)
    samples = sum(map(len, parts))
    return Timing(
        samples=timed.images // views,
        views=views,
        device=str(next(teacher.parameters()).device),
        startup=startup,
        calibration=calibration * min(CALIBRATION_SAMPLES, total) / samples,
        workers=compute.workers,
        read=read * scale,
        cut=cut * scale,
        busy=busy,
        written=sum(written),
    )


def _parts(tars: Sequence[SampleSource], views: int, compute: ComputeSpec) -> list[TarPart]:
    """Units of the first samples: one of a batch to warm up with, then the rest."""
    left = min(compute.time_samples, sum(map(len, tars)))
    first = max(1, min(compute.batch_size // views, left // 2))
    parts = []
    for tar in tars:
        start = 0
        while left and start < len(tar):
            count = min(left, len(tar) - start, len(tar) if parts else first)
            parts.append(TarPart(tar, range(start, start + count)))
            start, left = start + count, left - count
    return parts


@contextmanager
def _scratch_job(
    survey: Survey, compute: ComputeSpec, teacher: Teacher, parts: tuple[SampleSource, ...]
) -> Iterator[tuple[Job, float]]:
    """A job with a temporary store (and views) on the real one's disk, and the seconds of its calibration."""
    blocks = bundle_state(teacher.later_blocks)
    manifest = replace(
        survey.manifest_of(teacher, blocks),
        tars=tuple(TarInfo(part.name, len(part), part.header_sha256) for part in parts),
        capacity=max(map(len, parts)),
    )
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder_beside(survey.objects), prefix=".teacher-service-timing-") as folder:
        if needs_calibration(manifest):
            manifest = calibrated(manifest, first_features(compute.batch_size, manifest, teacher, parts))
        calibration = time.perf_counter() - started
        store = Store.create(Path(folder) / "store", manifest, blocks)
        views_out = str(Path(folder) / "views") if manifest.view_encoding else None
        yield Job(compute, store, teacher, parts, views_out), calibration


def _difference(later: StageTimes, earlier: StageTimes) -> dict[str, float]:
    return {stage: seconds - earlier.busy[stage] for stage, seconds in later.busy.items()}


def _split(dataset: ViewDataset, views: int) -> tuple[float, float]:
    """Seconds to read and decode a sample, and to cut a view of it; only their ratio is used."""
    few, many = views, views + SPLIT_VIEWS
    seconds = {few: 0.0, many: 0.0}
    room = np.zeros((many, *dataset.policy.size, 3), np.uint8)  # memory used again, as in a worker
    for position in range(min(SPLIT_SAMPLES, len(dataset.tars[0]))):
        for count in seconds:
            started = time.perf_counter()
            dataset.sample(Task(0, range(count)), position, room[:count])
            seconds[count] += time.perf_counter() - started
    total = min(SPLIT_SAMPLES, len(dataset.tars[0]))
    cut = max(0.0, seconds[many] - seconds[few]) / SPLIT_VIEWS / total
    return max(0.0, seconds[few] / total - views * cut), cut
