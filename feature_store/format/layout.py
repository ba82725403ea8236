"""StoreLayout: arrays, codecs, object addresses of one store."""

from typing import NamedTuple

import numpy as np

from feature_store.format.arrays import ArraySpec
from feature_store.format.codecs.bound import BoundCodec, bind_codecs
from feature_store.format.manifest import Manifest

BLOCKS = "teacher/blocks/"
"""Folder of the later blocks' tensors."""


class ObjectAddress(NamedTuple):
    """Array, unit and view of one object; view is None for an array without views."""

    array: ArraySpec
    unit: int
    view: int | None


class StoreLayout:
    """The arrays a manifest describes; made once per open store.

    Args:
        manifest: The store's.

    Attributes:
        manifest: The same.
        capacity: Unit capacity S: positions of a unit.
        codecs: Codec of every tap by name, and of the logits as ``logits`` if there are any.
        features: The arrays of each codec by the codec's name and the part's suffix; the largest part first.
        values: Arrays of labels, keys, view parameters, features, by path; not the tables of row checksums.
        arrays: All row arrays by path: values, and a table of row checksums beside each sharded one.
        per_unit: Arrays without views, in the order of a commit record's objects.
        per_view: Arrays with views, in that order.

    Raises:
        InputError: A codec is unknown.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest, self.capacity = manifest, manifest.capacity
        self.codecs: dict[str, BoundCodec] = bind_codecs(manifest)
        self.features = {name: bound.arrays for name, bound in self.codecs.items()}
        coded = [spec for parts in self.features.values() for spec in parts.values()]
        self.values = {spec.path: spec for spec in [*_sample_arrays(manifest), *coded]}
        tables = [spec.checksums for spec in self.values.values() if spec.sharded]
        self.arrays = {**self.values, **{table.path: table for table in tables}}
        self.per_unit = [spec for spec in self.arrays.values() if not spec.per_view]
        self.per_view = [spec for spec in self.arrays.values() if spec.per_view]
        self._places = {spec.path: at for group in (self.per_unit, self.per_view) for at, spec in enumerate(group)}

    def shape(self, array: ArraySpec) -> tuple[int, ...]:
        """Shape of a whole array: [V, R, ...] or [R, ...]."""
        rows = len(self.manifest.tars) * self.capacity
        return ((self.manifest.num_views,) if array.per_view else ()) + (rows, *array.row_shape)

    def unit_shape(self, array: ArraySpec) -> tuple[int, ...]:
        """Shape of what one object holds: a unit's rows, of one view if the array has views."""
        return ((1,) if array.per_view else ()) + (self.capacity, *array.row_shape)

    def object_bytes(self, array: ArraySpec, rows: int) -> int:
        """Size of a unit's object with this many written rows; the most, if they are compressed."""
        return array.object_bytes(rows, self.capacity)

    def address(self, path: str) -> ObjectAddress | None:
        """Inverse of ``ArraySpec.object_path``; None if the path is no object of a row array."""
        array, _, chunk = path.partition("/c/")
        spec, numbers = self.arrays.get(array), chunk.split("/")
        if spec is None or not all(n.isdecimal() and n.isascii() and len(n) < 20 for n in numbers):  # int64 at most
            return None
        *views, unit = map(int, numbers[: 2 if spec.per_view else 1])
        view = views[0] if views else None
        return ObjectAddress(spec, unit, view) if spec.object_path(unit, view) == path else None

    def object_paths(self, unit: int, views: range) -> list[str]:
        """Paths of a commit record's objects in their fixed order: those without views, then view by view."""
        shared = [spec.object_path(unit) for spec in self.per_unit]
        return shared + [spec.object_path(unit, view) for view in views for spec in self.per_view]

    def object_index(self, path: str, unit: int, views: range) -> int:
        """Index of a path in object_paths.

        Raises:
            KeyError: Not one of them.
        """
        address = self.address(path)
        if address is None or address.unit != unit or not (address.view is None or address.view in views):
            raise KeyError(path)
        place = self._places[address.array.path]
        if address.view is None:
            return place
        return len(self.per_unit) + (address.view - views.start) * len(self.per_view) + place


def _sample_arrays(manifest: Manifest) -> list[ArraySpec]:
    """Labels, keys and view parameters."""
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
    return specs
