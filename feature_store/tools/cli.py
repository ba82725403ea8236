"""Command line ``feature-store``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich.filesize import decimal

from feature_store.errors import CorruptStoreError, InputError
from feature_store.inputs.options import DEFAULT, TarOptions
from feature_store.processes import usable_cpus
from feature_store.store import open_store
from feature_store.tools.command_line import run, unit_progress
from feature_store.tools.info import print_summary, summarise
from feature_store.tools.options import require
from feature_store.tools.terminal import Console, say, say_json

app = tyro.extras.SubcommandApp()


@app.command
def info(path: Annotated[str, tyro.conf.Positional], json: bool = False) -> None:
    """Print a summary of a store.

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

    require(workers >= 1, "--workers", workers, "at least 1")
    with unit_progress("verifying", quiet=json) as progress:
        report = verify(path, quick=quick, workers=workers, progress=progress)
    if json:
        say_json(report.to_dict(), indent=2)
    else:
        print_report(report, Console())
    if report.findings:
        raise CorruptStoreError(
            f"{len(report.findings)} findings in {report.store}; `feature-store repair {report.store}` lists repairs"
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
    """List orphan objects and units to write again; with --yes delete and repair.

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

    require(workers >= 1, "--workers", workers, "at least 1")
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
    """Measure each codec on a store's own features: bytes, speed, errors of losses and gradients.

    Args:
        path: The store, with taps stored as f32 or f16: a directory or URL.
        codecs: Codecs of features to measure; --codecs alone for all. Logits are measured with their own either way.
        rows: Rows to measure on.
        seed: Chooses the rows.
        json: Print JSON instead of tables.
    """
    from feature_store.tools.bench import bench_codecs, print_codecs

    require(rows >= 1, "--rows", rows, "at least 1")
    require(seed >= 0, "--seed", seed, "0 or more")
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
        tap: Tap to draw: stage4 or stage3.
        rows: Rows to average over.
        thumbnails: Views to show.
        seed: Chooses rows and views.
        tar_options: Options for opening tars.
        json: Print the files as JSON.
    """
    from feature_store.tools.plot import plot

    for name, number in {"--rows": rows, "--thumbnails": thumbnails}.items():
        require(number >= 1, name, number, "at least 1")
    require(seed >= 0, "--seed", seed, "0 or more")
    store = open_store(path)
    files = plot(store, out, tars, tap=tap, rows=rows, thumbnails=thumbnails, seed=seed, tar_options=tar_options)
    if json:
        say_json([str(file) for file in files], indent=2)
    else:
        say(f"wrote {', '.join(str(file) for file in files)}")


@app.command
def card(
    path: Annotated[str, tyro.conf.Positional],
    out: Path | None = None,
    url: str | None = None,
    json: bool = False,
) -> None:
    """Write a store's README.md and index.html, to publish with it: teacher, views, counts, errors, how to open it.

    Args:
        path: The store: a directory or URL.
        out: Folder for both files; default the store's own directory.
        url: Where readers will find the store; default where it is now.
        json: Print the files as JSON.
    """
    from feature_store.tools.card import write_card

    store = open_store(path)
    files = write_card(store, store.path if out is None else out, url=url)
    if json:
        say_json([str(file) for file in files], indent=2)
    else:
        say(f"wrote {', '.join(str(file) for file in files)}")


@app.command
def copy(
    source: Annotated[str, tyro.conf.Positional],
    target: Annotated[str, tyro.conf.Positional],
    workers: int = 8,
    json: bool = False,
) -> None:
    """Copy a store to a directory or bucket, compared by its checksums; the same command resumes, and follows growth.

    A unit counts in the copy only when all of it is there, so an interrupted copy is a store that lacks units.

    Args:
        source: The store: a directory or URL (s3://, gs://, http(s)://).
        target: Directory or bucket of the copy; made if needed.
        workers: Units copied at once.
        json: Print JSON.
    """
    from feature_store.tools.copy import copy

    require(workers >= 1, "--workers", workers, "at least 1")
    with unit_progress("copying", quiet=json) as progress:
        report = copy(source, target, workers=workers, progress=progress)
    if json:
        say_json(report.to_dict(), indent=2)
    else:
        say(f"copied {report.copied} of {report.records} records, {decimal(report.bytes)}, to {report.target}")


LISTS = ("--codecs", "--tars")
"""Options that take several values."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``feature-store``."""
    return run(app, "feature-store", argv, lists=LISTS)
