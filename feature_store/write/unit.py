"""Writes one unit: its objects, then the commit record."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import numpy as np

from feature_store.backends.base import ObjectStore, buffers_of
from feature_store.backends.local import LocalObjects
from feature_store.commits.record import CommitRecord, ObjectChecksum, write_commit
from feature_store.errors import InputError, MismatchError, Remedy, ResourceError
from feature_store.format.addressing import encode_keys, key_hash
from feature_store.format.arrays import ArraySpec, ShardBuilder, encode_chunk
from feature_store.format.checksums import object_checksum
from feature_store.format.layout import StoreLayout
from feature_store.format.versions import software_versions
from feature_store.views import ViewParams

# Objects encoded and written at once, and the most memory they may take. Many, because syncs that wait together are
# committed together by the file system.
THREADS = 8
WRITE_BYTES = 2 << 30
STEP_BYTES = 2 << 20


@dataclass(frozen=True)
class EncodedUnit:
    """Everything one unit stores for V views of its n samples; contents of quarantined rows are ignored.

    Attributes:
        keys: The n sample keys in tar order.
        labels: int64 [n].
        quarantined: Reason per position that could not be used.
        params: Per view, per sample; None where quarantined.
        pixel_crc: uint32 [V, n], CRC-32 of each view's uint8 pixels.
        features: Per codec of ``StoreLayout.codecs`` its arrays [V, n, ...] by suffix, see ``BoundCodec.encode``.
    """

    keys: list[str]
    labels: np.ndarray
    quarantined: dict[int, str]
    params: list[list[ViewParams | None]]
    pixel_crc: np.ndarray
    features: Mapping[str, Mapping[str, np.ndarray]]


def write_unit(
    objects: ObjectStore,
    layout: StoreLayout,
    unit: int,
    first_view: int,
    data: EncodedUnit,
    committed: Mapping[str, ObjectChecksum] | None = None,
) -> CommitRecord:
    """Write V views of a unit, first_view onwards, and commit them.

    Args:
        objects: The store's.
        layout: Its layout.
        unit: The unit.
        first_view: First view.
        data: Encoded content of the unit.
        committed: Proofs of the unit's objects that belong to no view, if another record covers them already;
            they are compared, not written.

    Raises:
        InputError: The data does not have the layout's shapes.
        MismatchError: Keys or labels are not the committed ones.
        CommittedError: Another writer committed the same first.
    """
    manifest = layout.manifest
    _require_shapes(layout, unit, first_view, data)
    committed = committed or {}
    target = _Target(objects, manifest.tars[unit].name, unit, committed)
    proofs = {
        path: proof
        for some in _in_flight(layout, _tasks(layout, unit, first_view, data), target)
        for path, proof in some.items()
    }
    objects.sync([path for path in proofs if path not in committed])
    record = CommitRecord(
        store=manifest.identity(),
        unit=unit,
        first_view=first_view,
        last_view=first_view + len(data.params) - 1,
        tar=manifest.tars[unit].name,
        tar_sha256=manifest.tars[unit].header_sha256,
        samples=len(data.keys),
        quarantined=dict(sorted(data.quarantined.items())),
        objects=proofs,
        software=software_versions(),
    )
    write_commit(objects, record)
    return record


@dataclass(frozen=True)
class _Target:
    """Destination of one unit's objects."""

    objects: ObjectStore
    tar: str
    unit: int
    committed: Mapping[str, ObjectChecksum]

    def put_chunk(self, path: str, payload: np.ndarray) -> ObjectChecksum:
        """Write an unsharded object, or compare it with the committed one."""
        proof = ObjectChecksum(payload.nbytes, object_checksum(payload))
        if path in self.committed:
            self._require_equal(path, proof)
        else:
            self.put(path, [payload])
        return proof

    def put(self, path: str, parts: Iterable[np.ndarray]) -> None:
        """Write an object."""
        if isinstance(self.objects, LocalObjects):  # the unit is locked
            self.objects.put(path, parts)
        else:
            self._put_new(path, list(parts))

    def _put_new(self, path: str, parts: list[np.ndarray]) -> None:
        """Buckets have no locks: what another writer of the unit has put there stays, if it has the same bytes."""
        try:
            self.objects.put(path, parts, new=True)
        except FileExistsError as error:
            if self.objects.get(path).tobytes() != b"".join(buffers_of(parts)):
                raise ResourceError(
                    f"{path} exists with other bytes: another process is writing unit {self.unit} ({self.tar}), or an "
                    "interrupted one left it; wait for it, or repair the store and try again",
                    remedy=Remedy.REPAIR,
                ) from error

    def _require_equal(self, path: str, proof: ObjectChecksum) -> None:
        if self.committed[path] != proof:
            raise MismatchError(
                path,
                expected=self.committed[path],
                got=proof,
                where=f"what unit {self.unit} was committed with",
                remedy=f"{self.tar} changed since; restore it, or write a new store",
            )


_Task: TypeAlias = Callable[[_Target], dict[str, ObjectChecksum]]


