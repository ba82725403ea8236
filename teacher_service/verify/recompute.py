"""Verification of a store against its teacher.

All checksums are compared, then random rows are recomputed from the tars.

Checksums say that the bytes are those once written. Only the teacher can say that they were right: a row is computed
again from its stored view parameters, the pixels' CRC is compared, and the features may differ by no more than the
codec and the dtype of the forward pass explain.

Shape legend: b rows of a batch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial

import numpy as np
import torch

from feature_store.backends.open import open_objects
from feature_store.commits.root import read_manifest
from feature_store.errors import CorruptStoreError, ImageError, MismatchError, UserError
from feature_store.format.addressing import RowId
from feature_store.format.codecs.bound import LOGITS, BoundCodec
from feature_store.format.manifest import Manifest
from feature_store.inputs.unit_tars import UnitSources, UnitTars, open_units
from feature_store.store import Store, open_store_in
from feature_store.teacher.bundle import bundle_sha256, bundle_state
from feature_store.teacher.model import Teacher
from feature_store.teacher.own import require_named
from feature_store.tools.verify import Report
from feature_store.tools.verify import verify as verify_checksums
from feature_store.views import ViewParams, check_pixels, decode_image, replay_view
from teacher_service.cache.forward import Forward
from teacher_service.cache.stage_timer import StageTimer
from teacher_service.load import load, spec_of
from teacher_service.verify.config import VerifyConfig

COMPUTE_ERROR = {"float32": 2e-3, "float16": 1e-2, "bfloat16": 5e-2}
"""Relative L2 distance that two correct forward passes of a teacher may have in each dtype, on any device, with any
batch size or kernel; float32 includes a GPU's TF32."""

_TINY = 1e-30  # norm of a row of zeros
_SAME = "verify with the teacher the store was written with"


@dataclass(frozen=True)
class Mismatch:
    """A stored row that differs from the recomputed one.

    Attributes:
        unit: Unit of the row.
        position: Its sample's position.
        view: Its view.
        key: Sample key in the tar.
        what: ``key``, ``label``, ``image``, ``pixels``, ``stored`` (cannot be read), ``taps/<name>`` or ``logits``.
        reason: The difference, with its size.
    """

    unit: int
    position: int
    view: int
    key: str
    what: str
    reason: str


