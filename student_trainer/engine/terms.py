"""Loss terms of steps, kept on the device until they are read."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from student_trainer.engine.distributed import Group
from student_trainer.methods.base import Terms

LossValues = dict[str, dict[str, float]]
"""``loss``: weighted terms with their ``total``; ``raw``: the same unweighted."""


class TermMeans:
    """Running means of an epoch's terms, and the last step's; adding to them never waits for the device.

    Attributes:
        count: Steps added.
    """

    def __init__(self) -> None:
        self.count = 0
        self._names: tuple[str, ...] = ()
        self._weights: dict[str, float] = {}
        self._sums: Tensor | None = None  # float64 [terms + 1], the last one the total
        self._last: Tensor | None = None  # of the last step
        self._first_bad: Tensor | None = None  # number of the first step whose loss is not finite; -1: none
        self._bad_values: Tensor | None = None  # terms of that step

    def add(self, micro_batches: Sequence[Terms], step: int) -> None:
        """Count one step, whose number is given; every step has the same terms."""
        first = micro_batches[0]
        self._names, self._weights = tuple(first.raw), first.weights
        rows = [torch.stack([*(value.detach() for value in terms.raw.values()), terms.total.detach()]).double()
                for terms in micro_batches]  # fmt: skip
        self._last = torch.stack(rows).mean(dim=0)
        self._sums = self._last if self._sums is None else self._sums.to(self._last.device) + self._last
        self.count += 1
        if self._first_bad is None:
            self._first_bad = self._last.new_full((), -1)
        bad = (self._first_bad < 0) & ~self._last.isfinite().all()
        self._first_bad = torch.where(bad, float(step), self._first_bad)
        self._bad_values = torch.where(bad, self._last, self._last if self._bad_values is None else self._bad_values)

    @property
    def last_total(self) -> float:
        """The loss of this process's last step; waits for the device."""
        assert self._last is not None  # a step was added
        return self._last[-1].item()

    def last(self, group: Group) -> LossValues:
        """The last step's terms, their mean over processes."""
        assert self._last is not None  # a step was added
        return self._values(group.mean(self._last).tolist())

    def means(self, group: Group) -> LossValues:
        """Means over the epoch so far and over processes; empty before the first step."""
        return {} if self._sums is None else self._values((group.mean(self._sums) / self.count).tolist())

    def first_not_finite(self) -> int | None:
        """Number of this process's first step whose loss was not finite."""
        step = -1 if self._first_bad is None else int(self._first_bad.item())
        return None if step < 0 else step

    def first_not_finite_terms(self) -> dict[str, float]:
        """Weighted terms of that step; of the last one if all were finite."""
        assert self._bad_values is not None  # a step was added
        return self._values(self._bad_values.tolist())["loss"]

    def _values(self, numbers: Sequence[float]) -> LossValues:
        raw = dict(zip(self._names, numbers, strict=False))
        return {"loss": {**{name: self._weights[name] * raw[name] for name in raw}, "total": numbers[-1]}, "raw": raw}

    def state_dict(self, group: Group) -> dict[str, Any] | None:
        """For a checkpoint: the sums of every process; None before the first step."""
        own = None if self._sums is None else self._sums.tolist()
        sums = group.gather(own)
        if own is None:
            return None
        return {"names": self._names, "weights": dict(self._weights), "sums": sums, "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any] | None, group: Group) -> None:
        """Inverse of state_dict; for another number of processes, each continues from the mean of the sums."""
        if state is None:
            return
        sums = torch.tensor(state["sums"], dtype=torch.float64)
        self._names, self._weights, self.count = tuple(state["names"]), dict(state["weights"]), state["count"]
        self._sums = sums[group.rank] if len(sums) == group.size else sums.mean(dim=0)
