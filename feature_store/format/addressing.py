"""Sample keys, row addresses."""

import hashlib
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple, TypeAlias

import numpy as np

from feature_store.errors import CorruptStoreError, InputError


class RowId(NamedTuple):
    """Address of one cached row: the view-th augmented crop of the sample at a position of a unit."""

    unit: int
    position: int
    view: int

    def row(self, capacity: int) -> int:
        """Index on the store's row axis: ``unit * capacity + position``."""
        return self.unit * capacity + self.position


Rows: TypeAlias = "Sequence[RowId] | np.ndarray"
"""Row addresses as a caller may give them; inside they are int64 [n, 3]: unit, position and view of each."""


def row_array(rows: Rows) -> np.ndarray:
    """Rows as int64 [n, 3].

    Raises:
        InputError: Another shape, or no integers.
    """
    if not isinstance(rows, np.ndarray):
        flat = np.fromiter(chain.from_iterable(rows), np.int64)
        if len(flat) != 3 * len(rows):
            raise InputError(f"{len(rows)} rows have {len(flat)} numbers, expected unit, position and view of each")
        return flat.reshape(-1, 3)
    if rows.ndim != 2 or rows.shape[1] != 3 or rows.dtype.kind not in "iu":
        raise InputError(f"rows are {rows.dtype} {list(rows.shape)}, expected integers [n, 3]: unit, position, view")
    return rows.astype(np.int64, copy=False)


def row_ids(rows: np.ndarray) -> list[RowId]:
    """Rows int64 [n, 3] as RowIds, for work that goes row by row."""
    return [RowId(*row) for row in rows.tolist()]


def key_hash(key: str) -> int:
    """64-bit hash of a sample key: the first 8 bytes of its blake2b-128, little endian."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=16).digest()[:8], "little")


def encode_keys(keys: Sequence[str], width: int) -> np.ndarray:
    """Keys as UTF-8 bytes padded with NUL.

    Args:
        keys: Sample keys.
        width: Bytes per key.

    Returns:
        uint8 array [len(keys), width].

    Raises:
        InputError: A key is longer than width bytes or holds a NUL.
    """
    encoded = [key.encode() for key in keys]
    for key, raw in zip(keys, encoded, strict=True):
        if len(raw) > width or b"\0" in raw:
            raise InputError(
                f"sample key {key!r} does not fit the store: {len(raw)} bytes, at most {width} without NUL; "
                "rename the sample or write a new store with all tars listed"
            )
    joined = b"".join(raw.ljust(width, b"\0") for raw in encoded)
    return np.frombuffer(joined, np.uint8).reshape(len(keys), width)


def decode_keys(encoded: np.ndarray) -> list[str]:
    """Inverse of encode_keys for a uint8 array [n, width].

    Raises:
        CorruptStoreError: A key is not UTF-8.
    """
    try:
        return [bytes(row).rstrip(b"\0").decode() for row in encoded]
    except UnicodeDecodeError as error:
        raise CorruptStoreError(f"a sample key is not UTF-8: {error}; write its unit again, or restore it") from error
