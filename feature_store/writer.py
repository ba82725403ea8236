"""Writes one unit: its objects whole and durable, then the commit record that makes them count."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from feature_store.codecs import get_codec
from feature_store.commits import CommitRecord, ObjectProof, write_commit
from feature_store.errors import InputError
from feature_store.layout import ArraySpec, crc32c, encode_chunk, encode_shard, value_specs
from feature_store.manifest import Manifest
from feature_store.objects import sync_directories, write_object
from feature_store.sample import encode_keys, key_hash
from feature_store.versions import software_versions
from feature_store.views import ViewParams


@dataclass(frozen=True)
class UnitData:
    """Everything one unit stores for V views of its n samples; contents of quarantined rows are ignored.

    Attributes:
        keys: The n sample keys in tar order.
        labels: int64 [n].
        quarantined: Reason per position that could not be used.
        params: Per view, per sample; None where quarantined.
        pixel_crc: uint32 [V, n], CRC-32 of each view's uint8 pixels.
        taps: [V, n, N, C] per tap.
        logits: [V, n, classes], or None for a teacher without a classifier.
    """

    keys: list[str]
    labels: np.ndarray
    quarantined: dict[int, str]
    params: list[list[ViewParams | None]]
    pixel_crc: np.ndarray
    taps: dict[str, np.ndarray]
    logits: np.ndarray | None


def write_unit(root: Path, manifest: Manifest, unit: int, first_view: int, data: UnitData) -> CommitRecord:
    """Write V views of a unit, first_view onwards, and commit them.

    Raises:
        InputError: The data does not have the manifest's shapes, or holds values its codec cannot store.
    """
    _require_shapes(manifest, unit, first_view, data)
    proofs = {}
    for path, payload in _objects(manifest, unit, first_view, data):
        write_object(root, path, payload)
        proofs[path] = ObjectProof(payload.nbytes, crc32c(payload))
    sync_directories(root, list(proofs))
    record = CommitRecord(
        store=manifest.fingerprint(),
        unit=unit,
        first_view=first_view,
        last_view=first_view + len(data.params) - 1,
        tar=manifest.tars[unit].name,
        samples=len(data.keys),
        quarantined=dict(sorted(data.quarantined.items())),
        objects=proofs,
        software=software_versions(),
    )
    write_commit(root, record)
    return record


def _objects(manifest: Manifest, unit: int, first_view: int, data: UnitData):
    """Path and bytes of every object of the unit, one at a time to bound memory."""
    capacity = manifest.capacity
    written = np.array([position not in data.quarantined for position in range(len(data.keys))], dtype=bool)
    for spec in value_specs(manifest).values():
        if not spec.per_view:
            yield spec.object_path(unit), encode_chunk(spec, _sample_values(spec, data), capacity)
            continue
        for index in range(len(data.params)):
            path = spec.object_path(unit, first_view + index)
            if spec.sharded:
                values = _encoded_rows(manifest, spec, data, index, written)
                shard, checksums = encode_shard(spec, values, written, capacity)
                yield path, shard
                table = spec.checksums
                yield table.object_path(unit, first_view + index), encode_chunk(table, checksums, capacity)
            else:
                yield path, encode_chunk(spec, _view_values(spec, data, index), capacity)


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


def _encoded_rows(manifest: Manifest, spec: ArraySpec, data: UnitData, index: int, written: np.ndarray) -> np.ndarray:
    if spec.path == "logits":
        codec, values = get_codec(manifest.logits_codec or ""), np.asarray(data.logits)[index]
    else:
        tap = spec.path.removeprefix("taps/")
        codec, values = get_codec(manifest.taps[tap].codec), data.taps[tap][index]
    encoded = np.zeros(values.shape, codec.dtype)
    encoded[written] = codec.encode(values[written])
    return encoded


def _require_shapes(manifest: Manifest, unit: int, first_view: int, data: UnitData) -> None:
    views, samples = len(data.params), len(data.keys)
    manifest.require_unit(unit)
    if views < 1 or first_view < 0 or first_view + views > manifest.num_views:
        raise InputError(f"views {first_view}..{first_view + views - 1} do not fit the store's {manifest.num_views}")
    if samples != manifest.tars[unit].samples:
        raise InputError(f"unit {unit} has {samples} samples, the manifest says {manifest.tars[unit].samples}")
    expected: dict[str, tuple[int, ...]] = {"labels": (samples,), "pixel_crc": (views, samples)}
    got: dict[str, tuple[int, ...] | None] = {"labels": data.labels.shape, "pixel_crc": data.pixel_crc.shape}
    for name, tap in manifest.taps.items():
        expected[f"taps.{name}"] = (views, samples, tap.tokens, tap.channels)
        got[f"taps.{name}"] = data.taps[name].shape if name in data.taps else None
    if manifest.logits_codec is not None:
        expected["logits"] = (views, samples, manifest.teacher.num_classes)
        got["logits"] = None if data.logits is None else data.logits.shape
    for name, shape in expected.items():
        if got[name] != shape:
            raise InputError(f"{name} of unit {unit} has shape {got[name]}, expected {shape}")
