"""Forecast: costs by codec, by number of views, break-even."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from feature_store.backends.local import LocalObjects
from feature_store.errors import InputError
from feature_store.format.codecs.registry import CODECS
from feature_store.format.layout import StoreLayout
from feature_store.format.manifest import Manifest
from teacher_service.config import JobConfig
from teacher_service.plan.disk import folder_beside
from teacher_service.plan.sizes import Plan, plan_of, store_bytes
from teacher_service.plan.survey import Survey, prefix_codec
from teacher_service.plan.timing import Timing, measure
from teacher_service.plan.write_rate import measure_write_rate

VIEW_COUNTS = (1, 2, 4, 8, 16, 50)
EPOCHS = (100, 300)  # the schedules of the released settings


@dataclass(frozen=True)
class ViewCost:
    """Costs of a number of views; times are None where none were measured.

    Attributes:
        views: Views per sample.
        total_bytes: Of the finished store.
        fits: Whether that fits on the disk.
        device_hours: Of the pass that writes it.
        break_even_epochs: See Timing.
        break_even_students: By epochs of each student's schedule, see Timing.
    """

    views: int
    total_bytes: int
    fits: bool
    device_hours: float | None
    break_even_epochs: float | None
    break_even_students: dict[int, float] | None


@dataclass(frozen=True)
class Forecast:
    """A plan and its alternatives.

    Attributes:
        plan: Of the job as it was asked for.
        codec_bytes: Bytes of the store by tap codec, the most exact first.
        view_counts: Costs by number of views.
        processes: Processes that share the job, each with a device and cores like the ones that were timed.
        seconds: Of the rest of the job; None where nothing was measured.
        device_hours: The same in hours of all their devices.
        write_rate: Bytes per second they then write together: nothing says that their disk can.
        online_device_hours_per_epoch: The teacher's in each epoch of a student that has it in its training loop.
        timing: The measurement.
    """

    plan: Plan
    codec_bytes: dict[str, int]
    view_counts: tuple[ViewCost, ...]
    processes: int
    seconds: float | None
    device_hours: float | None
    write_rate: float | None
    online_device_hours_per_epoch: float | None
    timing: Timing | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON, the plan's own numbers on top."""
        found = asdict(self)
        return found.pop("plan") | found


def forecast(survey: Survey, config: JobConfig, processes: int = 1) -> Forecast:
    """Predict a job's bytes and, with ``time_samples``, its time.

    Args:
        survey: The job's inputs and destination.
        config: Options of the computation.
        processes: Processes that will share its units.

    Raises:
        UserError: Timing failed as the job would.
    """
    plan = plan_of(survey, config)
    timing = _timed(survey, config, plan) if config.compute.time_samples else None
    manifest = survey.manifest
    units = max(1, plan.units - plan.committed_units)
    images = plan.remaining_images * math.ceil(units / processes) / units  # of the process with the most units
    seconds = None if timing is None else timing.seconds(images, plan.views, new=survey.store is None)
    return Forecast(
        plan=plan,
        codec_bytes={codec: _total(_with_codec(manifest, codec), survey) for codec in CODECS},
        view_counts=tuple(_view_costs(survey, plan, timing)),
        processes=processes,
        seconds=seconds,
        device_hours=None if seconds is None else processes * seconds / 3600,
        write_rate=None if seconds is None else plan.remaining_bytes / seconds,
        online_device_hours_per_epoch=None if timing is None else plan.samples * timing.busy["forward"] / 3600,
        timing=timing,
    )


def _timed(survey: Survey, config: JobConfig, plan: Plan) -> Timing:
    """The pipeline's timing, with the disk's steady write rate if that is asked for.

    Raises:
        InputError: The store is in a bucket.
    """
    seconds = config.compute.write_seconds
    if seconds and not isinstance(survey.objects, LocalObjects):
        raise InputError(f"--write-seconds is {seconds:g}, expected 0 for a bucket; it measures disks")
    timing = measure(survey, config.teacher, config.compute)
    if not seconds or not plan.remaining_images:
        return timing
    disk = measure_write_rate(folder_beside(survey.objects), seconds, plan.remaining_bytes)
    return timing.with_disk(disk, plan.remaining_bytes / plan.remaining_images)


def _total(manifest: Manifest, survey: Survey) -> int:
    """Bytes of a whole store; linear in views, so one and two views suffice."""
    layouts = (StoreLayout(replace(manifest, num_views=views)) for views in (1, 2))
    one, two = (store_bytes(layout, survey.outline.block_bytes).total() for layout in layouts)
    return one + (manifest.num_views - 1) * (two - one)


def _with_codec(manifest: Manifest, codec: str) -> Manifest:
    codecs = dict.fromkeys(manifest.taps, codec) | {"stage3_prefix": prefix_codec(codec)}
    return replace(manifest, taps={name: replace(tap, codec=codecs[name]) for name, tap in manifest.taps.items()})


def _view_costs(survey: Survey, plan: Plan, timing: Timing | None) -> Sequence[ViewCost]:
    costs = []
    for views in sorted({*VIEW_COUNTS, plan.views}):
        total = _total(replace(survey.manifest, num_views=views), survey)
        measured = {"device_hours": None, "break_even_epochs": None, "break_even_students": None}
        if timing is not None:
            measured = {
                "device_hours": timing.seconds(plan.samples * views, views) / 3600,
                "break_even_epochs": timing.break_even_epochs(views),
                "break_even_students": {epochs: timing.break_even_students(views, epochs) for epochs in EPOCHS},
            }
        costs.append(ViewCost(views, total, plan.has_room(total), **measured))  # pyright: ignore[reportArgumentType]
    return costs
