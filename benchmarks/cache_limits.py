"""Whether the cache job's memory stays where it is: over many units, and while the writer is slow."""

import time
import weakref
from pathlib import Path
from typing import Any, cast

import numpy as np

from feature_store.store import Store
from teacher_service.cache.decode import Task
from teacher_service.cache.encode import UnitEncoder
from teacher_service.cache.pipeline import Pipeline
from teacher_service.cache.prepare import Job
from teacher_service.plan.sizes import remaining_bytes

UNITS = 200
SETTLING = 40  # units until caches and pools have their size
SLOWER = 10


class ForgetfulStore:
    """A store that lets the same units be written repeatedly.

    Attributes:
        seconds: Time of each write.
        delay: Seconds to wait before each.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self.seconds: list[float] = []
        self.delay = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def write_unit(self, unit: int, first_view: int, data: Any) -> None:
        """Write a unit, then remove what makes it count."""
        time.sleep(self.delay)
        started = time.perf_counter()
        self._store.write_unit(unit, first_view, data)
        self.seconds.append(time.perf_counter() - started)
        (self._store.path / self._store.committed.record(unit, first_view).path).unlink()


def memory_slope(job: Job) -> dict[str, Any]:
    """Growth of the process's memory over 200 units, by least squares once the first forty have settled it."""
    resident: list[float] = []
    units = [Task(i % len(job.tars), range(1)) for i in range(UNITS)]
    pipeline = Pipeline(job)
    pipeline.run(units, on_commit=lambda done: resident.append(_resident_bytes()))
    settled = resident[SETTLING:]
    slope, _ = np.polyfit(np.arange(len(settled)), settled, 1)
    return {
        "units": len(resident),
        "samples_per_unit": len(job.tars[0]),
        "mib_of_a_unit": remaining_bytes(job.store.layout, {0: range(1)}) / 2**20,
        "kib_per_unit": slope / 1024,
        "mib_at_first": settled[0] / 2**20,
        "mib_at_last": settled[-1] / 2**20,
        "growth_of_whole": slope * len(settled) / settled[0],
    }


def queue_bounds(job: Job) -> dict[str, Any]:
    """Most units in memory at once, with the writer as it is and slowed to a tenth."""
    store = cast(ForgetfulStore, job.store)
    fast = _units_in_memory(job)
    seconds = float(np.median(store.seconds))
    store.delay = (SLOWER - 1) * seconds
    slow = _units_in_memory(job)
    return {"most_units_in_memory": fast, "with_a_slow_writer": slow, "seconds_of_a_write": seconds}


def _units_in_memory(job: Job) -> int:
    alive: weakref.WeakSet[UnitEncoder] = weakref.WeakSet()
    most, make = [0], UnitEncoder.__init__

    def counted(self: UnitEncoder, *args: Any) -> None:
        make(self, *args)
        alive.add(self)
        most[0] = max(most[0], len(alive))

    UnitEncoder.__init__ = counted  # pyright: ignore[reportAttributeAccessIssue]
    try:
        tasks = [Task(i % len(job.tars), range(1)) for i in range(2 * len(job.tars))]
        Pipeline(job).run(tasks, on_commit=lambda unit: None)
    finally:
        UnitEncoder.__init__ = make
    return most[0]


def _resident_bytes() -> float:
    return 4096.0 * int(Path("/proc/self/statm").read_text().split()[1])
