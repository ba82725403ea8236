"""Survey: what a job will write, found before any weights are loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from feature_store.backends.base import ObjectStore
from feature_store.backends.open import open_objects
from feature_store.commits.root import ROOT
from feature_store.errors import InputError, MismatchError
from feature_store.format.codecs.base import ZSTD_SUFFIX
from feature_store.format.layout import StoreLayout
from feature_store.format.manifest import Growth, InputInfo, Manifest, SplitInfo, TapInfo, TarInfo, TeacherInfo
from feature_store.format.versions import software_versions
from feature_store.inputs.base import SampleSource
from feature_store.inputs.open import OpenedSources, open_sources
from feature_store.store import Store, open_store_in
from feature_store.teacher.bundle import bundle_sha256, bundle_tensors
from feature_store.teacher.model import Teacher, create_model, teacher_info, whole_teacher
from feature_store.teacher.own import is_own
from feature_store.teacher.taps import NeedsValuesError, TapShapes
from feature_store.tools.options import require
from feature_store.views import view_policy
from feature_store.views.files import JPEG
from teacher_service.config import Inputs, JobConfig, StorageSpec, TeacherSpec


@dataclass(frozen=True)
class TeacherOutline:
    """A teacher's shapes without its weights.

    Attributes:
        info: The teacher, without its weights' hash.
        split: Where it is cut.
        taps: Shapes of its taps.
        block_bytes: Bytes of each tensor of its later blocks.
    """

    info: TeacherInfo
    split: SplitInfo
    taps: TapShapes
    block_bytes: tuple[int, ...]


@dataclass(frozen=True)
class Survey:
    """A job's inputs and destination, opened once.

    Attributes:
        objects: Where the store is or will be.
        store: The store as it was found; None if there is none.
        tars: The job's sources, one per unit.
        outline: Shapes of the teacher.
        layout: Layout of the finished store; its manifest has no weights' hashes and no codec statistics yet.
        missing: Views to compute, by unit.
    """

    objects: ObjectStore
    store: Store | None
    tars: tuple[SampleSource, ...]
    outline: TeacherOutline
    layout: StoreLayout
    missing: dict[int, list[int]]

    @property
    def manifest(self) -> Manifest:
        """The layout's manifest."""
        return self.layout.manifest

    def manifest_of(self, teacher: Teacher, blocks: Mapping[str, Tensor]) -> Manifest:
        """The manifest with a loaded teacher's hashes; codec statistics are still missing."""
        return replace(self.manifest, teacher=teacher.info, split=teacher.split, blocks_sha256=bundle_sha256(blocks))


def survey(config: JobConfig) -> Survey:
    """Open a job's tars and store, and build its teacher without weights.

    Raises:
        UserError: The job could not start: unknown teacher, unusable tars, impossible settings, or a store created
            with other ones.
    """
    outline, opened = outline_teacher(config.teacher), open_inputs(config.inputs)
    manifest, objects = job_manifest(config, opened.sources, outline, opened.info), open_objects(config.store)
    store = find_store(objects)
    if store is None:
        missing = {unit: list(range(manifest.num_views)) for unit in range(len(manifest.tars))}
    else:
        missing = _missing_views(store, manifest)
    return Survey(objects, store, tuple(opened.sources), outline, StoreLayout(manifest), missing)


def find_store(objects: ObjectStore) -> Store | None:
    """The store that is there, opened; None if there is none: the root is written last.

    Raises:
        UserError: See open_store.
        ResourceError: Network or service failure.
    """
    try:
        objects.size(ROOT)
    except FileNotFoundError:
        return None
    return open_store_in(objects)


def _missing_views(store: Store, manifest: Manifest) -> dict[int, list[int]]:
    """Views of the manifest that a store has not committed, those it has to grow by included.

    Raises:
        MismatchError: It was created with other settings.
    """
    theirs = store.manifest
    weights = {name: getattr(theirs.teacher, name) for name in ("weights_sha256", "compute_dtype")}
    growth_of(
        store,
        replace(manifest, blocks_sha256=theirs.blocks_sha256, teacher=replace(manifest.teacher, **weights)),
    )
    views = set(range(manifest.num_views))
    missing = {unit: sorted(views - store.committed_views(unit)) for unit in range(len(manifest.tars))}
    return {unit: some for unit, some in missing.items() if some}