def _in_flight(layout: StoreLayout, tasks: list[_Task], target: _Target) -> Iterator[dict[str, ObjectChecksum]]:
    """Run tasks several at a time, each of which writes an object or two; their checksums, in order.

    Local shards stream from the caller's arrays; a bucket upload holds two encoded copies.
    """
    largest = max(layout.object_bytes(spec, layout.capacity) for spec in layout.values.values())
    threads = max(1, min(THREADS, WRITE_BYTES // (2 * largest)))
    with ThreadPoolExecutor(threads, thread_name_prefix="feature-store-write") as pool:
        futures = [pool.submit(task, target) for task in tasks]
        try:
            yield from (future.result() for future in futures)
        finally:
            pool.shutdown(cancel_futures=True)


def _tasks(layout: StoreLayout, unit: int, first_view: int, data: EncodedUnit) -> list[_Task]:
    views = range(len(data.params))
    small = [
        partial(_write_chunk, spec, layout.capacity, spec.object_path(unit, first_view + index), data, index)
        for spec in layout.values.values()
        if not spec.sharded
        for index in (views if spec.per_view else views[:1])
    ]
    large = [
        partial(_write_shard, spec, layout.capacity, unit, first_view + index, data, data.features[name][suffix][index])
        for name, parts in layout.features.items()
        for suffix, spec in parts.items()
        for index in views
    ]
    return small + large  # syncs of small objects make the large ones wait, so they come first


def _write_chunk(
    spec: ArraySpec, capacity: int, path: str, data: EncodedUnit, index: int, target: _Target
) -> dict[str, ObjectChecksum]:
    values = _view_values(spec, data, index) if spec.per_view else _sample_values(spec, data)
    return {path: target.put_chunk(path, encode_chunk(spec, values, capacity))}


def _write_shard(
    spec: ArraySpec, capacity: int, unit: int, view: int, data: EncodedUnit, rows: np.ndarray, target: _Target
) -> dict[str, ObjectChecksum]:
    """One view's rows [n, ...] of an array as a shard, and their checksums beside it."""
    positions = np.setdiff1d(np.arange(len(data.keys)), list(data.quarantined))
    shard, path, table = ShardBuilder(spec, capacity), spec.object_path(unit, view), spec.checksums

    def parts() -> Iterator[np.ndarray]:
        step = max(1, STEP_BYTES // max(1, spec.row_bytes))
        for start in range(0, len(positions), step):
            some = positions[start : start + step]
            yield from shard.add(some, (rows[position] for position in some))  # row by row: a list of them is a copy
        yield shard.finish()

    target.put(path, parts())
    checksums = target.put_chunk(table.object_path(unit, view), encode_chunk(table, shard.checksums, capacity))
    return {path: ObjectChecksum(shard.nbytes, shard.checksum), table.object_path(unit, view): checksums}


def _sample_values(spec: ArraySpec, data: EncodedUnit) -> np.ndarray:
    if spec.path == "label":
        return data.labels
    if spec.path == "key":
        return encode_keys(data.keys, spec.row_shape[0])
    return np.array([key_hash(key) for key in data.keys], spec.dtype)


def _view_values(spec: ArraySpec, data: EncodedUnit, index: int) -> np.ndarray:
    if spec.path == "view/pixel_crc":
        return data.pixel_crc[index]
    name = {"view/magnitude": "magnitudes"}.get(spec.path, spec.path.removeprefix("view/"))
    values = np.full((len(data.keys), *spec.row_shape), spec.fill, spec.dtype)
    for position, params in enumerate(data.params[index]):
        if params is not None:
            values[position] = getattr(params, name)
    return values


def _require_shapes(layout: StoreLayout, unit: int, first_view: int, data: EncodedUnit) -> None:
    views, samples, manifest = len(data.params), len(data.keys), layout.manifest
    manifest.require_unit(unit)
    if views < 1 or first_view < 0 or first_view + views > manifest.num_views:
        raise InputError(f"views {first_view}..{first_view + views - 1} do not fit the store's {manifest.num_views}")
    if samples != manifest.tars[unit].samples:
        raise InputError(f"unit {unit} has {samples} samples, the manifest says {manifest.tars[unit].samples}")
    if data.features.keys() != layout.features.keys():
        got, expected = (", ".join(features) or "none" for features in (data.features, layout.features))
        raise InputError(f"unit {unit} has features {got}, the store holds {expected}; give exactly those")
    _require_array("labels", unit, data.labels, (samples,))
    _require_array("pixel_crc", unit, data.pixel_crc, (views, samples))
    for name, parts in layout.features.items():
        for suffix, spec in parts.items():
            array = data.features[name].get(suffix)
            _require_array(spec.path, unit, array, (views, samples, *spec.row_shape), spec.dtype)


def _require_array(
    name: str, unit: int, array: np.ndarray | None, shape: tuple[int, ...], dtype: np.dtype | None = None
) -> None:
    if array is None or array.shape != shape:
        got = None if array is None else array.shape
        raise InputError(f"{name} of unit {unit} has shape {got}, expected {shape}")
    if dtype is not None and array.dtype != dtype:
        raise InputError(f"{name} of unit {unit} is {array.dtype}, expected {dtype}; encode it with the store's codec")
