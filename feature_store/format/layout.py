"""Which zarr arrays a store has, and the exact bytes of their objects.

Everything here is plain zarr v3: readable by any client, written without one because writing a shard as it is
made is several times faster. Tests compare both ways. See FORMAT.md.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, cast

import numpy as np
from awscrt import checksums as awscrt_checksums
from numcodecs import zstd  # pyright: ignore[reportAttributeAccessIssue] - a compiled module

from feature_store.errors import CorruptStoreError
from feature_store.format.codecs.base import ZSTD_LEVEL
from feature_store.format.codecs.registry import BoundCodec, bound_codecs, part_path
from feature_store.format.manifest import Manifest

CRC_BYTES = 4
crc32c = cast(Callable[..., int], awscrt_checksums.crc32c)
"""crc32c of bytes; of more bytes if the crc32c of those before is the second argument. It takes any buffer, whatever
its annotation says."""
MISSING_CHUNK = 2**64 - 1


def joined_crc32c(checksums: np.ndarray, nbytes: int) -> int:
    """crc32c of pieces one after the other, from their own; the pieces themselves are not needed.

    Args:
        checksums: crc32c of each piece, uint32 [n].
        nbytes: Bytes of every piece.
    """
    low, second, third, high = _appended_zeros(nbytes)
    joined = 0
    for checksum in checksums.tolist():
        # A crc32c is linear: that of a and b is a's after as many zero bytes as b has, xor b's.
        joined = low[joined & 255] ^ second[joined >> 8 & 255] ^ third[joined >> 16 & 255] ^ high[joined >> 24]
        joined ^= checksum
    return joined


def joined_crc32cs(checksums: np.ndarray, starts: np.ndarray, stops: np.ndarray, nbytes: int) -> list[int]:
    """joined_crc32c of many ranges of pieces at once.

    Args:
        checksums: crc32c of each piece, uint32 [n].
        starts: First piece of each range, int64 [m].
        stops: The one after its last, int64 [m].
        nbytes: Bytes of every piece.
    """
    low, second, third, high = np.array(_appended_zeros(nbytes), np.uint32)
    joined = checksums[starts]
    for step in range(1, int((stops - starts).max())):
        longer = np.flatnonzero(starts + step < stops)
        some = joined[longer]
        some = low[some & 255] ^ second[some >> 8 & 255] ^ third[some >> 16 & 255] ^ high[some >> 24]
        joined[longer] = some ^ checksums[starts[longer] + step]
    return joined.tolist()


@lru_cache(16)
def _appended_zeros(nbytes: int) -> list[list[int]]:
    """What a crc32c becomes after so many zero bytes: for each of its four bytes a table; their xor is the answer."""
    zeros = bytes(nbytes)
    fresh = crc32c(zeros)
    of_bit = np.array([crc32c(zeros, 1 << bit) ^ fresh for bit in range(32)], np.uint32).reshape(4, 8)
    chosen = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little").astype(bool)
    return [np.bitwise_xor.reduce(np.where(chosen, bits, 0), axis=1).tolist() for bits in of_bit]


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
        zstd: Whether each row of a sharded array is compressed, so that rows differ in length.
        attributes: What a foreign client should know of the values.
    """

    path: str
    dtype: np.dtype
    row_shape: tuple[int, ...]
    per_view: bool
    sharded: bool
    fill: Any
    dimensions: tuple[str, ...] = ()
    zstd: bool = False
    attributes: Mapping[str, Any] = field(default_factory=dict, hash=False)

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
    for codec in bound_codecs(manifest).values():
        specs += coded_specs(codec)
    return {spec.path: spec for spec in specs}


def coded_specs(codec: BoundCodec) -> list[ArraySpec]:
    """The sharded arrays that hold one tap or the logits, the largest first."""
    return [
        ArraySpec(
            part_path(codec.path, part), part.dtype, part.row_shape, True, True, part.fill, part.dimensions, part.zstd,
            part.attributes,
        )
        for part in codec.parts
    ]  # fmt: skip


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


def decode_chunk(spec: ArraySpec, raw: np.ndarray, capacity: int, path: str) -> np.ndarray:
    """Inverse of encode_chunk: [S, *row_shape].

    Raises:
        CorruptStoreError: The checksum does not match, or the length is not that of S rows.
    """
    values = _checked(raw, path, "chunk", capacity * spec.row_bytes)
    return values.view(spec.dtype).reshape(capacity, *spec.row_shape)


