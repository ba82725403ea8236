"""crc32c checksums."""

from collections.abc import Callable
from functools import reduce
from typing import cast

import numpy as np
from awscrt import checksums as awscrt_checksums

from feature_store.errors import CorruptStoreError, Remedy

CRC_BYTES = 4
crc32c = cast(Callable[..., int], awscrt_checksums.crc32c)
"""crc32c of any buffer, continued from the second argument if there is one; releases the interpreter's lock."""


def combined_crc32c(checksums: np.ndarray, nbytes: int) -> int:
    """crc32c of consecutive pieces from the checksums of the pieces.

    Args:
        checksums: crc32c of each piece, uint32 [n].
        nbytes: Bytes of every piece.
    """
    combine = awscrt_checksums.combine_crc32c
    return reduce(lambda joined, checksum: combine(joined, checksum, nbytes), checksums.tolist(), 0)


def with_crc(values: np.ndarray) -> np.ndarray:
    """Bytes of an array, uint8, followed by their crc32c."""
    payload = values.reshape(-1).view(np.uint8)
    return np.concatenate([payload, np.array([crc32c(payload)], "<u4").view(np.uint8)])


def object_checksum(raw: np.ndarray) -> int:
    """The checksum a commit record keeps of an object: the object's own, in its last four bytes.

    It covers a chunk's values, and a shard's index; a shard's rows are covered by the table beside it. A crc32c over
    all of the bytes would prove nothing: any bytes followed by their crc32c have the same crc32c.
    """
    return int(raw[-CRC_BYTES:].view("<u4")[0])


def checked(raw: np.ndarray, path: str, what: str, nbytes: int) -> np.ndarray:
    """Bytes before the crc32c that ends them.

    Args:
        raw: The bytes, uint8.
        path: The object's, for the error.
        what: Name of the bytes, for the error.
        nbytes: Expected bytes without the checksum.

    Raises:
        CorruptStoreError: The checksum or the length is wrong.
    """
    if raw.nbytes < CRC_BYTES or crc32c(raw[:-CRC_BYTES]) != object_checksum(raw):
        raise damaged(path, f"the crc32c of its {what} does not match")
    if raw.nbytes != nbytes + CRC_BYTES:
        raise damaged(path, f"its {what} has {raw.nbytes - CRC_BYTES} bytes, expected {nbytes}")
    return raw[:-CRC_BYTES]


def damaged(path: str, what: str) -> CorruptStoreError:
    """The error about one damaged object."""
    return CorruptStoreError(
        f"object {path} is damaged: {what}; drop the unit's record, write the unit again and open the store again",
        remedy=Remedy.REWRITE_UNIT,
    )
