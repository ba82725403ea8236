"""Command line of the store, and the wrapper all three command lines share."""

import errno
import json as json_module
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from feature_store.errors import ResourceError, UserError
from feature_store.store import open_store
from feature_store.summary import print_summary

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

app = tyro.extras.SubcommandApp()


@app.command
def info(path: Annotated[Path, tyro.conf.Positional], json: bool = False) -> None:
    """Print what a store holds.

    Args:
        path: The store.
        json: Print JSON instead of a table.
    """
    summary = open_store(path).info()
    if json:
        print(json_module.dumps(summary, indent=2))
    else:
        print_summary(summary, Console())


def run(app: tyro.extras.SubcommandApp, prog: str, argv: Sequence[str] | None = None) -> int:
    """Run a command line and turn user errors into one line on stderr and an exit code.

    Args:
        app: The commands.
        prog: Name of the program.
        argv: Arguments after the program's name; None for the process's own.

    Returns:
        0 done, 1 failed check, 2 wrong usage or input, 3 environment (disk, network, device), 130 interrupted.
    """
    try:
        arguments = list(sys.argv[1:] if argv is None else argv)
        app.cli(prog=prog, args=arguments, config=(tyro.conf.FlagCreatePairsOff,))
    except UserError as error:
        return _fail(prog, error)
    except OSError as error:
        what = "the disk is full" if error.errno in DISK_FULL else "the operating system refused"
        return _fail(prog, ResourceError(f"{what}: {error}; nothing committed was lost"))
    except KeyboardInterrupt:
        print(f"{prog}: interrupted; the same command resumes", file=sys.stderr)
        return 130
    except SystemExit as stop:  # tyro: 0 after --help, 2 after wrong usage
        return stop.code if isinstance(stop.code, int) else 2
    return 0


def _fail(prog: str, error: UserError) -> int:
    print(f"{prog}: error: {error}", file=sys.stderr)
    return error.exit_code


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``feature-store``."""
    return run(app, "feature-store", argv)
