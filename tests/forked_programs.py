"""Programs as processes of their own, forked from the tests' fork server: a new interpreter imports for 5 s."""

import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from command_lines import PROGRAMS

_CONTEXT = multiprocessing.get_context("forkserver")


class Program:
    """A command of ours under way, with the methods of ``subprocess.Popen`` that tests use.

    Args:
        program: Its name, e.g. ``teacher-service``.
        arguments: Its arguments.
        folder: Where its output goes, as ``PROGRAM-N.out`` and ``.err``.
        environment: Variables beside those of this process.
    """

    def __init__(
        self,
        program: str,
        arguments: Sequence[object],
        folder: Path,
        *,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        name = f"{program}-{len(list(folder.glob(f'{program}-*.out')))}"
        self._out, self._err = folder / f"{name}.out", folder / f"{name}.err"
        variables = {**os.environ, **(environment or {})}
        texts = [str(argument) for argument in arguments]
        self._process = _CONTEXT.Process(
            target=_run, args=(program, texts, variables, Path.cwd(), self._out, self._err)
        )
        self._out.touch()
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """Exit code; minus the number of a signal that ended it; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """See returncode."""
        return self._process.exitcode

    def printed(self) -> str:
        """What it has written on stdout so far."""
        return self._out.read_text()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end; what it wrote on stdout and stderr."""
        self._process.join(timeout)
        assert self._process.exitcode is not None, f"still running after {timeout} s: {self._err.read_text()}"
        return self._out.read_text(), self._err.read_text()

    def send_signal(self, number: int) -> None:
        """Send a signal, if it still runs."""
        if self._process.exitcode is None:
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)

    def terminate(self, seconds: float) -> None:
        """Have it end, and end it at once if it takes longer than that; gone when this returns."""
        self.send_signal(signal.SIGTERM)
        self._process.join(seconds)
        self.kill()
        self._process.join()


def _run(
    program: str,
    arguments: list[str],
    variables: dict[str, str],
    folder: Path,
    out: Path,
    err: Path,
) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    tempfile.tempdir = None  # a TMPDIR of its own
    torch.set_num_threads(1)
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), descriptor)
    sys.exit(PROGRAMS[program](arguments))
