"""Deterministic, resumable order of rows, epoch by epoch."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from feature_store.errors import InputError
from feature_store.format.addressing import RowId


class EpochSampler(Sampler[list[RowId]]):
    """Batches of row addresses, one epoch at a time.

    Units are permuted; then groups of ``shuffle_units`` neighbours are mixed and permuted as one. Reads stay inside
    few units at a time, which is what makes a store on slow disks bearable. The last incomplete batch is dropped.
    Epoch e uses view e mod ``num_views``, or view e itself when views are drawn without end.

    Each of several processes gets its share of every batch, in ``accumulate`` micro-batches of one size; which rows
    make up a batch depends on neither.

    Attributes:
        units: Positions to train on, one int array per unit.
        rows: Rows of an epoch, before the incomplete batch is dropped.
        num_views: Number of views V; None if every epoch has its own.
        rows_per_pass: Rows of a micro-batch, which a process has in memory at once.
    """

    def __init__(
        self,
        units: Sequence[np.ndarray],
        *,
        batch_size: int,
        seed: int,
        shuffle_units: int = 8,
        num_views: int | None = None,
        accumulate: int = 1,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        """Plan the epochs.

        Args:
            units: Positions to train on, one int array per unit.
            batch_size: Rows per batch, of all processes together.
            seed: Seed of every epoch's order.
            shuffle_units: Units mixed together.
            num_views: Number of views V; None if every epoch has its own.
            accumulate: Micro-batches that a process's share of a batch is given in.
            rank: Number of this process.
            processes: Number of processes that share every batch.

        Raises:
            InputError: Fewer rows than one batch, or a batch that cannot be shared out.
        """
        if batch_size % (processes * accumulate):
            raise InputError(
                f"a batch of {batch_size} cannot be shared by {processes} processes in {accumulate} passes each; "
                f"make --batch-size a multiple of {processes * accumulate}"
            )
        self.units, self._seed = [np.asarray(unit, np.int64) for unit in units], seed
        self._batch_size, self._shuffle_units, self.num_views = batch_size, shuffle_units, num_views
        self.rows = sum(map(len, self.units))
        if self.rows < batch_size:
            raise InputError(
                f"{self.rows} samples do not fill one batch of {batch_size}; lower --batch-size or add samples"
            )
        self._epoch, self._first = 0, 0
        self.rows_per_pass = batch_size // (processes * accumulate)
        self._own = range(rank * accumulate, (rank + 1) * accumulate)  # pieces of every batch that are this process's

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose what the next iteration gives: an epoch, from one of its batches on."""
        self._epoch, self._first = epoch, first_batch

    @property
    def per_epoch(self) -> int:
        """Batches of a whole epoch."""
        return self.rows // self._batch_size

    def __len__(self) -> int:
        return (self.per_epoch - self._first) * len(self._own)

    def __iter__(self) -> Iterator[list[RowId]]:
        order, view = self.epoch_rows(self._epoch), self.view_of(self._epoch)
        for batch in range(self._first, self.per_epoch):
            yield from self._micro_batches(order, view, batch)

    def micro_batches(self, epoch: int, batch: int) -> list[list[RowId]]:
        """Rows of each of this process's micro-batches of one batch."""
        return list(self._micro_batches(self.epoch_rows(epoch), self.view_of(epoch), batch))

    def _micro_batches(self, order: np.ndarray, view: int, batch: int) -> Iterator[list[RowId]]:
        for piece in self._own:
            start = batch * self._batch_size + piece * self.rows_per_pass
            rows = order[start : start + self.rows_per_pass].tolist()
            yield [RowId(unit, position, view) for unit, position in rows]

    def view_of(self, epoch: int) -> int:
        """View index of an epoch: epoch mod V, or a view of its own if V is None."""
        return epoch if self.num_views is None else epoch % self.num_views

    def epoch_rows(self, epoch: int) -> np.ndarray:
        """All (unit, position) pairs of an epoch in order, int64 [rows, 2]."""
        generator = np.random.Generator(np.random.Philox(key=[self._seed, epoch]))
        order = generator.permutation(len(self.units))
        groups = [order[i : i + self._shuffle_units] for i in range(0, len(order), self._shuffle_units)]
        mixed = [np.concatenate([self._addresses(unit) for unit in group]) for group in groups]
        return np.concatenate([generator.permutation(rows) for rows in mixed])

    def _addresses(self, unit: int) -> np.ndarray:
        positions = self.units[unit]
        return np.stack([np.full_like(positions, unit), positions], axis=1)
