"""Predicted sizes of the store a job writes."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from feature_store.commits.record import CommitRecord, ObjectChecksum, encode_record
from feature_store.format.checksums import CRC_BYTES
from feature_store.format.layout import StoreLayout
from feature_store.inputs.tar import tar_notes
from teacher_service.config import JobConfig
from teacher_service.plan.disk import free_bytes
from teacher_service.plan.survey import Survey, survey
from teacher_service.plan.view_sizes import ViewTars, view_tars

ARRAY_BYTES, SHARDED_BYTES = 600, 1150  # zarr.json of an array, about
GROUPS = 5  # root, taps, view, teacher, teacher/blocks


@dataclass(frozen=True)
class Plan:
    """Predicted sizes of a job.

    Attributes:
        teacher: timm model name.
        store: Destination.
        units: Tars.
        samples: Source images in them.
        capacity: Rows reserved per unit: the largest tar's samples.
        views: Views per sample.
        rows: Samples times views: images through the teacher.
        taps: ``[tokens, channels, codec]`` per tap.
        bytes: Bytes per array or kind of object.
        total_bytes: Their sum.
        objects: Files in the finished store.
        committed_units: Units the destination already holds.
        remaining_bytes: Bytes still to be written.
        remaining_images: Images still to go through the teacher.
        free_bytes: Free disk at the destination; None for a bucket.
        fits: Whether the remaining bytes fit in the free ones.
        view_tars: Materialised views, which are not part of the store; None without them.
        notes: Notes on the tars: hidden files, samples without a label, and so on.
    """

    teacher: str
    store: str
    units: int
    samples: int
    capacity: int
    views: int
    rows: int
    taps: dict[str, tuple[int, int, str]]
    bytes: dict[str, int]
    total_bytes: int
    objects: int
    committed_units: int
    remaining_bytes: int
    remaining_images: int
    free_bytes: int | None
    fits: bool
    view_tars: ViewTars | None = None
    notes: tuple[str, ...] = ()

    def has_room(self, size: int) -> bool:
        """Whether a number of bytes fits at the destination."""
        return self.free_bytes is None or size <= self.free_bytes


def plan(config: JobConfig) -> Plan:
    """Predict a job's bytes and objects from tar headers and the teacher's shapes.

    Raises:
        UserError: The job could not start, see ``teacher_service.plan.survey.survey``.
    """
    return plan_of(survey(config), config)


def plan_of(survey: Survey, config: JobConfig) -> Plan:
    """The plan of a surveyed job."""
    layout, manifest, block_bytes = survey.layout, survey.manifest, survey.outline.block_bytes
    sizes = store_bytes(layout, block_bytes)
    remaining = remaining_bytes(layout, survey.missing) if survey.store else sizes.total()
    images = sum(manifest.tars[unit].samples * len(views) for unit, views in survey.missing.items())
    free, samples, units = free_bytes(survey.objects), sum(tar.samples for tar in manifest.tars), len(manifest.tars)
    unit_objects = len(layout.per_unit) + len(layout.per_view) * manifest.num_views + 1  # and a commit record
    views = None
    if config.views.out is not None:
        views = view_tars(config.views.out, manifest, survey.tars, images, survey.objects, remaining)
    return Plan(
        teacher=manifest.teacher.name,
        store=str(config.store),
        units=units,
        samples=samples,
        capacity=manifest.capacity,
        views=manifest.num_views,
        rows=samples * manifest.num_views,
        taps={name: (tap.tokens, tap.channels, tap.codec) for name, tap in manifest.taps.items()},
        bytes=dict(sizes),
        total_bytes=sizes.total(),
        objects=units * unit_objects + len(layout.arrays) + GROUPS + 2 * len(block_bytes),
        committed_units=units - len(survey.missing),
        remaining_bytes=remaining,
        remaining_images=images,
        free_bytes=free,
        fits=free is None or remaining <= free,
        view_tars=views,
        notes=tuple(tar_notes(survey.tars)),
    )


def store_bytes(layout: StoreLayout, block_bytes: Sequence[int]) -> Counter[str]:
    """Bytes of a finished store without quarantined samples, by array or kind of object.

    Args:
        layout: The store's.
        block_bytes: Bytes of each tensor of the later blocks.
    """
    sizes = sum(_unit_sizes(layout), Counter[str]())
    arrays = [*(spec.sharded for spec in layout.arrays.values()), *(False for _ in block_bytes)]
    sizes["teacher/blocks"] = sum(block_bytes) + CRC_BYTES * len(block_bytes)
    sizes["metadata"] += len(json.dumps(layout.manifest.to_dict(), separators=(",", ":")))
    sizes["metadata"] += sum(SHARDED_BYTES if sharded else ARRAY_BYTES for sharded in arrays)
    return sizes


def remaining_bytes(layout: StoreLayout, missing: Mapping[int, Sequence[int]]) -> int:
    """Bytes of missing views, given by unit."""
    sizes, views = _unit_sizes(layout), layout.manifest.num_views
    return round(sum(sizes[unit].total() * len(some) / views for unit, some in missing.items()))


def _unit_sizes(layout: StoreLayout) -> list[Counter[str]]:
    """Bytes of every unit's objects by kind; units of as many samples count as equal."""
    tars = layout.manifest.tars
    examples = {tar.samples: unit for unit, tar in enumerate(tars)}
    sizes = {samples: _unit_bytes(layout, unit) for samples, unit in examples.items()}
    return [sizes[tar.samples] for tar in tars]


def _unit_bytes(layout: StoreLayout, unit: int) -> Counter[str]:
    """Bytes of a unit's objects by kind, commit record included."""
    manifest, sizes = layout.manifest, Counter[str]()
    views = range(manifest.num_views)
    arrays = [*layout.per_unit, *layout.per_view * len(views)]  # in the order of object_paths
    each = [layout.object_bytes(spec, manifest.tars[unit].samples) for spec in arrays]
    for spec, size in zip(arrays, each, strict=True):
        sizes[spec.path if spec.sharded else "samples and views"] += size
    objects = zip(layout.object_paths(unit, views), each, strict=True)
    record = CommitRecord(
        store=manifest.identity(),
        unit=unit,
        first_view=0,
        last_view=len(views) - 1,
        tar=manifest.tars[unit].name,
        tar_sha256=manifest.tars[unit].header_sha256,
        samples=manifest.tars[unit].samples,
        quarantined={},
        objects={path: ObjectChecksum(size, 2**31) for path, size in objects},
        software=manifest.software,
    )
    sizes["metadata"] += len(encode_record(record))
    return sizes
