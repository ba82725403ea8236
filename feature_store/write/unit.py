"""Writes one unit: its objects whole and durable, then the commit record that makes them count."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import numpy as np

from feature_store.backends.local import LocalObjects, ObjectStore, buffers_of
from feature_store.commits.record import CommitRecord, ObjectChecksum, write_commit
from feature_store.errors import InputError, MismatchError, ResourceError
from feature_store.format.addressing import encode_keys, key_hash
from feature_store.format.codecs.registry import BoundCodec, bound_codecs
from feature_store.format.layout import (
    ArraySpec,
    ShardBuilder,
    coded_specs,
    encode_chunk,
    object_bytes,
    object_checksum,
    value_specs,
)
from feature_store.format.manifest import Manifest
from feature_store.format.versions import software_versions
from feature_store.views import ViewParams

# Objects encoded and written at once, and the most memory they may take. Many, because syncs that wait together are
# committed together by the file system.
THREADS = 8
WRITE_BYTES = 2 << 30
ENCODE_BYTES = 2 << 20

Values: TypeAlias = np.ndarray | Mapping[str, np.ndarray]


@dataclass(frozen=True)
class UnitData:
    """Everything one unit stores for V views of its n samples; contents of quarantined rows are ignored.

    Attributes:
        keys: The n sample keys in tar order.
        labels: int64 [n].
        quarantined: Reason per position that could not be used.
        params: Per view, per sample; None where quarantined.
        pixel_crc: uint32 [V, n], CRC-32 of each view's uint8 pixels.
        taps: Per tap its values [V, n, N, C], or already encoded: arrays [V, n, ...] by suffix, as
            ``feature_store.format.codecs.registry.BoundCodec.encode`` gives them.
        logits: [V, n, classes], or encoded likewise; None for a teacher without a classifier.
    """

    keys: list[str]
    labels: np.ndarray
    quarantined: dict[int, str]
    params: list[list[ViewParams | None]]
    pixel_crc: np.ndarray
    taps: Mapping[str, Values]
    logits: Values | None


def write_unit(
    objects: ObjectStore,
    manifest: Manifest,
    unit: int,
    first_view: int,
    data: UnitData,
    committed: Mapping[str, ObjectChecksum] | None = None,
) -> CommitRecord:
    """Write V views of a unit, first_view onwards, and commit them.

    Args:
        objects: The store's.
        manifest: What it claims.
        unit: The unit.
        first_view: First view.
        data: What to write.
        committed: Proofs of the unit's objects that belong to no view, if another record vouches for them already;
            they are compared, not written.

    Raises:
        InputError: The data does not have the manifest's shapes, or holds values its codec cannot store.
        MismatchError: Keys or labels are not the committed ones.
        CommittedError: Another writer committed the same first.
    """
    _require_shapes(manifest, unit, first_view, data)
    committed = committed or {}
    target = _Target(objects, manifest.tars[unit].name, unit, committed)
    proofs = {
        path: proof
        for some in _in_flight(manifest, _tasks(manifest, unit, first_view, data), target)
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
    """Where one unit's objects go."""

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
                    "interrupted one left it; wait for it, or run `feature-store repair` and try again"
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


