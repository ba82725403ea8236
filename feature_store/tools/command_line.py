"""Entry point shared by all command lines: errors, signals, exit codes."""

import errno
import importlib
import logging
import os
import resource
import select
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import tyro
from rich.progress import MofNCompleteColumn, TimeRemainingColumn

from feature_store.errors import DISK_FULL, InputError, ResourceError, UserError
from feature_store.tools.extras import missing_extra
from feature_store.tools.remedies import COMMANDS
from feature_store.tools.terminal import Console, LogFormatter, ProgressBar, say

WRONG_USAGE = 2
# Semaphores and queues of worker processes lie there, without a file name in errors.
SHARED_MEMORY = Path("/dev/shm")  # nosec B108 # only its free space is read
_LITTLE = 1 << 20


@contextmanager
def unit_progress(what: str, *, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr over units; gives what to call with units done and in all."""
    columns = (*ProgressBar.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with ProgressBar(*columns, console=Console(stderr=True), transient=True, disable=quiet) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def import_commands(module: str, prog: str, extra: str) -> ModuleType:
    """The module of a command line that cannot start without an extra; ends the process where that is missing.

    Args:
        module: Its full name.
        prog: Name of the program.
        extra: The extra that installs what it imports.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = missing_extra(error, extra)
        if missing is None:
            raise
        sys.exit(_fail(prog, missing))


def run(
    app: tyro.extras.SubcommandApp,
    prog: str,
    argv: Sequence[str] | None = None,
    *,
    lists: Collection[str] = (),
    extra: str = "",
) -> int:
    """Run a command line and turn user errors into one line on stderr and an exit code.

    Args:
        app: The commands.
        prog: Name of the program.
        argv: Arguments after the program's name; None for the process's own.
        lists: Options that take several values.
        extra: The program's own extra; named where several extras install a module that is missing.

    Returns:
        0 done, 1 failed check, 2 wrong usage or input, 3 environment (disk, network, device), 130 interrupted, 141 the
        reader of its output is gone.
    """
    try:
        code = _run(app, prog, list(sys.argv[1:] if argv is None else argv), lists, extra)
        sys.stdout.flush()
    except BrokenPipeError:
        if not _stdout_is_broken():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush when the interpreter ends
        return 128 + signal.SIGPIPE
    return code


def _run(app: tyro.extras.SubcommandApp, prog: str, arguments: list[str], lists: Collection[str], extra: str) -> int:
    try:
        _refuse_unknown_command(app, arguments)
        _refuse_repeated_lists(arguments, lists)
        if logging.lastResort is not None:  # where warnings go without a configuration of logs
            logging.lastResort.setFormatter(LogFormatter())
        app.cli(
            prog=prog, args=arguments, config=(tyro.conf.FlagCreatePairsOff,), console_outputs=_are_printable(arguments)
        )
    except UserError as error:
        return _fail(prog, error)
    except ModuleNotFoundError as error:
        missing = missing_extra(error, extra)
        if missing is None:
            raise
        return _fail(prog, missing)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _stdout_is_broken():
            raise
        return _fail(prog, ResourceError(f"{_refused(error)}: {error}; nothing committed was lost"))
    except MemoryError as error:
        return _fail(prog, ResourceError(f"there is not enough memory: {error}; nothing committed was lost"))
    except KeyboardInterrupt:
        say(f"{prog}: interrupted", error=True)
        return 130
    except SystemExit as stop:  # tyro: 0 after --help, 2 after wrong usage
        if stop.code == WRONG_USAGE and not _are_printable(arguments):  # tyro repeats arguments as they are
            return _fail(prog, InputError(f"wrong usage: {shlex.join(arguments)}; see {prog} --help"))
        return stop.code if isinstance(stop.code, int) else WRONG_USAGE
    return 0


def _stdout_is_broken() -> bool:
    """Whether stdout is a pipe without a reader, as after ``| head``."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _refused(error: OSError) -> str:
    if error.errno not in DISK_FULL:
        return "the operating system refused"
    if error.filename is None and SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free < _LITTLE:
        return f"shared memory ({SHARED_MEMORY}) is full; in a container give it more with --shm-size"
    return "the disk is full"


def _are_printable(arguments: Sequence[str]) -> bool:
    return all(map(str.isprintable, arguments))


def _refuse_unknown_command(app: tyro.extras.SubcommandApp, arguments: Sequence[str]) -> None:
    """Refuse what is no command; with --help behind it, tyro would print the program's help and exit with 0."""
    for word in arguments:
        known = app._subcommands  # tyro lists them nowhere else
        if word.startswith("-"):
            return
        if word not in known:
            raise InputError(f"the command is {word!r}, expected one of {', '.join(known)}; see --help")
        if not isinstance(target := known[word].target, tyro.extras.SubcommandApp):
            return
        app = target


def _refuse_repeated_lists(arguments: Sequence[str], lists: Collection[str]) -> None:
    """Refuse a list option that is given twice: only its last values would count."""
    names = [argument.partition("=")[0].replace("_", "-") for argument in arguments]
    for name in lists:
        if names.count(name) > 1:
            raise InputError(f"{name} is given {names.count(name)} times, expected once; list all its values behind it")


def _open_files_error(error: UserError) -> UserError:
    """The error, with the limit of open files as its reason where that limit was reached."""
    what, found, _ = str(error).partition(os.strerror(errno.EMFILE))
    if not found:
        return error
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return ResourceError(
        f"{what}{found}; this process may have {soft} open (ulimit -n), up to {hard} if asked for: raise the limit, "
        "for example by `ulimit -n 4096`, and run the same command again"
    )


def _fail(prog: str, error: UserError) -> int:
    error = _open_files_error(error)
    command = f"; {COMMANDS[error.remedy]}" if error.remedy is not None else ""
    say(f"{prog}: error: {error}{command}", *getattr(error, "__notes__", ()), error=True)
    return error.exit_code