class ShardBuilder:
    """A shard object in the making: rows, each with its crc32c, then the shard index with its own.

    Args:
        spec: The array.
        capacity: Unit capacity S = number of inner chunks.

    Attributes:
        checksums: The rows' crc32c by position, uint32 [S], 0 where there is no row.
        nbytes: Bytes of the object so far.
        checksum: What a commit record keeps of it, once it is finished; see object_checksum.
    """

    def __init__(self, spec: ArraySpec, capacity: int) -> None:
        self._spec = spec
        self.checksums = np.zeros(capacity, "<u4")
        self._index = np.full((capacity, 2), MISSING_CHUNK, "<u8")
        self.nbytes = self.checksum = 0

    def add(self, positions: np.ndarray, rows: Iterable[np.ndarray]) -> list[np.ndarray]:
        """The object's next bytes: some rows, values in the stored dtype, by ascending position.

        Positions never added stay missing and read as the fill value. Rows are not copied: leave them as they are.
        """
        parts = []
        for position, row in zip(positions.tolist(), rows, strict=True):
            stored = encode_row(self._spec, row)
            self.checksums[position] = crc32c(stored)
            parts += (stored, self.checksums[position : position + 1].view(np.uint8))
            self._index[position] = self.nbytes, len(stored) + CRC_BYTES
            self.nbytes += len(stored) + CRC_BYTES
        return parts

    def finish(self) -> np.ndarray:
        """The object's last bytes."""
        tail = _with_crc(self._index)
        self.nbytes += len(tail)
        self.checksum = object_checksum(tail)
        return tail


def encode_row(spec: ArraySpec, values: np.ndarray) -> np.ndarray:
    """Bytes of one row as its inner chunk holds them, without the checksum: compressed if the array is."""
    raw = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    return np.frombuffer(zstd.compress(raw, ZSTD_LEVEL), np.uint8) if spec.zstd else raw


def decode_row(spec: ArraySpec, stored: np.ndarray, out: np.ndarray, path: str) -> None:
    """Inverse of encode_row, into uint8 [row_bytes].

    Raises:
        CorruptStoreError: The bytes are not a row of this array.
    """
    if not spec.zstd:
        out[...] = stored
        return
    try:
        zstd.decompress(stored, out)
    except (RuntimeError, ValueError) as error:
        raise CorruptStoreError(damaged(path, f"a row cannot be decompressed ({error})")) from error


def decode_shard_index(raw: np.ndarray, capacity: int, path: str) -> np.ndarray:
    """Offsets and lengths [S, 2] from the last bytes of a shard.

    Raises:
        CorruptStoreError: The checksum does not match, or the shard is shorter than its index.
    """
    return _checked(raw, path, "shard index", capacity * 16).view("<u8").reshape(capacity, 2)


def shard_index_bytes(capacity: int) -> int:
    """Length of a shard's index at its end, checksum included."""
    return capacity * 16 + CRC_BYTES


def shard_bytes(spec: ArraySpec, rows: int, capacity: int) -> int:
    """Size of a shard object with this many written rows; if they are compressed, the most it can be."""
    if spec.zstd:
        most = spec.row_bytes + spec.row_bytes // 256 + 64  # zstd's bound
        return rows * (most + CRC_BYTES) + shard_index_bytes(capacity)
    return rows * (spec.row_bytes + CRC_BYTES) + shard_index_bytes(capacity)


def object_bytes(spec: ArraySpec, rows: int, capacity: int) -> int:
    """Size of a unit's object in this array, per view if the array has views."""
    return shard_bytes(spec, rows, capacity) if spec.sharded else capacity * spec.row_bytes + CRC_BYTES


def damaged(path: str, what: str) -> str:
    """Message of a CorruptStoreError about one object."""
    return (
        f"object {path} is damaged: {what}; `feature-store repair --yes --drop-damaged` removes the unit's record, "
        "then the same `teacher-service cache` command writes only that unit again; who opened the store before must "
        "open it again"
    )


def object_checksum(raw: np.ndarray) -> int:
    """The checksum a commit record keeps of an object: the object's own, in its last four bytes.

    It covers a chunk's values, and a shard's index; a shard's rows are covered by the table beside it. A crc32c over
    all of the bytes would say nothing: bytes followed by their crc32c have the same one whatever they are.
    """
    return int(raw[-CRC_BYTES:].view("<u4")[0])


def _with_crc(values: np.ndarray) -> np.ndarray:
    payload = values.reshape(-1).view(np.uint8)
    return np.concatenate([payload, np.array([crc32c(payload)], "<u4").view(np.uint8)])


def _checked(raw: np.ndarray, path: str, what: str, nbytes: int) -> np.ndarray:
    if raw.nbytes < CRC_BYTES or crc32c(raw[:-CRC_BYTES]) != object_checksum(raw):
        raise CorruptStoreError(damaged(path, f"the crc32c of its {what} does not match"))
    if raw.nbytes != nbytes + CRC_BYTES:
        raise CorruptStoreError(damaged(path, f"its {what} has {raw.nbytes - CRC_BYTES} bytes, expected {nbytes}"))
    return raw[:-CRC_BYTES]
