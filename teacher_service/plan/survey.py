"""Says what a job will write, before anything runs: no weights are loaded and no forward pass is made."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from feature_store.backends.open import open_objects
from feature_store.commits.record import CommitRecord, ObjectChecksum, encode_record
from feature_store.commits.root import ROOT
from feature_store.errors import InputError, MismatchError
from feature_store.format.checksums import CRC_BYTES
from feature_store.format.codecs.base import ZSTD_SUFFIX
from feature_store.format.layout import StoreLayout
from feature_store.format.manifest import Growth, Manifest, SplitInfo, TapInfo, TarInfo, TeacherInfo
from feature_store.format.versions import software_versions
from feature_store.inputs import tar as input_tars
from feature_store.inputs.tar import Tar, tar_notes
from feature_store.store import Store, open_store
from feature_store.teacher.model import build_model, tap_shapes, teacher_info
from feature_store.teacher.split import split_teacher
from feature_store.tools.options import require
from feature_store.views import view_policy
from feature_store.views.files import JPEG
from teacher_service.config import PlanConfig
from teacher_service.plan.disk import free_bytes
from teacher_service.plan.view_sizes import ViewTars, view_tars

ARRAY_BYTES, SHARDED_BYTES = 600, 1150  # zarr.json of an array, about
GROUPS = 5  # root, taps, view, teacher, teacher/blocks


@dataclass(frozen=True)
class Plan:
    """What a job writes.

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
        notes: What the user should know of the tars: hidden files, samples without a label, and so on.
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
        """Whether so many bytes fit at the destination."""
        return self.free_bytes is None or size <= self.free_bytes


@dataclass(frozen=True)
class TeacherOutline:
    """A teacher's shapes without its weights; ``block_bytes`` are the sizes of the later blocks' tensors."""

    info: TeacherInfo
    split: SplitInfo
    block_bytes: tuple[int, ...]


def plan(config: PlanConfig) -> Plan:
    """Predict a job's bytes and objects from tar headers and the teacher's shapes.

    Raises:
        UserError: The job could not start: unknown teacher, unusable tars, impossible settings, or a store begun
            with other ones.
    """
    return survey(config)[0]


def survey(config: PlanConfig) -> tuple[Plan, tuple[Tar, ...]]:
    """A job's plan and its opened tars: all that can be found out without the teacher's weights.

    Raises:
        UserError: See plan.
    """
    outline, tars = outline_teacher(config), open_tars(config)
    return plan_of(config, outline, tars), tars


def plan_of(config: PlanConfig, outline: TeacherOutline, tars: Sequence[Tar]) -> Plan:
    """The plan of a job whose teacher and tars are known.

    Raises:
        UserError: See plan.
    """
    manifest = job_manifest(config, tars, outline.info, outline.split)
    plan = predict(manifest, outline.block_bytes, config.store, _missing_views(manifest, config.store))
    plan = replace(plan, notes=tuple(tar_notes(tars)))
    if config.views_out is None:
        return plan
    sizes = view_tars(config.views_out, manifest, tars, plan.remaining_images, config.store, plan.remaining_bytes)
    return replace(plan, view_tars=sizes)


def outline_teacher(config: PlanConfig) -> TeacherOutline:
    """Build the teacher on torch's meta device: shapes only, in a moment, whatever its size.

    Raises:
        InputError: Unknown model, impossible arguments, or a family that cannot be split.
    """
    with torch.device("meta"):
        model = build_model(config.teacher, config.model_kwargs)
    _, later_blocks = split_teacher(model, config.depth, drop_prefix=config.drop_prefix)
    info = teacher_info(model, config.teacher, config.model_kwargs, "float32", sha256="")
    tensors = (*later_blocks.parameters(), *later_blocks.buffers())
    return TeacherOutline(info, later_blocks.info, tuple(tensor.nbytes for tensor in tensors))


