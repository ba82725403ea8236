"""The parts of a store that are there before any unit: groups, array metadata, manifest and later blocks."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import zarr
from numpy.typing import ArrayLike
from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from feature_store.backends.local import ObjectStore
from feature_store.errors import CorruptStoreError, InputError
from feature_store.format import blocks
from feature_store.format.codecs.base import ZSTD_LEVEL
from feature_store.format.codecs.registry import require_decodable
from feature_store.format.layout import ArraySpec, array_specs
from feature_store.format.manifest import Manifest, fingerprint_of, require_version
from feature_store.format.parsing import load_json

ROOT = "zarr.json"


def skeleton(manifest: Manifest, tensors: Mapping[str, ArrayLike]) -> dict[str, bytes]:
    """Objects of an empty store by path; the root, which makes it a store, comes last."""
    objects = _without_root(manifest, tensors)
    root: dict[str, Buffer] = {}
    zarr.create_group(MemoryStore(root), attributes=manifest_attributes(manifest))
    return {**objects, ROOT: root[ROOT].to_bytes()}


def metadata(manifest: Manifest, tensors: Mapping[str, ArrayLike]) -> dict[str, bytes]:
    """The groups' and arrays' own objects among those of skeleton, without the root."""
    return {path: raw for path, raw in _without_root(manifest, tensors).items() if path.rpartition("/")[2] == ROOT}


def _without_root(manifest: Manifest, tensors: Mapping[str, ArrayLike]) -> dict[str, bytes]:
    objects: dict[str, Buffer] = {}
    root = zarr.create_group(MemoryStore(objects))
    for spec in array_specs(manifest).values():
        _create_array(root, spec, manifest)
    # The names, because a web server cannot list them.
    root.create_group(blocks.FOLDER.rstrip("/"), attributes={"tensors": sorted(tensors)})
    for name, tensor in tensors.items():
        values = np.asarray(tensor)
        chunks = tuple(max(1, n) for n in values.shape)
        root.create_array(f"{blocks.FOLDER}{name}", data=values, chunks=chunks, compressors=[Crc32cCodec()])
    del objects[ROOT]
    return {path: value.to_bytes() for path, value in objects.items()}


def read_manifest(objects: ObjectStore) -> Manifest:
    """What a store claims.

    Raises:
        InputError: Not a store of this format.
        CorruptStoreError: The manifest is damaged.
    """
    try:
        raw = objects.get(ROOT).tobytes()
    except FileNotFoundError:
        raise InputError(
            f"{objects.url} is not a store (no {ROOT}); write one with `teacher-service cache --store {objects.url}`"
        ) from None
    where = f"{objects.url}/{ROOT}"
    try:
        attributes = load_json(raw)["attributes"]
        claimed, fingerprint = attributes["manifest"], attributes["manifest_sha256"]
        require_version(claimed)
        damaged = fingerprint_of(claimed) != fingerprint  # of what is there, also what a newer release added
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{where} holds no manifest ({error}): not a store of this format") from error
    if damaged:
        raise CorruptStoreError(f"the manifest in {where} is damaged: its sha256 does not match; restore the file")
    manifest = Manifest.from_dict(claimed)
    require_decodable(manifest)
    return manifest


def manifest_attributes(manifest: Manifest) -> dict[str, Any]:
    """The root group's attributes."""
    return {"manifest": manifest.to_dict(), "manifest_sha256": manifest.fingerprint()}


def _create_array(root: zarr.Group, spec: ArraySpec, manifest: Manifest) -> None:
    unit_shape = spec.unit_shape(manifest)
    leading = ("view", "row") if spec.per_view else ("row",)
    root.create_array(
        spec.path,
        shape=spec.shape(manifest),
        dtype=spec.dtype,
        chunks=spec.inner_shape() if spec.sharded else unit_shape,
        shards=unit_shape if spec.sharded else None,
        serializer=BytesCodec(endian="little") if spec.dtype.itemsize > 1 else BytesCodec(),
        compressors=[*([ZstdCodec(level=ZSTD_LEVEL)] if spec.zstd else []), Crc32cCodec()],
        attributes=dict(spec.attributes),
        filters=None,
        fill_value=spec.fill,
        dimension_names=(*leading, *spec.dimensions),
    )
