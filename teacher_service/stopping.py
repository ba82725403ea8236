"""Stop requests from SIGTERM, SIGHUP or Ctrl-C."""

import os
import select
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from feature_store.processes import stop_signals
from feature_store.tools.terminal import say

GRACE_SECONDS = 8.0  # spot machines and schedulers give at least 10 between SIGTERM and SIGKILL
_LEFT = 0  # no signal has this number
RESUME = "committed units are safe; run the same command again to resume"


class Stop(threading.Event):
    """A request to stop.

    Attributes:
        signal: The signal that asked for it; None if another thread did.
    """

    signal: int | None = None

    @property
    def exit_code(self) -> int:
        """The exit code that shells expect after a signal: 143 for SIGTERM, 130 for SIGINT, 129 for SIGHUP."""
        return 128 + (self.signal or signal.SIGINT)


@contextmanager
def stop_on_signals(stop: Stop, grace: float = GRACE_SECONDS) -> Iterator[None]:
    """Set a stop on a stop signal while the context lasts; does nothing outside of the main thread.

    The stop signals are SIGTERM, SIGINT, and SIGHUP unless it is ignored, as under ``nohup``.

    The process ends at the latest after the grace period, or on a second signal, with the stop's exit code: nothing
    that is committed can be lost. A thread of its own watches, because Python's handlers wait for the main thread,
    and that may be inside a long forward pass.

    Args:
        stop: The request to set.
        grace: Seconds the context has to be left in.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    handlers = {number: signal.signal(number, _leave_to_the_watcher) for number in stop_signals()}
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(reader, stop, grace), name="stop-watcher", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.write(writer, bytes([_LEFT]))
        watcher.join()
        os.close(reader)
        os.close(writer)


def _leave_to_the_watcher(number: int, frame: object) -> None:
    """Python writes to the wakeup descriptor only for signals that have a handler."""


def _watch(reader: int, stop: Stop, grace: float) -> None:
    number = _next(reader, None)
    if number == _LEFT:
        return
    stop.signal = number
    stop.set()
    name = signal.Signals(number).name
    say(f"{name}: finishing or abandoning the unit under way; once more to end at once", error=True)
    if _next(reader, grace) != _LEFT:
        say(f"{name}: the unit under way is abandoned; {RESUME}", error=True)
        os._exit(stop.exit_code)


def _next(reader: int, timeout: float | None) -> int:
    """The next signal to stop on, _LEFT once the context was left, or -1 if neither came in time."""
    while select.select([reader], [], [], timeout)[0]:
        number = os.read(reader, 1)[0]
        if number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, _LEFT):
            return number
    return -1
