"""Shard-shuffled streams: units in seeded order, rows shuffled across a few of them, read shard by shard."""

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from feature_store.errors import InputError
from feature_store.format.addressing import RowId
from feature_store.read.reader import ZarrSource
from feature_store.source import FeatureBatch

_STREAM = 0x7368756666  # keeps this order apart from other uses of the same seed
MEMORY_BYTES = 4 << 30
_Memory: TypeAlias = dict[str, np.ndarray]


@dataclass(frozen=True)
class ShuffledStream:
    """Rows of some units in random order from a few shards at a time.

    Units are shuffled and taken ``group_units`` at a time; the rows of a group are shuffled among each other. The
    order depends on nothing but the arguments: not on threads, time, or what was read before.

    Where a request costs more than reading a row in vain (buckets, tiny rows), whole groups are read, shard by shard,
    straight into shuffled places; else each batch is read by itself. Either way the next one is on its way while a
    batch is used.

    Attributes:
        source: Where the rows are.
        places: Units and views to go through, (unit, view).
        seed: Of the order.
        group_units: Units whose rows are mixed.
        batch_size: Rows per batch; batches do not end with a group, only the stream's last one may be shorter.
        taps: Tap names; None for all the source has.
        part: (index, of): take only every of-th group; for processes that share an epoch.
        decode: As in ZarrSource.read.
        memory_bytes: Most memory for rows; see needed_bytes.
    """

    source: ZarrSource
    places: Sequence[tuple[int, int]]
    seed: int
    group_units: int = 4
    batch_size: int = 256
    taps: Sequence[str] | None = None
    part: tuple[int, int] = (0, 1)
    decode: bool = True
    memory_bytes: int = MEMORY_BYTES
    _spare: list[list[_Memory]] = field(default_factory=list, init=False, repr=False, compare=False)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_spare": []}

    def __post_init__(self) -> None:
        index, of = self.part
        if min(self.group_units, self.batch_size) < 1 or not 0 <= index < of:
            raise InputError(
                f"cannot stream groups of {self.group_units} units in batches of {self.batch_size}, part {index} of "
                f"{of}: expected at least 1, 1, and a part of 0..{of - 1}"
            )
        if (needed := self.needed_bytes) > self.memory_bytes:
            raise InputError(
                f"rows of groups of {self.group_units} units in batches of {self.batch_size} take "
                f"{needed / 1e9:.3g} GB, memory_bytes allows {self.memory_bytes / 1e9:.3g} GB; use fewer group_units, "
                "smaller batches, or allow more"
            )

    def rows(self, epoch: int) -> list[RowId]:
        """The whole order of an epoch."""
        return [row for group in self._groups(epoch) for row in group]

    def batches(self, epoch: int) -> Iterator[FeatureBatch]:
        """The rows of an epoch with their features.

        A batch's arrays are memory of the stream: copy, or move to the device, before asking for the next one.

        Raises:
            UncommittedError: A unit was never committed.
            CorruptStoreError: Committed bytes are missing or damaged.
            ResourceError: The disk or the network gave up.
        """
        memories = self._spare.pop() if self._spare else self._new_memories()
        try:
            yield from self._read_ahead(self._windows(epoch), itertools.cycle(memories))
        finally:
            self._spare.append(memories)  # the next epoch finds its pages in place

    def _new_memories(self) -> list[_Memory]:
        return [self.source.buffers(self._window_rows, self.taps) for _ in range(2)]

    def _read_ahead(self, windows: Iterator[list[RowId]], memories: Iterator[_Memory]) -> Iterator[FeatureBatch]:
        with ThreadPoolExecutor(1, thread_name_prefix="feature-store-stream") as ahead:
            coming = self._start(ahead, windows, memories)
            while coming is not None:
                rows, memory = coming.result()
                coming = self._start(ahead, windows, memories)
                for start in range(0, len(rows), self.batch_size):
                    some = rows[start : start + self.batch_size]
                    parts = {name: array[start : start + len(some)] for name, array in memory.items()}
                    yield self.source.batch(some, parts, self.taps, decode=self.decode)

    def _start(
        self, ahead: ThreadPoolExecutor, windows: Iterator[list[RowId]], memories: Iterator[_Memory]
    ) -> "Future[tuple[list[RowId], _Memory]] | None":
        rows = next(windows, None)
        return None if rows is None else ahead.submit(self._fill, rows, next(memories))

    def _fill(self, rows: list[RowId], memory: _Memory) -> tuple[list[RowId], _Memory]:
        self.source.fill(rows, memory)
        return rows, memory

    def _windows(self, epoch: int) -> Iterator[list[RowId]]:
        """What is read at once: groups cut at whole batches, what is left of one comes with the next; or batches."""
        left: list[RowId] = []
        for group in self._groups(epoch):
            rows = left + group
            whole = len(rows) // self.batch_size * self.batch_size
            step = max(1, whole) if self._by_group else self.batch_size
            for start in range(0, whole, step):
                yield rows[start : start + step]
            left = rows[whole:]
        if left:
            yield left

    def _groups(self, epoch: int) -> Iterator[list[RowId]]:
        key = np.array([self.seed % 2**64, _STREAM], np.uint64)
        rng = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, epoch]))
        places = [self.places[at] for at in rng.permutation(len(self.places))]
        index, of = self.part
        for start in range(0, len(places), self.group_units):
            rows = [row for place in places[start : start + self.group_units] for row in self.source.unit_rows(*place)]
            order = rng.permutation(len(rows))  # drawn for every group, so that parts agree on the others
            if start // self.group_units % of == index:
                yield [rows[at] for at in order]

    @property
    def needed_bytes(self) -> int:
        """Memory for rows while batches are taken: two windows, each a group and a batch, or a batch alone."""
        return 2 * self._window_rows * self.source.row_bytes(self.taps)

    @property
    def _by_group(self) -> bool:
        return self.source.objects.gap_bytes >= self.source.row_bytes(self.taps)

    @property
    def _window_rows(self) -> int:
        if not self._by_group:
            return self.batch_size
        return min(self.group_units, len(self.places)) * self.source.manifest.capacity + self.batch_size