def growth_of(store: Store, manifest: Manifest) -> Growth:
    """Views and tars of a job that a store lacks; its codecs' statistics stay its own.

    Raises:
        MismatchError: It was created with other settings; names the first field that differs.
    """
    expected, got = store.manifest.view_encoding, manifest.view_encoding
    if expected != got:
        remedy = "give the --views-out it was created with" if expected else "leave out --views-out"
        raise MismatchError("view_encoding", expected=expected, got=got, remedy=f"{remedy}, or use another store")
    return manifest.with_statistics_of(store.manifest).growth_from(store.manifest)


def outline_teacher(spec: TeacherSpec) -> TeacherOutline:
    """Build the teacher on torch's meta device: shapes only, in seconds for any size.

    A teacher of a user's own is built as its function builds it, weights included. The few of timm's that cannot run
    on the meta device are built on the CPU, with random weights.

    Raises:
        InputError: Unknown model, impossible arguments, no intermediate maps, or options of later blocks for a teacher
            that has none.
    """
    try:
        return _outline(spec, "cpu" if is_own(spec.name) else "meta")
    except NeedsValuesError:
        return _outline(spec, "cpu")


def _outline(spec: TeacherSpec, device: str) -> TeacherOutline:
    with torch.device(device):
        model = create_model(spec.name, spec.model_kwargs).eval()
    info = teacher_info(model, spec.name, spec.model_kwargs, "float32", sha256="")
    whole = whole_teacher(model, info, spec.depth, drop_prefix=spec.drop_prefix)
    tensors = bundle_tensors(whole.later_blocks).values()
    return TeacherOutline(info, whole.split, whole.shapes, tuple(tensor.nbytes for tensor in tensors))


def open_inputs(inputs: Inputs) -> OpenedSources:
    """Open all sources of a job; contents are not decoded.

    Raises:
        InputError: No inputs, one that cannot be read to its end, or a sample key in two places.
    """
    opened = open_sources(inputs.tars, inputs)
    seen: dict[str, str] = {}
    for tar in opened.sources:
        for key in tar.keys:
            if key in seen:
                raise InputError(
                    f"sample key {key!r} is in {seen[key]} and again in {tar.url}; keys must be unique across "
                    "all tars of a store: views are drawn by key; remove the duplicate or rename it"
                )
            seen[key] = tar.url
    return opened


def job_manifest(
    config: JobConfig, tars: Sequence[SampleSource], outline: TeacherOutline, inputs: InputInfo | None = None
) -> Manifest:
    """The manifest of the store this job writes, without weights' hashes and codec statistics.

    Raises:
        InputError: Impossible view policy options, or less room for rows or keys than the tars take.
    """
    info, split, views, storage = outline.info, outline.split, config.views, config.storage
    longest = max(len(key.encode()) for tar in tars for key in tar.keys)
    if storage.key_width is not None:
        require(storage.key_width >= longest, "--key-width", storage.key_width, f"at least the longest key's {longest}")
    manifest = Manifest(
        teacher=info,
        split=split,
        blocks_sha256="",
        taps=tap_infos(outline, storage),
        logits_codec=storage.logits_codec if info.num_classes else None,
        policy=view_policy(views.policy, info.input_size, **views.policy_options),
        seed=views.seed,
        num_views=views.count,
        tars=tuple(TarInfo(tar.name, len(tar), tar.header_sha256) for tar in tars),
        capacity=storage.capacity or max(len(tar) for tar in tars),
        key_width=storage.key_width or longest,
        software=software_versions(),
        licence=storage.licence_note,
        view_encoding=None if views.out is None else JPEG,
        inputs=inputs,
    )
    manifest.require_room()
    return manifest


def tap_infos(outline: TeacherOutline, storage: StorageSpec) -> dict[str, TapInfo]:
    """Taps of a store: those asked for, and prefix tokens where the later blocks need them.

    Raises:
        InputError: The teacher has no such tap.
    """
    codecs = dict.fromkeys(storage.taps, storage.tap_codec)
    if outline.split.prefix == "cached":
        codecs["stage3_prefix"] = prefix_codec(storage.tap_codec)
    return {name: TapInfo(*outline.taps.of(name), codec) for name, codec in codecs.items()}


def prefix_codec(tap_codec: str) -> str:
    """Codec of the prefix tokens: a few tokens a row, nothing is gained by rounding them further than float16."""
    return "f32" if tap_codec.removesuffix(ZSTD_SUFFIX) == "f32" else "f16"
