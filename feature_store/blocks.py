"""The later blocks as stored: plain arrays by tensor name, and the hash that names them."""

import hashlib
import json
from collections.abc import Mapping

import numpy as np

from feature_store.errors import CorruptStoreError
from feature_store.layout import CRC_BYTES, ArraySpec, crc32c, decode_chunk, object_checksum
from feature_store.objects.local import ObjectStore

FOLDER = "teacher/blocks/"
_METADATA = "/zarr.json"
_REMEDY = "restore the folder from a copy, or write the store again"


def read_blocks(objects: ObjectStore) -> dict[str, np.ndarray]:
    """Every tensor of the later blocks.

    Raises:
        CorruptStoreError: One is damaged or incomplete.
    """
    path = f"{FOLDER}zarr.json"
    try:
        names = json.loads(objects.get(path).tobytes())["attributes"]["tensors"]
        return {name: _read(objects, f"{FOLDER}{name}{_METADATA}") for name in names}
    except FileNotFoundError as error:
        raise CorruptStoreError(f"the later blocks are incomplete: {error}; {_REMEDY}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptStoreError(f"{path} is damaged: {error}; {_REMEDY}") from error


def blocks_sha256(tensors: Mapping[str, np.ndarray]) -> str:
    """Hash of names, dtypes, shapes and bytes, as ``feature_store.teacher.model.weights_sha256`` makes it."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = np.ascontiguousarray(tensors[name])
        digest.update(f"{name}|torch.{tensor.dtype.name}|{tuple(tensors[name].shape)}|".encode())
        digest.update(tensor.tobytes())
    return digest.hexdigest()


def _read(objects: ObjectStore, metadata: str) -> np.ndarray:
    folder = metadata.removesuffix(_METADATA)
    try:
        described = json.loads(objects.get(metadata).tobytes())
        shape, dtype = tuple(described["shape"]), np.dtype(described["data_type"]).newbyteorder("<")
        spec = ArraySpec(folder, dtype, shape, False, False, described["fill_value"])
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptStoreError(f"{metadata} is damaged: {error}; {_REMEDY}") from error
    path = "/".join([folder, "c", *("0" for _ in shape)])
    try:
        raw = objects.get(path)
    except FileNotFoundError:  # zarr writes no chunk that holds nothing but the fill value
        return np.full(shape, spec.fill, dtype)
    if raw.nbytes != spec.row_bytes + CRC_BYTES or object_checksum(raw) != crc32c(raw[:-CRC_BYTES]):
        raise CorruptStoreError(f"the later blocks are damaged: the length or crc32c of {path} is wrong; {_REMEDY}")
    return np.require(decode_chunk(spec, raw, path)[0], requirements="W")
