"""Command line: plan, teachers, cache, verify, pack, serve, token."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from feature_store.errors import CorruptStoreError
from feature_store.inputs.options import SourceOptions
from feature_store.tools.command_line import run, unit_progress
from feature_store.tools.terminal import Console, say, say_json
from teacher_service.config import CacheConfig, PlanConfig, TeacherListConfig
from teacher_service.plan.report import print_forecast, summary_lines
from teacher_service.serve.config import ServeConfig
from teacher_service.serve.tokens import Scope, create_token
from teacher_service.verify.config import VerifyConfig

if TYPE_CHECKING:
    from teacher_service.verify.recompute import DeepReport

# The commands import what they run themselves: torch takes seconds, and --help should not.

SOURCE_OPTIONS = SourceOptions()

app = tyro.extras.SubcommandApp()
token = tyro.extras.SubcommandApp()


@app.command
def plan(config: tyro.conf.OmitArgPrefixes[PlanConfig]) -> None:
    """Predict the size of a cache and, with --time-samples, its time and break-even."""
    from teacher_service.plan.forecast import forecast
    from teacher_service.plan.survey import survey

    result = forecast(survey(config), config, config.processes)
    if config.json:
        say_json(result.to_dict())
    else:
        print_forecast(result, Console())


@app.command
def teachers(config: tyro.conf.OmitArgPrefixes[TeacherListConfig]) -> None:
    """List the teachers that this timm offers, with the sizes of their features; no weights are fetched."""
    from teacher_service.teachers import list_teachers, teacher_lines

    with unit_progress("building models", quiet=config.json) as progress:
        found = list_teachers(config, progress)
    if config.json:
        say_json(asdict(found))
    else:
        say(*teacher_lines(found))


@app.command
def cache(config: tyro.conf.OmitArgPrefixes[CacheConfig]) -> None:
    """Run the teacher once over all views of all tars and store its features; the same command resumes.

    SIGTERM, SIGHUP and Ctrl-C end it within ten seconds; exit code 143, 129 or 130 if units are left.
    """
    from teacher_service.cache.job import cache as run_cache
    from teacher_service.stopping import Stop

    stop = Stop()
    summary = run_cache(config, Console(stderr=True), stop=stop)
    if config.json:
        say_json(asdict(summary))
    else:
        say(*summary_lines(summary))
    if stop.is_set() and summary.units_left:
        say(
            f"teacher-service: stopped with {summary.units_left} of {summary.units} units left; the same command "
            "continues with them",
            error=True,
        )
        sys.exit(stop.exit_code)


@app.command
def verify(config: tyro.conf.OmitArgPrefixes[VerifyConfig]) -> None:
    """Compare all checksums of a store, then recompute random rows with the teacher; exit code 1 if any differs."""
    from teacher_service.verify.recompute import verify as run_verify

    with unit_progress("comparing checksums", quiet=config.json) as progress:
        report = run_verify(config, progress)
    if config.json:
        say_json(asdict(report))
    else:
        print_deep_report(report, Console())
    if not report.sound:
        raise CorruptStoreError(verdict(report))


@app.command
def pack(
    source: Annotated[str, tyro.conf.Positional],
    out: Annotated[Path, tyro.conf.Positional],
    options: tyro.conf.OmitArgPrefixes[SourceOptions] = SOURCE_OPTIONS,
    json: bool = False,
) -> None:
    """Write shuffled webdataset tars from a class-per-folder tree or parquet files; the same command resumes.

    Args:
        source: The folder, parquet file or pattern, or dataset folder.
        out: Folder for the tars; --unit-samples go into each.
        options: Options for finding images and labels.
        json: Print one JSON object on stdout.
    """
    from teacher_service.pack import pack as run_pack
    from teacher_service.pack import report_lines

    with unit_progress("packing", quiet=json) as progress:
        report = run_pack(source, out, options, progress)
    if json:
        say_json(asdict(report))
    else:
        say(*report_lines(report))


@app.command
def serve(config: tyro.conf.OmitArgPrefixes[ServeConfig]) -> None:
    """Serve a store over HTTP, and its teacher if asked to; prints its URL as JSON, then one JSON line per request."""
    from teacher_service.serve.server import serve as run_service

    run_service(config)


@token.command
def create(name: str, scope: tuple[Scope, ...] = ("read",), file: Path = Path("tokens.jsonl")) -> None:
    """Make a bearer token: its hash is appended to the file, the token itself is printed this once.

    Args:
        name: Whose it is; appears in logs.
        scope: Scopes it grants: read (cached rows and the store), compute (the live teacher), admin (everything).
        file: File of hashes, for ``serve --tokens``. Remove a line to revoke a token.
    """
    say(create_token(file, name, scope))


app.command(token, name="token", help="Make bearer tokens for serve.")


def print_deep_report(report: "DeepReport", console: Console) -> None:
    """A verification as text."""
    from feature_store.tools.info import print_report

    print_report(report.checksums, console)
    for each in report.mismatches:
        row = f"unit {each.unit} #{each.position} view {each.view} {each.key}"
        console.print(f"{row}: {each.what}: {each.reason}", soft_wrap=True)
    worst = ", ".join(f"{path} {share:.0%}" for path, share in report.worst.items())
    if report.rows:
        console.print(f"{report.rows} rows recomputed; largest difference, as a share of the tolerance: {worst}")


def verdict(report: "DeepReport") -> str:
    """Faults of a store in one line, with the next step."""
    store, found = report.checksums.store, report.checksums.findings
    if found:
        remedy = f"`feature-store repair {store}` lists repairs"
        return f"{len(found)} findings in {store}, so no row was recomputed; {remedy}"
    rows = {(each.unit, each.position, each.view) for each in report.mismatches}
    units = ", ".join(map(str, sorted({each.unit for each in report.mismatches})))
    return (
        f"{len(rows)} of {report.rows} rows in {store} differ from the teacher's output for the tars' samples (units "
        f"{units}); do not train on it: write those units again, or find out what changed the tars"
    )


LISTS = ("--cors-origins", "--scope", "--taps", "--tars")
"""Options that take several values."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``teacher-service``."""
    return run(app, "teacher-service", argv, lists=LISTS)
