"""Which zarr arrays a store has, and the exact bytes of their objects.

Everything here is plain zarr v3: readable by any client, written without one because a whole shard assembled in
memory is several times faster. Tests compare both ways. See FORMAT.md.
"""

from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np

from feature_store.codecs import get_codec
from feature_store.errors import CorruptStoreError
from feature_store.manifest import Manifest

CRC_BYTES = 4
MISSING_CHUNK = 2**64 - 1


@dataclass(frozen=True)
class ArraySpec:
    """One array of the store.

    Attributes:
        path: Node path inside the group.
        dtype: Little-endian numpy dtype.
        row_shape: Shape of one row's value.
        per_view: Leading axes are [V, R] if true, [R] if not.
        sharded: One inner chunk per row inside one shard per unit (big rows); otherwise one chunk per unit.
        fill: Value of unwritten rows.
        dimensions: Names of the row's own axes.
    """

    path: str
    dtype: np.dtype
    row_shape: tuple[int, ...]
    per_view: bool
    sharded: bool
    fill: Any
    dimensions: tuple[str, ...] = ()

    @property
    def row_bytes(self) -> int:
        """Bytes of one row's value."""
        return self.dtype.itemsize * int(np.prod(self.row_shape, dtype=np.int64))

    @property
    def checksums(self) -> "ArraySpec":
        """The array beside a sharded one that binds every row to its place: crc32c of the row's bytes."""
        return ArraySpec(f"{self.path}.crc32c", np.dtype("<u4"), (), self.per_view, False, 0)

    def shape(self, manifest: Manifest) -> tuple[int, ...]:
        """Shape of the whole array."""
        rows = len(manifest.tars) * manifest.capacity
        return ((manifest.num_views,) if self.per_view else ()) + (rows, *self.row_shape)

    def unit_shape(self, manifest: Manifest) -> tuple[int, ...]:
        """Shape of what one object holds: a unit's rows, of one view if the array has views."""
        return ((1,) if self.per_view else ()) + (manifest.capacity, *self.row_shape)

    def inner_shape(self) -> tuple[int, ...]:
        """Shape of one inner chunk of a sharded array: one row."""
        return ((1,) if self.per_view else ()) + (1, *self.row_shape)

    def object_path(self, unit: int, view: int | None = None) -> str:
        """Path of the object that holds a unit's rows (of one view)."""
        leading = (view, unit) if self.per_view else (unit,)
        return "/".join([self.path, "c", *map(str, leading), *("0" for _ in self.row_shape)])


def value_specs(manifest: Manifest) -> dict[str, ArraySpec]:
    """The arrays that hold what a unit is about, by path; see array_specs for their checksums."""
    specs = [
        ArraySpec("label", np.dtype("<i8"), (), False, False, -1),
        ArraySpec("key", np.dtype("u1"), (manifest.key_width,), False, False, 0, ("byte",)),
        ArraySpec("key_hash", np.dtype("<u8"), (), False, False, 0),
        ArraySpec("view/crop", np.dtype("<i4"), (4,), True, False, 0, ("left_top_width_height",)),
        ArraySpec("view/flip", np.dtype("u1"), (), True, False, 0),
        ArraySpec("view/erase", np.dtype("<i4"), (4,), True, False, 0, ("left_top_width_height",)),
        ArraySpec("view/noise_seed", np.dtype("<u8"), (), True, False, 0),
        ArraySpec("view/pixel_crc", np.dtype("<u4"), (), True, False, 0),
    ]
    if manifest.policy.num_ops:
        ops = (manifest.policy.num_ops,)
        specs.append(ArraySpec("view/ops", np.dtype("u1"), ops, True, False, 0, ("op",)))
        specs.append(ArraySpec("view/magnitude", np.dtype("<f4"), ops, True, False, 0.0, ("op",)))
    for name, tap in manifest.taps.items():
        shape = (tap.tokens, tap.channels)
        specs.append(
            ArraySpec(f"taps/{name}", get_codec(tap.codec).dtype, shape, True, True, np.nan, ("token", "channel"))
        )
    if manifest.logits_codec is not None:
        dtype, shape = get_codec(manifest.logits_codec).dtype, (manifest.teacher.num_classes,)
        specs.append(ArraySpec("logits", dtype, shape, True, True, np.nan, ("class",)))
    return {spec.path: spec for spec in specs}