def open_tars(config: PlanConfig) -> tuple[Tar, ...]:
    """Index all tars of a job; contents are not decoded.

    Raises:
        InputError: No tars, a tar that cannot be read to its end, or a sample key in two places.
    """
    tars = tuple(input_tars.open_tars(config.tars, config))
    seen: dict[str, str] = {}
    for tar in tars:
        for key in tar.keys:
            if key in seen:
                raise InputError(
                    f"sample key {key!r} is in {seen[key]} and again in {tar.url}; keys must be unique across "
                    "all tars of a store: views are drawn by key; remove the duplicate or rename it"
                )
            seen[key] = tar.url
    return tars


def job_manifest(
    config: PlanConfig, tars: Sequence[Tar], info: TeacherInfo, split: SplitInfo, blocks_sha256: str = ""
) -> Manifest:
    """The manifest of the store this job writes.

    Raises:
        InputError: Impossible view policy options, or less room for rows or keys than the tars take.
    """
    shapes = tap_shapes(split)
    longest = max(len(key.encode()) for tar in tars for key in tar.keys)
    if config.key_width is not None:
        require(config.key_width >= longest, "--key-width", config.key_width, f"at least the longest key's {longest}")
    taps: dict[str, str] = dict.fromkeys(config.taps, config.tap_codec)
    if split.prefix == "cached":
        taps["stage3_prefix"] = prefix_codec(config.tap_codec)
    manifest = Manifest(
        teacher=info,
        split=split,
        blocks_sha256=blocks_sha256,
        taps={name: TapInfo(*shapes[name], codec) for name, codec in taps.items()},
        logits_codec=config.logits_codec if info.num_classes else None,
        policy=view_policy(config.policy, info.input_size, **config.policy_options),
        seed=config.seed,
        num_views=config.views,
        tars=tuple(TarInfo(tar.name, len(tar), tar.header_sha256) for tar in tars),
        capacity=config.capacity or max(len(tar) for tar in tars),
        key_width=config.key_width or longest,
        software=software_versions(),
        licence=config.licence_note,
        view_encoding=None if config.views_out is None else JPEG,
    )
    manifest.require_room()
    return manifest


def prefix_codec(tap_codec: str) -> str:
    """Codec of the prefix tokens: a few tokens a row, nothing is gained by rounding them further than float16."""
    return "f32" if tap_codec.removesuffix(ZSTD_SUFFIX) == "f32" else "f16"


Missing = dict[int, list[int]]
"""Views that are not committed, by unit."""


def growth_of(store: Store, manifest: Manifest) -> Growth:
    """What a store lacks of a job's views and tars; its codecs' statistics stay its own.

    Raises:
        MismatchError: It was begun with other settings; names the first field that differs.
    """
    expected, got = store.manifest.view_encoding, manifest.view_encoding
    if expected != got:
        remedy = "give the --views-out it was begun with" if expected else "leave out --views-out"
        raise MismatchError("view_encoding", expected=expected, got=got, remedy=f"{remedy}, or use another store")
    return manifest.with_statistics_of(store.manifest).growth_from(store.manifest)


def store_exists(url: str | Path) -> bool:
    """Whether there is a store: its root is written last.

    Raises:
        ResourceError: The network or service gave up.
    """
    try:
        open_objects(url).size(ROOT)
    except FileNotFoundError:
        return False
    return True


def _missing_views(manifest: Manifest, url: str | Path) -> Missing | None:
    """Views a store still lacks, those it has to grow by included; None if there is no store."""
    if not store_exists(url):
        return None
    store = open_store(url)
    theirs = store.manifest
    weights = {name: getattr(theirs.teacher, name) for name in ("weights_sha256", "compute_dtype")}
    known = replace(manifest, blocks_sha256=theirs.blocks_sha256, teacher=replace(manifest.teacher, **weights))
    growth_of(store, known)
    return missing_views(store, len(manifest.tars), manifest.num_views)


def missing_views(store: Store, units: int, views: int) -> Missing:
    """Views a store lacks of so many units and views, by unit."""
    lacking = {unit: sorted(set(range(views)) - store.committed_views(unit)) for unit in range(units)}
    return {unit: missing for unit, missing in lacking.items() if missing}


