"""Preparation of a cache job: room, teacher, store."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice

import numpy as np
import torch
from rich.filesize import decimal
from torch import Tensor

from feature_store.backends.local import LocalObjects
from feature_store.errors import ResourceError
from feature_store.format.codecs.bound import calibrated, needs_calibration
from feature_store.format.manifest import Manifest
from feature_store.inputs.base import SampleSource
from feature_store.store import Store, open_store_in
from feature_store.teacher.bundle import bundle_state
from feature_store.teacher.model import Teacher
from teacher_service.cache.decode import Task, ViewDataset
from teacher_service.cache.forward import Forward
from teacher_service.cache.stage_timer import StageTimer
from teacher_service.cache.write import disk_error
from teacher_service.cache.write_views import ViewTarWriter
from teacher_service.config import CacheConfig, ComputeSpec
from teacher_service.load import load
from teacher_service.plan.sizes import Plan, plan_of
from teacher_service.plan.survey import Survey, find_store, growth_of
from teacher_service.share.store_lock import preparing

CALIBRATION_SAMPLES = 256  # images of the calibration batch


@dataclass(frozen=True)
class Job:
    """A job that is ready to compute.

    Attributes:
        compute: Options of the computation.
        store: The store it writes to.
        teacher: The frozen model, on its device.
        tars: The store's tars, in its order.
        views_out: Where views are materialised; None for nowhere.
        strict: Stop at the first unreadable sample instead of quarantining it.
    """

    compute: ComputeSpec
    store: Store
    teacher: Teacher
    tars: tuple[SampleSource, ...]
    views_out: str | None = None
    strict: bool = False


def prepare(survey: Survey, config: CacheConfig) -> Job:
    """Make or grow the store of a surveyed job, once there is room for it.

    One process of a machine at a time: of several that run the same job, the first makes the store and learns its
    codecs' statistics, the others find it.

    Args:
        survey: The job's inputs and destination.
        config: Options of the computation.

    Raises:
        UserError: See ``teacher_service.cache.job.cache``.
    """
    plan, tars = plan_of(survey, config), survey.tars
    _require_room(plan)
    teacher = load(config.teacher, config.compute.device, checkpoint=config.checkpoint)
    blocks = bundle_state(teacher.later_blocks)
    manifest = survey.manifest_of(teacher, blocks)
    with preparing(config.store):
        store = find_store(survey.objects)  # once more: another process may have made it meanwhile
        if store is None:
            if needs_calibration(manifest):
                manifest = calibrated(manifest, first_features(config.compute.batch_size, manifest, teacher, tars))
            store = _create(survey, manifest, blocks, plan.remaining_bytes)
        if growth := growth_of(store, manifest):
            store = store.grow(growth.manifest)
        if config.retry_quarantined:
            store = _without_usable_quarantine(store, tars)
        if isinstance(store.objects, LocalObjects):  # in a bucket, orphans and objects of live writers look alike
            store.remove_orphans()
        if config.views.out is not None:
            views_out = ViewTarWriter(config.views.out, store)
            views_out.require_committed()
            views_out.remove_orphans()
    return Job(config.compute, store, teacher, tars, config.views.out, config.strict)


def _require_room(plan: Plan) -> None:
    if not plan.fits:
        free = plan.free_bytes or 0
        raise ResourceError(
            f"{plan.store} needs {decimal(plan.remaining_bytes)} more, {decimal(free)} are free, "
            f"{decimal(plan.remaining_bytes - free)} are missing; make room, or store fewer --views or --taps"
        )
    if (views := plan.view_tars) is not None and not views.fits:
        free = views.free_bytes or 0
        raise ResourceError(
            f"{decimal(views.needed_bytes)} more are needed where the views go, {views.url}, and {decimal(free)} are "
            f"free, about {decimal(views.needed_bytes - free)} are missing; make room, or take fewer --views"
        )


def join(survey: Survey, config: CacheConfig) -> Job:
    """A surveyed job that was prepared already, on this machine or another one.

    Raises:
        MismatchError: This machine's teacher is not the store's.
        UserError: See ``teacher_service.cache.job.cache``.
    """
    store = survey.store or open_store_in(survey.objects)
    teacher = load(config.teacher, config.compute.device, checkpoint=config.checkpoint)
    growth_of(store, survey.manifest_of(teacher, bundle_state(teacher.later_blocks)))  # raises on another teacher
    return Job(config.compute, store, teacher, survey.tars, config.views.out, config.strict)


def _create(survey: Survey, manifest: Manifest, blocks: Mapping[str, Tensor], needed: int) -> Store:
    try:
        return Store.create(survey.objects.url, manifest, blocks)
    except OSError as error:
        raise disk_error(error, survey.objects, "the new store", needed) from error


def _without_usable_quarantine(store: Store, tars: Sequence[SampleSource]) -> Store:
    """The store without units that quarantine a sample which is now readable; they will be written again.

    Repaired tars have the same member names and sizes: a job with others is refused before.
    """
    dataset = ViewDataset(tars, store.manifest.policy, store.manifest.seed)
    quarantined = {(record.unit, position) for record in store.committed.records for position in record.quarantined}
    usable = {
        unit for unit, position in sorted(quarantined) if not dataset.sample(Task(unit, range(1)), position).reason
    }
    for unit in sorted(usable):
        store.withdraw_unit(unit)
    return open_store_in(store.objects) if usable else store


def remaining_tasks(store: Store) -> list[Task]:
    """Tasks a store lacks, unit by unit; consecutive missing views of a unit are one task."""
    return [task for unit, views in store.committed.missing_views().items() for task in consecutive_tasks(unit, views)]


def consecutive_tasks(unit: int, views: Sequence[int]) -> list[Task]:
    """Tasks of ascending views, cut where one is left out."""
    numbered = groupby(enumerate(views), key=lambda pair: pair[1] - pair[0])
    runs = [[view for _, view in run] for _, run in numbered]
    return [Task(unit, range(run[0], run[-1] + 1)) for run in runs]


def first_features(
    batch_size: int, manifest: Manifest, teacher: Teacher, tars: Sequence[SampleSource]
) -> dict[str, np.ndarray]:
    """The calibration batch of codecs, [n, N, C] per tap: view 0 of the first readable samples.

    Raises:
        ResourceError: The device has too little memory for a single image.
    """
    dataset = ViewDataset(tars, manifest.policy, manifest.seed, manifest.view_encoding)
    readable = (
        view.views[0]
        for unit, tar in enumerate(tars)
        for position in range(len(tar))
        if not (view := dataset.sample(Task(unit, range(1)), position)).reason
    )
    pixels = list(islice(readable, CALIBRATION_SAMPLES))
    forward = Forward(teacher, tuple(manifest.taps), batch_size, StageTimer())
    features = forward(torch.from_numpy(np.stack(pixels))).arrays()
    return {name: features[name] for name in manifest.taps}
