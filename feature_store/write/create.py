"""Objects of an empty store."""

from collections.abc import Mapping

import numpy as np
import zarr
from numpy.typing import ArrayLike
from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from feature_store.commits.root import ROOT, manifest_attributes
from feature_store.format.arrays import ZSTD_LEVEL, ArraySpec
from feature_store.format.layout import BLOCKS, StoreLayout
from feature_store.format.manifest import Manifest


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
    layout = StoreLayout(manifest)
    for spec in layout.arrays.values():
        _create_array(root, spec, layout)
    # The names, because a web server cannot list them.
    root.create_group(BLOCKS.rstrip("/"), attributes={"tensors": sorted(tensors)})
    for name, tensor in tensors.items():
        values = np.asarray(tensor)
        chunks = tuple(max(1, n) for n in values.shape)
        root.create_array(f"{BLOCKS}{name}", data=values, chunks=chunks, compressors=[Crc32cCodec()])
    del objects[ROOT]
    return {path: value.to_bytes() for path, value in objects.items()}


def _create_array(root: zarr.Group, spec: ArraySpec, layout: StoreLayout) -> None:
    unit_shape = layout.unit_shape(spec)
    leading = ("view", "row") if spec.per_view else ("row",)
    root.create_array(
        spec.path,
        shape=layout.shape(spec),
        dtype=spec.dtype,
        chunks=_row_shape(spec) if spec.sharded else unit_shape,
        shards=unit_shape if spec.sharded else None,
        serializer=BytesCodec(endian="little") if spec.dtype.itemsize > 1 else BytesCodec(),
        compressors=[*([ZstdCodec(level=ZSTD_LEVEL)] if spec.zstd else []), Crc32cCodec()],
        attributes=dict(spec.attributes),
        filters=None,
        fill_value=spec.fill,
        dimension_names=(*leading, *spec.dimensions),
    )


def _row_shape(spec: ArraySpec) -> tuple[int, ...]:
    """Shape of one inner chunk of a sharded array: one row."""
    return ((1,) if spec.per_view else ()) + (1, *spec.row_shape)
