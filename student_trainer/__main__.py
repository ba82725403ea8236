"""The program ``student-trainer``, also as ``python -m student_trainer``."""

import os
import signal
import sys
from types import FrameType


def main() -> int:
    """Entry point of ``student-trainer``; the imports take seconds, in which a signal ends it without a traceback."""
    interrupt = signal.getsignal(signal.SIGINT)
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)
    from feature_store.tools.command_line import import_commands

    cli = import_commands("student_trainer.cli", "student-trainer", "student")
    signal.signal(signal.SIGINT, interrupt)
    return cli.main()


def _end(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