def _in_flight(manifest: Manifest, tasks: list[_Task], target: _Target) -> Iterator[dict[str, ObjectChecksum]]:
    """Run tasks several at a time, each of which encodes and writes an object or two; their proofs, in order.

    A local shard is in memory as it was given, a bucket's encoded as a whole, and once more on its way.
    """
    largest = max(object_bytes(spec, manifest.capacity, manifest.capacity) for spec in value_specs(manifest).values())
    threads = max(1, min(THREADS, WRITE_BYTES // (2 * largest)))
    with ThreadPoolExecutor(threads, thread_name_prefix="feature-store-write") as pool:
        futures = [pool.submit(task, target) for task in tasks]
        try:
            yield from (future.result() for future in futures)
        finally:
            pool.shutdown(cancel_futures=True)


def _tasks(manifest: Manifest, unit: int, first_view: int, data: UnitData) -> list[_Task]:
    views = range(len(data.params))
    small = [
        partial(_write_chunk, spec, manifest.capacity, spec.object_path(unit, first_view + index), data, index)
        for spec in value_specs(manifest).values()
        if not spec.sharded
        for index in (views if spec.per_view else views[:1])
    ]
    large = [
        partial(_write_shards, value, manifest.capacity, unit, first_view, data, index)
        for value in bound_codecs(manifest).values()
        for index in views
    ]
    return small + large  # syncs of small objects make the large ones wait, so they come first


def _write_chunk(
    spec: ArraySpec, capacity: int, path: str, data: UnitData, index: int, target: _Target
) -> dict[str, ObjectChecksum]:
    values = _view_values(spec, data, index) if spec.per_view else _sample_values(spec, data)
    return {path: target.put_chunk(path, encode_chunk(spec, values, capacity))}


def _write_shards(
    value: BoundCodec, capacity: int, unit: int, first_view: int, data: UnitData, index: int, target: _Target
) -> dict[str, ObjectChecksum]:
    """One view of a tap or of the logits: a shard per part of its codec, and the row checksums of each."""
    positions = np.array([i for i in range(len(data.keys)) if i not in data.quarantined], np.int64)
    specs = {part.suffix: spec for spec, part in zip(coded_specs(value), value.parts, strict=True)}
    shards = {suffix: ShardBuilder(spec, capacity) for suffix, spec in specs.items()}
    largest, *others = shards
    kept: dict[str, list[np.ndarray]] = {suffix: [] for suffix in others}

    def parts(suffix: str) -> Iterator[np.ndarray]:
        """Rows of the largest shard are encoded as they are written, and those of the others kept until then."""
        yield from rows_of_largest() if suffix == largest else kept[suffix]
        yield shards[suffix].finish()

    def rows_of_largest() -> Iterator[np.ndarray]:
        for some, encoded in _encoded_blocks(value, data, index, positions):
            for suffix in others:
                kept[suffix] += shards[suffix].add(some, encoded[suffix])
            yield from shards[largest].add(some, encoded[largest])

    proofs = {}
    for suffix, shard in shards.items():
        path = specs[suffix].object_path(unit, first_view + index)
        target.put(path, parts(suffix))
        proofs[path] = ObjectChecksum(shard.nbytes, shard.checksum)
        path = specs[suffix].checksums.object_path(unit, first_view + index)
        proofs[path] = target.put_chunk(path, encode_chunk(specs[suffix].checksums, shard.checksums, capacity))
    return proofs


def _sample_values(spec: ArraySpec, data: UnitData) -> np.ndarray:
    if spec.path == "label":
        return data.labels
    if spec.path == "key":
        return encode_keys(data.keys, spec.row_shape[0])
    return np.array([key_hash(key) for key in data.keys], spec.dtype)


def _view_values(spec: ArraySpec, data: UnitData, index: int) -> np.ndarray:
    if spec.path == "view/pixel_crc":
        return data.pixel_crc[index]
    name = {"view/magnitude": "magnitudes"}.get(spec.path, spec.path.removeprefix("view/"))
    values = np.full((len(data.keys), *spec.row_shape), spec.fill, spec.dtype)
    for position, params in enumerate(data.params[index]):
        if params is not None:
            values[position] = getattr(params, name)
    return values


def _encoded_blocks(
    value: BoundCodec, data: UnitData, index: int, positions: np.ndarray
) -> Iterator[tuple[np.ndarray, Mapping[str, np.ndarray]]]:
    """One view's encoded rows by part, a few positions at a time."""
    values = data.logits if value.path == "logits" else data.taps[value.path.removeprefix("taps/")]
    parts = values if isinstance(values, Mapping) else {"": np.asarray(values)}
    arrays = {suffix: part[index] for suffix, part in parts.items()}
    rows = max(1, ENCODE_BYTES // max(1, sum(array[:1].nbytes for array in arrays.values())))
    for start in range(0, len(positions), rows):
        some = positions[start : start + rows]
        adjacent = some[-1] - some[0] == len(some) - 1
        block = {k: array[some[0] : some[-1] + 1] if adjacent else array[some] for k, array in arrays.items()}
        yield some, block if isinstance(values, Mapping) else value.encode(block[""])


def _require_shapes(manifest: Manifest, unit: int, first_view: int, data: UnitData) -> None:
    views, samples = len(data.params), len(data.keys)
    manifest.require_unit(unit)
    if views < 1 or first_view < 0 or first_view + views > manifest.num_views:
        raise InputError(f"views {first_view}..{first_view + views - 1} do not fit the store's {manifest.num_views}")
    if samples != manifest.tars[unit].samples:
        raise InputError(f"unit {unit} has {samples} samples, the manifest says {manifest.tars[unit].samples}")
    expected: dict[str, tuple[int, ...]] = {"labels": (samples,), "pixel_crc": (views, samples)}
    got: dict[str, tuple[int, ...] | None] = {"labels": data.labels.shape, "pixel_crc": data.pixel_crc.shape}
    for path, codec in bound_codecs(manifest).items():
        values = data.logits if path == "logits" else data.taps.get(path.removeprefix("taps/"))
        name = path.replace("/", ".")
        if isinstance(values, Mapping):
            for part in codec.parts:
                array = values.get(part.suffix)
                expected[f"{name}[{part.suffix!r}]"] = (views, samples, *part.row_shape)
                got[f"{name}[{part.suffix!r}]"] = None if array is None else array.shape
                if array is not None and array.dtype != part.dtype:
                    raise InputError(f"{name}[{part.suffix!r}] of unit {unit} is {array.dtype}, expected {part.dtype}")
        else:
            expected[name] = (views, samples, *codec.shape)
            got[name] = None if values is None else values.shape
    for name, shape in expected.items():
        if got[name] != shape:
            raise InputError(f"{name} of unit {unit} has shape {got[name]}, expected {shape}")
