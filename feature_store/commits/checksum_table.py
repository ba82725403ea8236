"""Checksums of a commit record's objects as two small arrays."""

from collections.abc import Iterator, Mapping

import numpy as np

from feature_store.commits.record import ObjectChecksum
from feature_store.format.layout import StoreLayout


class ChecksumTable(Mapping[str, ObjectChecksum]):
    """Checksums by object path, in the layout's fixed order; a dictionary would not fit a store of millions.

    Attributes:
        sizes: Bytes per object, uint64.
        checksums: crc32c per object, uint32.
    """

    def __init__(self, layout: StoreLayout, unit: int, views: range, sizes: np.ndarray, checksums: np.ndarray) -> None:
        self._layout, self._unit, self._views = layout, unit, views
        self.sizes, self.checksums = sizes, checksums

    def __getitem__(self, path: str) -> ObjectChecksum:
        at = self._layout.object_index(path, self._unit, self._views)
        return ObjectChecksum(int(self.sizes[at]), int(self.checksums[at]))

    def __iter__(self) -> Iterator[str]:
        return iter(self._layout.object_paths(self._unit, self._views))

    def __len__(self) -> int:
        return len(self.sizes)


def pack_checksums(
    layout: StoreLayout, unit: int, views: range, proofs: Mapping[str, ObjectChecksum]
) -> Mapping[str, ObjectChecksum]:
    """A ChecksumTable of a record's objects; unchanged if they are not exactly the objects of its unit and views."""
    paths = layout.object_paths(unit, views)
    if len(paths) != len(proofs) or not all(path in proofs for path in paths):
        return proofs
    sizes = np.array([proofs[path].bytes for path in paths], np.uint64)
    return ChecksumTable(layout, unit, views, sizes, np.array([proofs[path].crc32c for path in paths], np.uint32))


def total_bytes(proofs: Mapping[str, ObjectChecksum]) -> int:
    """Bytes of all the objects together."""
    if isinstance(proofs, ChecksumTable):
        return int(proofs.sizes.sum())
    return sum(proof.bytes for proof in proofs.values())
