"""Per-stage busy time; identifies the bottleneck."""

import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

STAGES = ("decode", "transfer", "forward", "copy out", "encode", "write")
"""In the order a batch passes through them; ``forward`` is the teacher."""


@dataclass(frozen=True)
class StageTimes:
    """Seconds per stage, of one pipeline or of several together.

    Attributes:
        busy: Seconds its workers (processes, threads, the GPU) worked, summed over them.
        available: Seconds they could have worked: the time since the first batch, summed over them.
    """

    busy: Mapping[str, float] = field(default_factory=dict)
    available: Mapping[str, float] = field(default_factory=dict)

    def share(self, stage: str) -> float:
        """Share of its time a stage worked, 0..1."""
        available = self.available.get(stage, 0.0)
        return min(1.0, self.busy.get(stage, 0.0) / available) if available else 0.0

    def waited(self, stage: str) -> float:
        """Share of its time a stage waited for the others, 0..1."""
        return 1.0 - self.share(stage)

    @property
    def bottleneck(self) -> str:
        """The stage that worked the largest share of its time: queues are bounded, so the others wait for it."""
        return max(STAGES, key=self.share)

    @classmethod
    def together(cls, times: Iterable["StageTimes"]) -> "StageTimes":
        """Of several pipelines that ran side by side."""
        some = list(times)
        return cls(_added(each.busy for each in some), _added(each.available for each in some))

    def __str__(self) -> str:
        return f"teacher waited {self.waited('forward'):.0%} of the time, bottleneck: {self.bottleneck}"


def _added(seconds: Iterable[Mapping[str, float]]) -> dict[str, float]:
    some = list(seconds)
    return {stage: sum(each.get(stage, 0.0) for each in some) for stage in STAGES}


class StageTimer:
    """Adds up the stages' working time; any thread may report.

    Args:
        workers: Processes or threads of each stage that has more than one.
    """

    def __init__(self, workers: Mapping[str, int] | None = None) -> None:
        self._workers = dict.fromkeys(STAGES, 1) | dict(workers or {})
        self._busy: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        self._lock = threading.Lock()
        self._started: float | None = None

    def start(self) -> None:
        """Begin the time the stages have; the first batch is there, what it took to start no longer counts."""
        if self._started is None:
            self._started = time.perf_counter()

    def add(self, stage: str, seconds: float) -> None:
        """Note that one of a stage's workers worked."""
        with self._lock:
            self._busy[stage] += seconds

    @contextmanager
    def busy(self, stage: str) -> Iterator[None]:
        """Note the time a block takes as a stage's work."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - started)

    def times(self) -> StageTimes:
        """The seconds so far."""
        seconds = 0.0 if self._started is None else time.perf_counter() - self._started
        with self._lock:
            return StageTimes(dict(self._busy), {stage: count * seconds for stage, count in self._workers.items()})
