"""Division of a large source into units."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class UnitSlices:
    """Units of stated size of one seeded shuffle.

    Attributes:
        samples: Samples of each unit; the last one takes the rest.
        seed: Of the shuffle.
    """

    samples: int
    seed: int

    def of(self, total: int) -> Iterator[range]:
        """Places in the shuffled order, unit by unit."""
        return (range(start, min(start + self.samples, total)) for start in range(0, total, self.samples))


def shuffled(keys: Sequence[str], seed: int) -> list[int]:
    """Order of keys by blake2b of seed (u64, little endian) and key: the same on every machine."""
    salt = seed.to_bytes(8, "little")
    digests = [hashlib.blake2b(salt + key.encode(), digest_size=16).digest() for key in keys]
    return sorted(range(len(keys)), key=lambda at: (digests[at], keys[at]))
