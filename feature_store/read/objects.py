"""Small objects, shard indexes: read with their checksums."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from feature_store.backends.base import ObjectStore
from feature_store.commits.record import CommitRecord
from feature_store.errors import CorruptStoreError, ResourceError
from feature_store.format.arrays import ArraySpec, decode_chunk, decode_shard_index, shard_index_bytes
from feature_store.format.checksums import CRC_BYTES, damaged, object_checksum


class ObjectReader:
    """Reader of whole chunks and shard indexes; each is compared with its commit record.

    Args:
        objects: Where they are.
        capacity: Unit capacity S.
    """

    def __init__(self, objects: ObjectStore, capacity: int) -> None:
        self.objects, self.capacity = objects, capacity

    def chunk(self, spec: ArraySpec, record: CommitRecord, view: int | None = None) -> np.ndarray:
        """All rows of a unit in an unsharded array: [S, *row_shape].

        Raises:
            CorruptStoreError: Missing, of another length or damaged.
        """
        return self._chunk(spec, record, spec.object_path(record.unit, view))

    def index(self, spec: ArraySpec, record: CommitRecord, view: int) -> np.ndarray:
        """Offset and length of each row's inner chunk in a shard, uint64 [S, 2]; MISSING_CHUNK where there is none.

        Raises:
            CorruptStoreError: The shard is missing, of another length, or its index is damaged.
        """
        path = spec.object_path(record.unit, view)
        try:
            return self._index(record, path)
        except CorruptStoreError:
            self.objects.forget(path)
            raise

    def _chunk(self, spec: ArraySpec, record: CommitRecord, path: str) -> np.ndarray:
        proof = record.proof(path)
        with object_errors(path):
            raw = self.objects.get(path)
        if len(raw) != proof.bytes:
            raise _wrong_length(path, len(raw), proof.bytes)
        _require_checksum(raw, path, record)
        return decode_chunk(spec, raw, self.capacity, path)

    def _index(self, record: CommitRecord, path: str) -> np.ndarray:
        expected, length = record.proof(path).bytes, shard_index_bytes(self.capacity)
        if expected < length:
            raise damaged(path, f"it has {expected} bytes, its index alone takes {length}")
        with object_errors(path):
            raw = self.objects.get_range(path, expected - length, length + 1)  # one more, to see that it ends there
            if len(raw) != length:
                raise _wrong_length(path, self.objects.size(path), expected)
        _require_checksum(raw, path, record)
        return decode_shard_index(raw, self.capacity, path)


@contextmanager
def object_errors(path: str) -> Iterator[None]:
    """Convert errors of an ObjectStore about a committed object."""
    try:
        yield
    except (OSError, EOFError) as error:
        raise object_error(path, error) from error


def object_error(path: str, error: OSError | EOFError) -> CorruptStoreError | ResourceError:
    """The reader's word for what an ObjectStore raised for a committed object."""
    if isinstance(error, FileNotFoundError):
        return damaged(path, "it is committed but missing")
    if isinstance(error, EOFError):
        return damaged(path, str(error))
    return ResourceError(f"cannot read {path}: {error}; check the disk or the mount, then run again")


def _require_checksum(raw: np.ndarray, path: str, record: CommitRecord) -> None:
    if len(raw) < CRC_BYTES or object_checksum(raw) != record.proof(path).crc32c:
        raise damaged(path, f"its crc32c is not the one in {record.path}")


def _wrong_length(path: str, got: int, expected: int) -> CorruptStoreError:
    return damaged(path, f"it has {got} bytes, its commit record says {expected}")
