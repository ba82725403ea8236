"""Proofs of a unit's objects as two small arrays instead of a dictionary: a large store has millions."""

from collections.abc import Iterator, Mapping

import numpy as np

from feature_store.commits.record import ObjectChecksum
from feature_store.format.layout import array_specs
from feature_store.format.manifest import Manifest


class ChecksumOrder:
    """The fixed order of a unit's objects: those without views, then view by view."""

    def __init__(self, manifest: Manifest) -> None:
        specs = array_specs(manifest)
        self._per_unit = {path: spec for path, spec in specs.items() if not spec.per_view}
        self._per_view = {path: spec for path, spec in specs.items() if spec.per_view}
        self._place = {path: at for group in (self._per_unit, self._per_view) for at, path in enumerate(group)}

    @property
    def arrays(self) -> list[str]:
        """Paths of the arrays, in order."""
        return [*self._per_unit, *self._per_view]

    @property
    def shared(self) -> int:
        """Objects a record has besides its views'."""
        return len(self._per_unit)

    @property
    def per_view(self) -> int:
        """Objects per view of a record."""
        return len(self._per_view)

    def paths(self, unit: int, views: range) -> list[str]:
        """Paths of a record's objects."""
        shared = [spec.object_path(unit) for spec in self._per_unit.values()]
        return shared + [spec.object_path(unit, view) for view in views for spec in self._per_view.values()]

    def index(self, path: str, unit: int, views: range) -> int:
        """Place of an object among a record's.

        Raises:
            KeyError: Not one of them.
        """
        array, _, chunk = path.partition("/c/")
        if array in self._per_unit:
            if self._per_unit[array].object_path(unit) == path:
                return self._place[array]
        elif array in self._per_view:
            view = chunk.partition("/")[0]
            if view.isdecimal() and int(view) in views and self._per_view[array].object_path(unit, int(view)) == path:
                return len(self._per_unit) + (int(view) - views.start) * len(self._per_view) + self._place[array]
        raise KeyError(path)


class ChecksumTable(Mapping[str, ObjectChecksum]):
    """Proofs by path, in a record's fixed order.

    Attributes:
        sizes: Bytes per object, uint64.
        checksums: crc32c per object, uint32.
    """

    def __init__(self, order: ChecksumOrder, unit: int, views: range, sizes: np.ndarray, checksums: np.ndarray) -> None:
        self._order, self._unit, self._views = order, unit, views
        self.sizes, self.checksums = sizes, checksums

    def __getitem__(self, path: str) -> ObjectChecksum:
        at = self._order.index(path, self._unit, self._views)
        return ObjectChecksum(int(self.sizes[at]), int(self.checksums[at]))

    def __iter__(self) -> Iterator[str]:
        return iter(self._order.paths(self._unit, self._views))

    def __len__(self) -> int:
        return len(self.sizes)


def pack_checksums(
    order: ChecksumOrder, unit: int, views: range, proofs: Mapping[str, ObjectChecksum]
) -> Mapping[str, ObjectChecksum]:
    """Proofs in packed form; as they are if they are not about exactly a unit's objects."""
    paths = order.paths(unit, views)
    if len(paths) != len(proofs) or not all(path in proofs for path in paths):
        return proofs
    sizes = np.array([proofs[path].bytes for path in paths], np.uint64)
    return ChecksumTable(order, unit, views, sizes, np.array([proofs[path].crc32c for path in paths], np.uint32))


def total_bytes(proofs: Mapping[str, ObjectChecksum]) -> int:
    """Bytes of all the objects together."""
    if isinstance(proofs, ChecksumTable):
        return int(proofs.sizes.sum())
    return sum(proof.bytes for proof in proofs.values())
