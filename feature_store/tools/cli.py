"""Command line of the store, and the wrapper all three command lines share."""

import errno
import logging
import os
import resource
import select
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import tyro
from rich.progress import MofNCompleteColumn, TimeRemainingColumn

from feature_store.errors import DISK_FULL, CorruptStoreError, InputError, ResourceError, UserError
from feature_store.inputs.options import DEFAULT, TarOptions
from feature_store.processes import usable_cpus
from feature_store.store import open_store
from feature_store.tools.info import print_summary, summarise
from feature_store.tools.terminal import Console, LogFormatter, ProgressBar, say, say_json

WRONG_USAGE = 2
SHARED_MEMORY = Path("/dev/shm")  # semaphores and queues of worker processes lie there, without a file name in errors
_LITTLE = 1 << 20

app = tyro.extras.SubcommandApp()


@app.command
def info(path: Annotated[str, tyro.conf.Positional], json: bool = False) -> None:
    """Print what a store holds.

    Args:
        path: The store: a directory or URL.
        json: Print JSON instead of a table.
    """
    summary = summarise(open_store(path))
    if json:
        say_json(summary, indent=2)
    else:
        print_summary(summary, Console())


@app.command
def verify(
    path: Annotated[str, tyro.conf.Positional],
    quick: bool = False,
    workers: int = usable_cpus(),
    json: bool = False,
) -> None:
    """Check every record, object, checksum, row and key of a store; exit code 1 and a list if anything is wrong.

    Args:
        path: The store: a directory or URL.
        quick: Compare existence and lengths only, not contents.
        workers: Processes.
        json: Print the whole report as JSON.
    """
    from feature_store.tools.info import print_report
    from feature_store.tools.verify import verify

    with unit_progress("verifying", quiet=json) as progress:
        report = verify(path, quick=quick, workers=workers, progress=progress)
    if json:
        say_json(report.to_dict(), indent=2)
    else:
        print_report(report, Console())
    if report.findings:
        raise CorruptStoreError(
            f"{len(report.findings)} findings in {report.store}; `feature-store repair {report.store}` says what helps"
        )


@app.command
def repair(
    path: Annotated[str, tyro.conf.Positional],
    yes: bool = False,
    drop_damaged: bool = False,
    quick: bool = False,
    workers: int = usable_cpus(),
    json: bool = False,
) -> None:
    """Say what interrupted writers left and which units to write again; with --yes delete and mend.

    Committed data that is good is never touched. In a bucket, run it only while no writer does.

    Args:
        path: The store: a directory or URL.
        yes: Do it. Without this flag nothing is changed.
        drop_damaged: Also remove the commit records of damaged units, so that `teacher-service cache` rewrites them.
        quick: Look for damage by existence and length only.
        workers: Processes.
        json: Print JSON.
    """
    from feature_store.tools.info import print_repair
    from feature_store.tools.repair import repair

    with unit_progress("verifying", quiet=json) as progress:
        result = repair(path, apply=yes, drop_damaged=drop_damaged, quick=quick, workers=workers, progress=progress)
    if json:
        say_json(result.to_dict(), indent=2)
    else:
        print_repair(result, Console())


@app.command
def bench(
    path: Annotated[str, tyro.conf.Positional],
    codecs: tuple[str, ...] | None = None,
    rows: int = 512,
    seed: int = 0,
    json: bool = False,
) -> None:
    """Measure on a store's own features what each codec costs and keeps: bytes, speed, errors of losses and gradients.

    Args:
        path: The store, with taps stored as f32 or f16: a directory or URL.
        codecs: Codecs of features to measure; --codecs alone for all. Logits are measured with their own either way.
        rows: Rows to measure on.
        seed: Chooses the rows.
        json: Print JSON instead of tables.
    """
    from feature_store.tools.bench import bench_codecs, print_codecs

    if codecs is None:
        raise InputError("bench measures codecs: add --codecs for all of them, or --codecs int8 int4 for some")
    report = bench_codecs(open_store(path), codecs, rows, seed)
    if json:
        say_json(report, indent=2)
    else:
        print_codecs(report, Console())


@app.command
def plot(
    path: Annotated[str, tyro.conf.Positional],
    out: Path,
    tars: tuple[str, ...] = (),
    tap: str = "stage4",
    rows: int = 256,
    thumbnails: int = 8,
    seed: int = 0,
    tar_options: tyro.conf.OmitArgPrefixes[TarOptions] = DEFAULT,
    json: bool = False,
) -> None:
    """Draw a store's features by frequency, by channel and beside their views: PNG files and one HTML page.

    Args:
        path: The store: a directory or URL.
        out: Folder for the files.
        tars: The store's tars: paths, patterns, URLs. Needed for thumbnails of views, which are replayed.
        tap: What to draw: stage4 or stage3.
        rows: Rows to average over.
        thumbnails: Views to show.
        seed: Chooses rows and views.
        tar_options: How tars are opened.
        json: Print the files as JSON.
    """
    from feature_store.tools.plot import plot

    store = open_store(path)
    files = plot(store, out, tars, tap=tap, rows=rows, thumbnails=thumbnails, seed=seed, tar_options=tar_options)
    if json:
        say_json([str(file) for file in files], indent=2)
    else:
        say(f"wrote {', '.join(str(file) for file in files)}")


@contextmanager
def unit_progress(what: str, *, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr over units; gives what to call with units done and in all."""
    columns = (*ProgressBar.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with ProgressBar(*columns, console=Console(stderr=True), transient=True, disable=quiet) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


LISTS = ("--codecs", "--cors-origins", "--gpus", "--scope", "--seeds", "--set", "--taps", "--tars", "--val-tars")
"""Options of the command lines that take several values."""


def run(app: tyro.extras.SubcommandApp, prog: str, argv: Sequence[str] | None = None) -> int:
    """Run a command line and turn user errors into one line on stderr and an exit code.

    Args:
        app: The commands.
        prog: Name of the program.
        argv: Arguments after the program's name; None for the process's own.

    Returns:
        0 done, 1 failed check, 2 wrong usage or input, 3 environment (disk, network, device), 130 interrupted, 141 the
        reader of its output is gone.
    """
    try:
        code = _run(app, prog, list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except BrokenPipeError:
        if not _stdout_is_broken():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush when the interpreter ends
        return 128 + signal.SIGPIPE
    return code


def _run(app: tyro.extras.SubcommandApp, prog: str, arguments: list[str]) -> int:
    try:
        _refuse_repeated_lists(arguments)
        if logging.lastResort is not None:  # where warnings go without a configuration of logs
            logging.lastResort.setFormatter(LogFormatter())
        app.cli(
            prog=prog, args=arguments, config=(tyro.conf.FlagCreatePairsOff,), console_outputs=_are_printable(arguments)
        )
    except UserError as error:
        return _fail(prog, error)
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
    """Whether stdout is a pipe that nobody reads any more, as after ``| head``."""
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


def _refuse_repeated_lists(arguments: Sequence[str]) -> None:
    """The last of several would count alone, and what the others list would be left out in silence."""
    names = [argument.partition("=")[0].replace("_", "-") for argument in arguments]
    for name in LISTS:
        if names.count(name) > 1:
            raise InputError(f"{name} is given {names.count(name)} times, expected once; list all its values behind it")


def _open_files_error(error: UserError) -> UserError:
    """The same, with the limit as its reason if too many files were open: no disk, tar or store is at fault."""
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
    say(f"{prog}: error: {error}", *getattr(error, "__notes__", ()), error=True)
    return error.exit_code


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``feature-store``."""
    return run(app, "feature-store", argv)
