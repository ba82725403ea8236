"""The cache job: tars through the frozen teacher into a store, unit by unit, resumable after any interruption.

Shape legend: b samples of a batch, V views, n samples of a unit, N tokens, C channels.
"""

import glob
import shutil
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.filesize import decimal
from torch import Tensor

from feature_store.codecs.registry import calibrated, needs_calibration
from feature_store.errors import InputError, ResourceError
from feature_store.manifest import Manifest
from feature_store.objects.local import PARTIAL_SUFFIX
from feature_store.store import Store, open_store
from feature_store.tars.tar import Tar
from feature_store.teacher.bundle import bundle_sha256, bundle_state
from feature_store.teacher.model import Teacher, load_teacher
from teacher_service.config import CacheConfig
from teacher_service.decoding import Batch, Task, ViewDataset, batch_spans, read_batches, warm_up
from teacher_service.devices import find_device
from teacher_service.planning import growth_of, job_manifest, survey
from teacher_service.progress import Progress
from teacher_service.rows import UnitRows
from teacher_service.writing import UnitWriter, disk_error

CALIBRATION_SAMPLES = 256  # images whose features a codec learns its statistics from


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
        teacher_seconds: Seconds of this run spent in the teacher, transfers included.
        seconds: Seconds of this run.
        images_per_second: View images per second of this run.
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


def cache(config: CacheConfig, console: Console | None = None) -> CacheSummary:
    """Run the teacher over every unit that is not committed yet.

    Args:
        config: What to do.
        console: Where to show progress; None for nowhere.

    Raises:
        InputError: Unknown teacher, unusable tars or checkpoint, or with strict an unreadable sample.
        MismatchError: The store was begun with other settings; names the field.
        ResourceError: Disk full, weights that cannot be fetched, a device that gave up.
    """
    started = time.perf_counter()
    warm_up(config.workers)
    plan, tars = survey(config)
    if not plan.fits:
        raise ResourceError(
            f"{plan.store} needs {decimal(plan.remaining_bytes)} more, {decimal(plan.free_bytes)} are free, "
            f"{decimal(plan.remaining_bytes - plan.free_bytes)} are missing; "
            "make room, or store fewer --views or --taps"
        )
    teacher = _load_teacher(config)
    blocks = bundle_state(teacher.later_blocks)
    manifest = job_manifest(config, tars, teacher.info, teacher.split, bundle_sha256(blocks))
    if needs_calibration(manifest) and not (config.store / "zarr.json").exists():
        manifest = calibrated(manifest, first_features(config, manifest, teacher, tars))
    with _writable_store(config.store, manifest, blocks, plan.remaining_bytes) as store:
        tasks = remaining_tasks(store)
        job = _Job(config, store, teacher, tars)
        job.run(tasks, Progress(console or Console(quiet=True), store.manifest, tasks))
        store.compact()
    seconds = time.perf_counter() - started
    return CacheSummary(
        store=str(config.store),
        units=len(tars),
        units_written=len({task.unit for task in tasks}),
        units_skipped=len(tars) - len({task.unit for task in tasks}),
        images=job.images,
        quarantined=sum(len(record.quarantined) for record in store.committed.records),
        teacher_seconds=job.teacher_seconds,
        seconds=seconds,
        images_per_second=job.images / seconds,
    )


def _load_teacher(config: CacheConfig) -> Teacher:
    return load_teacher(
        config.teacher,
        checkpoint=config.checkpoint,
        model_kwargs=config.model_kwargs,
        depth=config.depth,
        compute_dtype=config.compute_dtype,
        device=find_device(config.device),
    )


@contextmanager
def _writable_store(path: Path, manifest: Manifest, blocks: Mapping[str, Tensor], needed: int) -> Iterator[Store]:
    """The store, created if need be, with this process as its only writer and without leftovers."""
    if not (path / "zarr.json").exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            Store.create(path, manifest, blocks)
        except OSError as error:
            raise disk_error(error, path, "the new store", needed) from error
    store = open_store(path)
    growth_of(store, manifest)
    with store.locked_for_writing():
        store = open_store(path)  # another writer may have committed before it gave up the lock
        if growth := growth_of(store, manifest):
            store = store.grow(growth.manifest)
        store.remove_leftovers()
        for unborn in path.parent.glob(f"{glob.escape(path.name)}.*{PARTIAL_SUFFIX}"):
            shutil.rmtree(unborn, ignore_errors=True)  # a creation that was killed; the store exists by now
        yield store


