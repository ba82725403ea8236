"""Later blocks as stored: tensors by name."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, TypeAdapter

from feature_store.backends.base import ObjectStore
from feature_store.errors import CorruptStoreError, InputError
from feature_store.format.arrays import ArraySpec, decode_chunk
from feature_store.format.checksums import CRC_BYTES, crc32c, object_checksum
from feature_store.format.layout import BLOCKS
from feature_store.parsing import Json, Natural, Text, load_json, parse, require_name

_METADATA = "/zarr.json"
_REMEDY = "restore the folder from a copy, or write the store again"
_MOST_BYTES = 1 << 31  # of one tensor; the largest of any teacher has 1 % of it


@dataclass(frozen=True)
class _Group:
    """Attributes of the group of tensors."""

    tensors: list[Annotated[Text, AfterValidator(require_name)]]


@dataclass(frozen=True)
class _Tensor:
    """The used part of an array's metadata."""

    shape: tuple[Natural, ...]
    data_type: Text
    fill_value: Json


_GROUP, _TENSOR = TypeAdapter(_Group), TypeAdapter(_Tensor)


def read_blocks(objects: ObjectStore) -> dict[str, np.ndarray]:
    """Every tensor of the later blocks.

    Raises:
        CorruptStoreError: One is damaged or incomplete.
    """
    path = f"{BLOCKS}zarr.json"
    try:
        names = parse(_GROUP, load_json(objects.get(path).tobytes())["attributes"], path).tensors
        return {name: _read(objects, f"{BLOCKS}{name}{_METADATA}") for name in names}
    except FileNotFoundError as error:
        raise CorruptStoreError(f"the later blocks are incomplete: {error}; {_REMEDY}") from error
    except (ValueError, KeyError, TypeError, InputError) as error:
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
        spec = _spec(folder, load_json(objects.get(metadata).tobytes()))
    except (ValueError, KeyError, TypeError, OverflowError, InputError) as error:
        raise CorruptStoreError(f"{metadata} is damaged: {error}; {_REMEDY}") from error
    path = "/".join([folder, "c", *("0" for _ in spec.row_shape)])
    try:
        raw = objects.get(path)
    except FileNotFoundError:  # zarr writes no chunk that holds nothing but the fill value
        return np.full(spec.row_shape, spec.fill, spec.dtype)
    if raw.nbytes != spec.row_bytes + CRC_BYTES or object_checksum(raw) != crc32c(raw[:-CRC_BYTES]):
        raise CorruptStoreError(f"the later blocks are damaged: the length or crc32c of {path} is wrong; {_REMEDY}")
    return np.require(decode_chunk(spec, raw, 1, path)[0], requirements="W")


def _spec(folder: str, described: Any) -> ArraySpec:
    """A tensor as an array of one row.

    Raises:
        InputError, ValueError, KeyError, TypeError, OverflowError: Its metadata is not valid.
    """
    tensor = parse(_TENSOR, {name: described[name] for name in ("shape", "data_type", "fill_value")}, folder)
    dtype = np.dtype(tensor.data_type).newbyteorder("<")
    if dtype.kind not in "biuf":
        raise ValueError(f"data_type is {tensor.data_type!r}, expected a kind of number")
    spec = ArraySpec(folder, dtype, tensor.shape, False, False, np.array(tensor.fill_value, dtype))
    if prod(tensor.shape) * dtype.itemsize > _MOST_BYTES:
        raise ValueError(f"shape is {list(tensor.shape)}, expected at most {_MOST_BYTES:,} bytes")
    return spec