@dataclass(frozen=True)
class DeepReport:
    """Result of verifying a store.

    Attributes:
        checksums: Result of the checksums.
        rows: Rows recomputed; none if the checksums already show damage.
        worst: Largest distance met, as a share of what is allowed, per value.
        mismatches: Rows that differ by more.
    """

    checksums: Report
    rows: int = 0
    worst: dict[str, float] = field(default_factory=dict)
    mismatches: list[Mismatch] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether nothing was found."""
        return not self.checksums.findings and not self.mismatches


def verify(config: VerifyConfig, progress: Callable[[int, int], None] = lambda done, total: None) -> DeepReport:
    """Check all checksums of a store, then recompute some of its rows.

    Args:
        config: The store, and the tars to compare it with.
        progress: Called with units whose checksums were compared, and units in all.

    Raises:
        InputError: Not a store, or the teacher's weights or the tars cannot be used.
        MismatchError: The teacher, its later blocks or the tars are not the store's; names the field.
        CorruptStoreError: The manifest is damaged.
        ResourceError: Weights or tars that cannot be fetched, or a failed device.
    """
    objects = open_objects(config.store)
    manifest = read_manifest(objects)
    units = open_units(config.inputs.tars, config.inputs, manifest.inputs)
    if len(units) != len(manifest.tars):
        raise MismatchError(
            "tars", expected=len(manifest.tars), got=len(units), remedy="give all of the store's inputs"
        )
    teacher = _same_teacher(config, manifest)
    checksums = verify_checksums(config.store, workers=config.workers, progress=progress)
    if checksums.findings:
        return DeepReport(checksums)
    forward = Forward(teacher, tuple(manifest.taps), config.batch_size, StageTimer())
    deep = _DeepCheck(open_store_in(objects), forward, units)
    rows = sampled_rows(deep.store, config.sample, np.random.default_rng(config.seed))
    for start in range(0, len(rows), config.batch_size):
        deep.check(rows[start : start + config.batch_size])
    return DeepReport(checksums, len(rows), deep.worst, deep.mismatches)


def sampled_rows(store: Store, count: int, rng: np.random.Generator) -> list[RowId]:
    """A uniform random subset of committed rows, in order, so that neighbours share a tar."""
    shards = [(record, view) for record in store.committed.records for view in record.views]
    ends = np.cumsum([record.samples - len(record.quarantined) for record, _ in shards])
    if not len(ends) or not ends[-1]:
        return []
    chosen = np.sort(rng.choice(ends[-1], min(count, int(ends[-1])), replace=False))
    rows = []
    for row, shard in zip(chosen.tolist(), np.searchsorted(ends, chosen, side="right").tolist(), strict=True):
        record, view = shards[shard]
        rows.append(RowId(record.unit, int(record.readable[row - int(ends[shard])]), view))
    return rows


def _same_teacher(config: VerifyConfig, manifest: Manifest) -> Teacher:
    """The store's teacher, loaded again and compared.

    Raises:
        MismatchError: It is another one.
    """
    theirs = manifest.teacher
    if config.teacher not in (None, theirs.name):
        raise MismatchError("teacher.name", expected=theirs.name, got=config.teacher, remedy=_SAME)
    if config.teacher is None:
        require_named(theirs.name)
    teacher = load(spec_of(manifest), config.device, checkpoint=config.checkpoint)
    blocks = bundle_sha256(bundle_state(teacher.later_blocks))
    manifest.require_equal(replace(manifest, teacher=teacher.info, split=teacher.split, blocks_sha256=blocks), _SAME)
    return teacher


class _DeepCheck:
    """Recomputes rows and collects differences."""

    def __init__(self, store: Store, forward: Forward, tars: UnitTars | UnitSources) -> None:
        self.store, self.worst, self.mismatches = store, dict[str, float](), list[Mismatch]()
        self._forward, self._tars, self._source = forward, tars, store.source()
        self._codecs = store.layout.codecs
        self._compute_error = COMPUTE_ERROR[store.manifest.teacher.compute_dtype]
        self._stored_view = lru_cache(maxsize=2)(partial(_StoredView.read, store))

    def check(self, rows: Sequence[RowId]) -> None:
        """Compute b rows in one forward pass and compare them with what is stored."""
        pixels = {row: view for row in rows if (view := self._pixels(row)) is not None}
        if not pixels:
            return
        fresh = self._forward(torch.from_numpy(np.stack(list(pixels.values())))).arrays()
        for at, row in enumerate(pixels):
            self._compare(row, {name: fresh[name][at : at + 1] for name in self._codecs})

    def _pixels(self, row: RowId) -> np.ndarray | None:
        """The row's view, made again; None, and a mismatch, if it differs from the teacher's."""
        tar, stored = self._tars.find(self.store, row.unit), self._stored_view(row.unit, row.view)
        if tar.keys[row.position] != stored.keys[row.position]:
            return self._differs(row, "key", f"the store has {stored.keys[row.position]!r}")
        try:
            key, encoded, label = tar.read(row.position)
            image = decode_image(encoded)
        except ImageError as error:
            return self._differs(row, "image", f"it was readable when the store was written, now: {error}")
        if label != stored.labels[row.position]:
            return self._differs(row, "label", f"the store has {stored.labels[row.position]}, the tar {label}")
        params = stored.params[row.position]
        assert params is not None  # only quarantined rows have none
        manifest = self.store.manifest
        try:
            pixels = replay_view(image, params, manifest.policy.size, manifest.view_encoding)
            check_pixels(pixels, int(stored.pixel_crcs[row.position]), key, row.view, stored.pillow)
        except UserError as error:
            return self._differs(row, "pixels", str(error))
        return pixels

    def _compare(self, row: RowId, fresh: Mapping[str, np.ndarray]) -> None:
        """Compare one row's stored values with computed ones [1, ...] by name."""
        try:
            batch = self._source.read([row])
        except CorruptStoreError as error:
            self._differs(row, "stored", str(error))
            return
        stored = {**batch.taps, LOGITS: batch.logits}
        for name, codec in self._codecs.items():
            distance, allowed = row_distance(codec, np.asarray(stored[name]), fresh[name], self._compute_error)
            path = codec.array_path("")
            self.worst[path] = max(self.worst.get(path, 0.0), distance / allowed)
            if not distance <= allowed:  # NaN is a mismatch too
                self._differs(
                    row,
                    path,
                    f"relative distance {distance:.2g}, at most {allowed:.2g} is explained by codec and dtype",
                )

    def _differs(self, row: RowId, what: str, reason: str) -> None:
        """Note a mismatch."""
        key = self._stored_view(row.unit, row.view).keys[row.position]
        self.mismatches.append(Mismatch(row.unit, row.position, row.view, key, what, reason))


@dataclass(frozen=True)
class _StoredView:
    """One unit and view of a store: its samples, and the version of Pillow that made the pixels."""

    keys: list[str]
    labels: np.ndarray
    params: list[ViewParams | None]
    pixel_crcs: np.ndarray
    pillow: str | None

    @classmethod
    def read(cls, store: Store, unit: int, view: int) -> "_StoredView":
        pillow = store.committed.record(unit, view).software.get("pillow")
        crcs = store.pixel_crcs(unit, view)
        return cls(store.keys(unit), store.labels(unit), store.view_params(unit, view), crcs, pillow)


def row_distance(codec: BoundCodec, stored: np.ndarray, fresh: np.ndarray, compute_error: float) -> tuple[float, float]:
    """Relative L2 distance of a stored row to the teacher's, and the largest one that codec and dtype explain.

    What is computed goes through the codec too, so that both have lost the same (top<k> loses most classes); a value
    between two codes may then have been rounded either way, hence twice the codec's stated error.

    Args:
        codec: The value's codec.
        stored: Decoded values [1, ...].
        fresh: The teacher's values [1, ...].
        compute_error: Relative error of its forward pass, see COMPUTE_ERROR.
    """
    expected = codec.decode(codec.encode(fresh)).astype(np.float64)
    norm = max(float(np.linalg.norm(expected)), _TINY)
    errors = np.broadcast_to(codec.max_error(fresh), fresh.shape)
    rounding = float(np.linalg.norm(errors[np.isfinite(errors)]))
    return float(np.linalg.norm(stored - expected)) / norm, compute_error + 2 * rounding / norm
