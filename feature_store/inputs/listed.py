"""SampleSource of listed keys, with their labels."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from feature_store.inputs.base import Sample, require_position
from feature_store.inputs.tar_index import Keys

_TAIL = 64  # bytes at an image's end


class ListedUnit(ABC):
    """One unit of a listing; see SampleSource. Subclasses read its images.

    Args:
        root: The folder that was listed.
        name: Name of the unit.
        header: Hash of the listing and of the unit's place in it.
        keys: Sample keys.
        labels: Class indexes, int64 [samples].
        notes: Facts about the listing.
        problems: Reasons why samples cannot be used, by position.
    """

    def __init__(
        self,
        root: Path,
        name: str,
        header: str,
        keys: Sequence[str],
        labels: np.ndarray,
        *,
        notes: Sequence[str] = (),
        problems: Mapping[int, str] | None = None,
    ) -> None:
        self.url, self.name, self.header_sha256 = f"{root}#{name}", name, header
        self.keys, self.notes, self.problems = Keys.of(keys), tuple(notes), problems or {}
        self._labels = labels

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, position: int) -> Sample:
        """See SampleSource."""
        label = self.label(position)  # which refuses a position that there is not
        return Sample(self.keys[position], self._image(position), label)

    def label(self, position: int) -> int:
        """See SampleSource."""
        require_position(self, position)
        return int(self._labels[position])

    def content_sha256(self) -> str:
        """See SampleSource."""
        digest = hashlib.sha256(self.header_sha256.encode() + self._labels.tobytes())
        for position in range(len(self)):
            if position not in self.problems:
                digest.update(self._image(position)[-_TAIL:])
        return digest.hexdigest()

    @abstractmethod
    def _image(self, position: int) -> bytes:
        """The image file of a sample; errors as for ``SampleSource.read``."""
