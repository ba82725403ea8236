"""Signals that stop a run."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)  # the last one: sbatch --signal=USR1@120
_REPEAT_SECONDS = 2.0  # torchrun, timeout and Slurm each pass a signal on, so that one request arrives several times


class Stopped(SystemExit):
    """A signal asked this process to stop; the exit code is what shells expect of one that the signal ended.

    Attributes:
        signal: The signal's number.
        note: The saved state, and the command that continues it.
    """

    def __init__(self, number: int, note: str) -> None:
        super().__init__(128 + number)
        self.signal, self.note = number, note

    def __str__(self) -> str:
        return f"{signal.Signals(self.signal).name}: {self.note}"


class Stop:
    """Whether a signal asked this process to stop.

    Attributes:
        signal: Its number; None so far.
        raises: Whether the signal itself raises, where it is not held. Of several processes none may: they stop
            after the same step, which they agree on.
        note: Text of a signal's exception now, see Stopped.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.raises = True
        self.note = "stopped while starting; start again with --resume"
        self._held, self._first = 0, 0.0

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold signals back in the context; one that came is raised when it ends.

        Raises:
            Stopped: A signal came.
        """
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
        if self.raises and not self._held:
            self.check()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Raise on a signal within the context, also on one of another process of the run.

        Raises:
            Stopped: A signal came.
        """
        before, self.raises = self.raises, True
        try:
            self.check()
            yield
        finally:
            self.raises = before

    def now(self) -> Stopped:
        """The exception to raise where processes agreed to stop; the signal may be another one's."""
        return Stopped(self.signal or signal.SIGTERM, self.note)

    def check(self) -> None:
        """Raise if a signal came.

        Raises:
            Stopped: It did.
        """
        if self.signal is not None:
            raise Stopped(self.signal, self.note)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: the first signal stops the run, one that comes later ends the process."""
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._first = number, now
            if self.raises and not self._held:
                raise Stopped(number, self.note)
        elif now - self._first > _REPEAT_SECONDS:
            os._exit(128 + number)


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Raise Stopped on a stop signal within the context. A signal that is ignored (nohup) stays so.

    Outside the main thread, where Python allows no handlers, nothing changes.
    """
    stop = Stop()
    handled = SIGNALS if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.getsignal(number) for number in handled}
    before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    try:
        for number in before:
            signal.signal(number, stop.handle)
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
