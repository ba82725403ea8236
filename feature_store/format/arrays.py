"""One zarr array: object paths, encoded bytes.

Everything here is plain zarr v3: readable by any client, written without one because writing a shard as it is made is
several times faster. Tests compare both ways. See FORMAT.md.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numcodecs import zstd  # pyright: ignore[reportAttributeAccessIssue] - a compiled module

from feature_store.format.checksums import CRC_BYTES, checked, crc32c, damaged, object_checksum, with_crc

MISSING_CHUNK = 2**64 - 1
ZSTD_LEVEL = 1  # higher levels save less than 1 % on features


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
        attributes: Metadata for foreign clients.
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

    def object_path(self, unit: int, view: int | None = None) -> str:
        """Path of the object that holds a unit's rows (of one view); parsed by ``StoreLayout.address``."""
        leading = (view, unit) if self.per_view else (unit,)
        return "/".join([self.path, "c", *map(str, leading), *("0" for _ in self.row_shape)])

    def object_bytes(self, rows: int, capacity: int) -> int:
        """Size of a unit's object (of one view) with this many written rows; the most, if they are compressed."""
        if not self.sharded:
            return capacity * self.row_bytes + CRC_BYTES
        row = self.row_bytes
        if self.zstd:
            row += self.row_bytes // 256 + 64  # zstd's bound
        return rows * (row + CRC_BYTES) + shard_index_bytes(capacity)


def encode_chunk(spec: ArraySpec, values: np.ndarray, capacity: int) -> np.ndarray:
    """Bytes of an unsharded object: the unit's rows, padded with the fill value, then their crc32c.

    Args:
        spec: The array.
        values: [n, *row_shape] with n <= capacity.
        capacity: Unit capacity S.
    """
    padded = np.full((capacity, *spec.row_shape), spec.fill, spec.dtype)
    padded[: len(values)] = values
    return with_crc(padded)


def decode_chunk(spec: ArraySpec, raw: np.ndarray, capacity: int, path: str) -> np.ndarray:
    """Inverse of encode_chunk: [S, *row_shape].

    Raises:
        CorruptStoreError: The checksum does not match, or the length is not that of S rows.
    """
    values = checked(raw, path, "chunk", capacity * spec.row_bytes)
    return values.view(spec.dtype).reshape(capacity, *spec.row_shape)


class ShardBuilder:
    """A shard object under construction: rows, each with its crc32c, then the shard index with its own.

    Args:
        spec: The array.
        capacity: Unit capacity S = number of inner chunks.

    Attributes:
        checksums: The rows' crc32c by position, uint32 [S], 0 where there is no row.
        nbytes: Bytes of the object so far.
        checksum: The checksum for the commit record, once the shard is finished; see object_checksum.
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
        tail = with_crc(self._index)
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
        raise damaged(path, f"a row cannot be decompressed ({error})") from error


def decode_shard_index(raw: np.ndarray, capacity: int, path: str) -> np.ndarray:
    """Offsets and lengths [S, 2] from the last bytes of a shard.

    Raises:
        CorruptStoreError: The checksum does not match, or the shard is shorter than its index.
    """
    return checked(raw, path, "shard index", capacity * 16).view("<u8").reshape(capacity, 2)


def shard_index_bytes(capacity: int) -> int:
    """Length of a shard's index at its end, checksum included."""
    return capacity * 16 + CRC_BYTES
