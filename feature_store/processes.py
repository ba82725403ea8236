"""Processes: values of one process, worker processes, usable cores."""

import math
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import connection, forkserver, parent_process, resource_tracker, util
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from types import TracebackType
from typing import Generic, TypeVar

from feature_store.errors import ResourceError

CGROUPS = Path("/sys/fs/cgroup")
_PARENT_POLL_SECONDS = 1.0
_LONGEST_TMPDIR = 103 - len("/pymp-12345678/listener-12345678")  # an AF_UNIX path ends after 103 bytes on macOS
_SHORT = ("/tmp", "/var/tmp", "/dev/shm")  # nosec B108 # a folder with a random name is made in one
SHIELDED = frozenset({signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1})
"""Signals blocked in a shielded fork server: what schedulers, torchrun and terminals send to all processes."""

T = TypeVar("T")


def stop_signals() -> tuple[signal.Signals, ...]:
    """Signals that ask this process to stop: SIGTERM, SIGINT, and SIGHUP unless it is ignored, as under ``nohup``."""
    hangup = () if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (signal.SIGHUP,)
    return (signal.SIGTERM, signal.SIGINT, *hangup)


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


def become_loader_worker() -> None:
    """become_worker, and ignore SIGTERM unless the parent sent it: schedulers and torchrun send it to all processes.

    The parent needs its workers until it has finished its step and saved its work.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SHIELDED)  # threads that start from here on block them too
    become_worker()
    sys.excepthook = _report_unless_abandoned
    if (parent := parent_process()) is not None:
        threading.Thread(target=_end_on_sigterm_of, args=(parent.pid,), name="sigterm-filter", daemon=True).start()


def _report_unless_abandoned(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    # multiprocessing's thread that hands memory over fails so once the parent is gone
    if not issubclass(kind, ConnectionError):
        sys.__excepthook__(kind, error, trace)


def _end_on_sigterm_of(parent: int | None) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(1)


class ShieldedProcess(ForkServerProcess):
    """A worker that starts with the shielded signals blocked."""


class ShieldedContext(ForkServerContext):
    """A fork server whose workers start with the shielded signals blocked; those of other contexts do not."""

    Process = ShieldedProcess


def shielded_forkserver(preload: Sequence[str]) -> ShieldedContext:
    """A fork server, started, that signals to a whole process group or job do not end; its owner's end does.

    Workers are forked from a clean process: not from this one, whose threads, GPU and locks they would inherit. A
    process has one fork server, which forks the workers of its other contexts too.

    Args:
        preload: Modules that it imports once for all workers.
    """
    shorten_socket_paths()
    context = ShieldedContext()
    context.set_forkserver_preload(["feature_store.forkserver_preload", *preload])
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SHIELDED - {signal.SIGTERM})  # inherited by what starts now
    try:
        resource_tracker.ensure_running()  # the fork server starts it otherwise, and it would unblock SIGTERM
        signal.pthread_sigmask(signal.SIG_BLOCK, SHIELDED)
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def shorten_socket_paths() -> None:
    """Keep multiprocessing's sockets out of a temporary folder whose name is too long for them.

    To be called before worker processes are made, which inherit the folder.

    Raises:
        ResourceError: No shorter folder can be written.
    """
    own = tempfile.gettempdir()
    if len(os.fsencode(own)) <= _LONGEST_TMPDIR:
        return
    short = next((folder for folder in _SHORT if os.access(folder, os.W_OK | os.X_OK)), None)
    if short is None:
        raise ResourceError(
            f"the temporary folder {own} has {len(os.fsencode(own))} bytes in its name, and sockets between processes "
            f"take at most {_LONGEST_TMPDIR}; set TMPDIR to a shorter one, or use no worker processes"
        )
    tempfile.tempdir = short
    try:
        util.get_temp_dir()  # makes the folder once per process, and removes it in the end
    finally:
        tempfile.tempdir = own


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