def array_specs(manifest: Manifest) -> dict[str, ArraySpec]:
    """All row arrays of a store, by path: values, and a table of row checksums beside each sharded one."""
    values = value_specs(manifest)
    tables = [spec.checksums for spec in values.values() if spec.sharded]
    return {**values, **{table.path: table for table in tables}}


def encode_chunk(spec: ArraySpec, values: np.ndarray, capacity: int) -> np.ndarray:
    """Bytes of an unsharded object: the unit's rows, padded with the fill value, then their crc32c.

    Args:
        spec: The array.
        values: [n, *row_shape] with n <= capacity.
        capacity: Unit capacity S.
    """
    padded = np.full((capacity, *spec.row_shape), spec.fill, spec.dtype)
    padded[: len(values)] = values
    return _with_crc(padded)


def decode_chunk(spec: ArraySpec, raw: np.ndarray, path: str) -> np.ndarray:
    """Inverse of encode_chunk: [S, *row_shape].

    Raises:
        CorruptStoreError: The checksum does not match.
    """
    return _checked(raw, path, "chunk").view(spec.dtype).reshape(-1, *spec.row_shape)


def encode_shard(
    spec: ArraySpec, values: np.ndarray, written: np.ndarray, capacity: int
) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of a shard object: written rows, each with its crc32c, then the shard index with its own.

    Args:
        spec: The array.
        values: [n, *row_shape] in the stored dtype.
        written: bool [n], whether a row holds a value; the others stay missing and read as the fill value.
        capacity: Unit capacity S = number of inner chunks.

    Returns:
        The object, uint8 [shard_bytes]; and the rows' crc32c, uint32 [n], 0 where not written.
    """
    positions = np.flatnonzero(written)
    stride = spec.row_bytes + CRC_BYTES
    index = np.full((capacity, 2), MISSING_CHUNK, "<u8")
    index[positions, 0] = np.arange(len(positions)) * stride
    index[positions, 1] = stride
    shard = np.empty(shard_bytes(spec, len(positions), capacity), np.uint8)
    chunks = shard[: len(positions) * stride].reshape(len(positions), stride)
    checksums = np.zeros(len(values), "<u4")
    for chunk, position in zip(chunks, positions, strict=True):
        chunk[:-CRC_BYTES] = np.ascontiguousarray(values[position]).reshape(-1).view(np.uint8)
        checksums[position] = crc32c(chunk[:-CRC_BYTES])
        chunk[-CRC_BYTES:] = checksums[position : position + 1].view(np.uint8)
    shard[len(positions) * stride :] = _with_crc(index)
    return shard, checksums


def decode_shard_index(raw: np.ndarray, path: str) -> np.ndarray:
    """Offsets and lengths [S, 2] from the last bytes of a shard.

    Raises:
        CorruptStoreError: The checksum does not match.
    """
    return _checked(raw, path, "shard index").view("<u8").reshape(-1, 2)


def shard_index_bytes(capacity: int) -> int:
    """Length of a shard's index at its end, checksum included."""
    return capacity * 16 + CRC_BYTES


def shard_bytes(spec: ArraySpec, rows: int, capacity: int) -> int:
    """Size of a shard object with this many written rows."""
    return rows * (spec.row_bytes + CRC_BYTES) + shard_index_bytes(capacity)


def object_bytes(spec: ArraySpec, rows: int, capacity: int) -> int:
    """Size of a unit's object in this array, per view if the array has views."""
    return shard_bytes(spec, rows, capacity) if spec.sharded else capacity * spec.row_bytes + CRC_BYTES


def crc32c(payload: np.ndarray) -> int:
    """crc32c of uint8 values."""
    return google_crc32c.value(payload)


def damaged(path: str, what: str) -> str:
    """Message of a CorruptStoreError about one object."""
    return (
        f"object {path} is damaged: {what}; delete the unit's record under commits/ and run the same "
        "`teacher-service cache` command: it rewrites only that unit"
    )


def _with_crc(values: np.ndarray) -> np.ndarray:
    payload = values.reshape(-1).view(np.uint8)
    return np.concatenate([payload, np.array([crc32c(payload)], "<u4").view(np.uint8)])


def _checked(raw: np.ndarray, path: str, what: str) -> np.ndarray:
    if crc32c(raw[:-CRC_BYTES]) != int(raw[-CRC_BYTES:].view("<u4")[0]):
        raise CorruptStoreError(damaged(path, f"the crc32c of its {what} does not match"))
    return raw[:-CRC_BYTES]
