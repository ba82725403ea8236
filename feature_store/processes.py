"""Processes: values of one process, worker processes, usable cores."""

import math
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import Generic, TypeVar

CGROUPS = Path("/sys/fs/cgroup")
_PARENT_POLL_SECONDS = 1.0

T = TypeVar("T")


def become_worker() -> None:
    """Tie this ``multiprocessing`` worker to the process that started it; call it first, in the main thread.

    Ctrl-C and a hang-up reach every process of a terminal; the worker leaves both to its parent. It exits within
    about a second of its parent, however that ended: a parent killed by SIGKILL cannot end its workers.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if (parent := parent_process()) is not None:
        arguments = (parent.sentinel, os.getppid())
        threading.Thread(target=_end_with_parent, args=arguments, name="parent-watcher", daemon=True).start()


def _end_with_parent(sentinel: int, started_by: int) -> None:
    """Wait for EOF of the parent's pipe; a forked sibling may hold its other end, so look at the parent PID too."""
    while os.getppid() == started_by and not connection.wait([sentinel], _PARENT_POLL_SECONDS):
        pass
    os._exit(1)


def usable_cpus() -> int:
    """Cores this process may use: its affinity mask, cut by CPU quotas of its cgroups (containers, Slurm, systemd)."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *map(math.ceil, _cpu_quotas())]))


def _cpu_quotas() -> list[float]:
    """Cores by each quota that applies; cgroup v2 has one file per level, v1 (``cpu`` controller) two."""
    folders = [CGROUPS, CGROUPS / "cpu"]
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            root = CGROUPS / "cpu" if "cpu" in controllers.split(",") else CGROUPS
            if not controllers or root != CGROUPS:
                below = root / path.lstrip("/")
                folders += [below, *below.parents]
    quotas = []
    for folder in {folder for folder in folders if folder.is_relative_to(CGROUPS)}:
        with suppress(OSError, ValueError):
            quota, period = (folder / "cpu.max").read_text().split()
            quotas.append(int(quota) / int(period))  # "max" is no quota
        with suppress(OSError, ValueError):
            quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
            quotas += [quota / period] if quota > 0 else []
    return quotas


class PerProcess(Generic[T]):
    """A value made on first use in each process.

    After a fork the child makes its own and leaves the parent's alone: what it inherited may be locked by, or wait
    for, a thread that exists in the parent only.

    Args:
        make: Makes it; must be picklable if the owner is.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._made: tuple[int, T] | None = None

    def __reduce__(self):
        return PerProcess, (self._make,)

    def __call__(self) -> T:
        """This process's value."""
        made = self._made
        if made is None or made[0] != os.getpid():
            made = self._made = (os.getpid(), self._make())
        return made[1]