def remaining_tasks(store: Store) -> list[Task]:
    """What a store still lacks, unit by unit; a unit's missing views are one task where they follow each other."""
    return [
        Task(unit, range(run[0], run[-1] + 1))
        for unit, views in store.committed.missing_views().items()
        for run in _runs(views)
    ]


def _runs(views: Sequence[int]) -> list[list[int]]:
    """Ascending numbers cut where one is left out."""
    numbered = groupby(enumerate(views), key=lambda pair: pair[1] - pair[0])
    return [[view for _, view in run] for _, run in numbered]


def first_features(
    config: CacheConfig, manifest: Manifest, teacher: Teacher, tars: Sequence[Tar]
) -> dict[str, np.ndarray]:
    """A first sample of every tap for codecs that learn from one: view 0 of the first readable samples.

    Raises:
        InputError: No sample of any tar can be read.
    """
    dataset = ViewDataset(tars, manifest.policy, manifest.seed)
    readable = (
        view.views[0]
        for unit, tar in enumerate(tars)
        for position in range(len(tar))
        if not (view := dataset.sample(Task(unit, range(1)), position)).reason
    )
    pixels = list(islice(readable, CALIBRATION_SAMPLES))
    if not pixels:
        raise InputError("no image of any tar can be read, so there is nothing to store; mend the tars")
    device = next(teacher.parameters()).device
    parts = [teacher(part.to(device)).taps for part in torch.from_numpy(np.stack(pixels)).split(config.batch_size)]
    return {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in manifest.taps}


class _Job:
    """One run over the units that are left; counts as it goes."""

    def __init__(self, config: CacheConfig, store: Store, teacher: Teacher, tars: Sequence[Tar]) -> None:
        self.config, self.store, self.teacher, self.tars = config, store, teacher, tars
        self.device = next(teacher.parameters()).device
        self.images, self.teacher_seconds = 0, 0.0

    def run(self, tasks: Sequence[Task], progress: Progress) -> None:
        """Compute and commit the given tasks, in order."""
        manifest = self.store.manifest
        with (
            progress,
            closing(self._batches(tasks)) as batches,
            UnitWriter(self.store, progress.committed) as writer,
        ):
            for task, parts in groupby(batches, key=lambda batch: batch.task):
                rows = UnitRows(manifest, self.tars[task.unit].keys, len(task.views))
                for batch in parts:
                    self._require_readable(batch)
                    taps, logits = self._forward(batch.pixels.flatten(0, 1))
                    rows.add(batch, taps, logits)
                    progress.computed(self.images)
                writer.submit(task, rows.data())

    def _batches(self, tasks: Sequence[Task]) -> Generator[Batch, None, None]:
        manifest, config = self.store.manifest, self.config
        return read_batches(
            ViewDataset(self.tars, manifest.policy, manifest.seed),
            batch_spans(tasks, [len(tar) for tar in self.tars], config.batch_size),
            workers=config.workers,
            pin_memory=self.device.type == "cuda",
        )

    def _require_readable(self, batch: Batch) -> None:
        if self.config.strict and batch.quarantined:
            position, reason = next(iter(batch.quarantined.items()))
            tar = self.tars[batch.task.unit]
            raise InputError(
                f"sample {tar.keys[position]!r} of {tar.url} cannot be used: {reason}; "
                "mend the tar, or run without --strict to quarantine it"
            )

    def _forward(self, pixels_BHWC: Tensor) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
        """Taps [B, N, C] and logits [B, classes] in float32."""
        started = time.perf_counter()
        try:
            parts = [self._forward_part(part) for part in pixels_BHWC.split(self.config.batch_size)]
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                f"{self.device} ran out of memory at --batch-size {self.config.batch_size}; use a smaller one"
            ) from error
        self.teacher_seconds += time.perf_counter() - started
        self.images += len(pixels_BHWC)
        taps = {name: np.concatenate([taps[name] for taps, _ in parts]) for name in self.store.manifest.taps}
        logits = [logits for _, logits in parts if logits is not None]
        return taps, np.concatenate(logits) if logits else None

    def _forward_part(self, pixels_BHWC: Tensor) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
        output = self.teacher(pixels_BHWC.to(self.device, non_blocking=True))
        taps = {name: output.taps[name].cpu().numpy() for name in self.store.manifest.taps}
        return taps, None if output.logits is None else output.logits.cpu().numpy()