def predict(manifest: Manifest, block_bytes: Sequence[int], store: str | Path, missing: Missing | None) -> Plan:
    """Sizes of the store a manifest describes, and whether what is still missing fits on its disk.

    Args:
        manifest: What will be written.
        block_bytes: Bytes of each later-block tensor.
        store: Destination.
        missing: Views it still lacks, by unit; None if it does not exist.
    """
    kinds = sum((_unit_bytes(manifest, unit) for unit in range(len(manifest.tars))), Counter[str]())
    arrays = [*(spec.sharded for spec in StoreLayout(manifest).arrays.values()), *(False for _ in block_bytes)]
    metadata = _json_bytes(manifest.to_dict()) + sum(SHARDED_BYTES if shard else ARRAY_BYTES for shard in arrays)
    fixed = Counter({"teacher/blocks": sum(block_bytes) + CRC_BYTES * len(block_bytes), "metadata": metadata})
    everything = {unit: list(range(manifest.num_views)) for unit in range(len(manifest.tars))}
    lacking = everything if missing is None else missing
    remaining = remaining_bytes(manifest, lacking) + (fixed.total() if missing is None else 0)
    samples, free = sum(tar.samples for tar in manifest.tars), free_bytes(store)
    return Plan(
        teacher=manifest.teacher.name,
        store=str(store),
        units=len(manifest.tars),
        samples=samples,
        capacity=manifest.capacity,
        views=manifest.num_views,
        rows=samples * manifest.num_views,
        taps={name: (tap.tokens, tap.channels, tap.codec) for name, tap in manifest.taps.items()},
        bytes=dict(kinds + fixed),
        total_bytes=(kinds + fixed).total(),
        objects=len(manifest.tars) * (len(_unit_objects(manifest, 0)) + 1) + len(arrays) + GROUPS + len(block_bytes),
        committed_units=len(manifest.tars) - len(lacking),
        remaining_bytes=remaining,
        remaining_images=sum(manifest.tars[unit].samples * len(views) for unit, views in lacking.items()),
        free_bytes=free,
        fits=free is None or remaining <= free,
    )


def remaining_bytes(manifest: Manifest, missing: Missing) -> int:
    """Bytes of all views that are missing."""
    shares = {unit: len(views) / manifest.num_views for unit, views in missing.items()}
    return round(sum(_unit_bytes(manifest, unit).total() * share for unit, share in shares.items()))


def _unit_bytes(manifest: Manifest, unit: int) -> Counter[str]:
    """Bytes of a unit's objects by kind, commit record included."""
    objects = _unit_objects(manifest, unit)
    sizes = Counter[str]()
    for kind, _, size in objects:
        sizes[kind] += size
    sizes["metadata"] += _commit_bytes(manifest, unit, {path: size for _, path, size in objects})
    return sizes


def _unit_objects(manifest: Manifest, unit: int) -> list[tuple[str, str, int]]:
    """Kind, path and bytes of each object of a unit without quarantined samples."""
    samples, layout = manifest.tars[unit].samples, StoreLayout(manifest)
    return [
        (spec.path if spec.sharded else "samples and views", spec.object_path(unit, view), size)
        for spec in layout.arrays.values()
        for size in [layout.object_bytes(spec, samples)]
        for view in (range(manifest.num_views) if spec.per_view else [None])
    ]


def _commit_bytes(manifest: Manifest, unit: int, sizes: dict[str, int]) -> int:
    tar = manifest.tars[unit]
    record = CommitRecord(
        store=manifest.identity(),
        unit=unit,
        first_view=0,
        last_view=manifest.num_views - 1,
        tar=tar.name,
        tar_sha256=tar.header_sha256,
        samples=tar.samples,
        quarantined={},
        objects={path: ObjectChecksum(size, 2**31) for path, size in sizes.items()},
        software=manifest.software,
    )
    return len(encode_record(record))


def _json_bytes(value: object) -> int:
    return len(json.dumps(value, separators=(",", ":")))
