"""Command line of the teacher's side: say what a cache will cost, write it, prove it."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import tyro
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from feature_store.cli import run, unit_progress
from feature_store.errors import CorruptStoreError
from teacher_service.config import CacheConfig, PlanConfig
from teacher_service.verify_config import VerifyConfig

if TYPE_CHECKING:
    from teacher_service.caching import CacheSummary
    from teacher_service.planning import Plan
    from teacher_service.verifying import DeepReport

# The commands import what they run themselves: torch takes seconds, and --help should not.

app = tyro.extras.SubcommandApp()


@app.command
def plan(config: tyro.conf.OmitArgPrefixes[PlanConfig]) -> None:
    """Say what a cache would hold and how big it gets, before anything runs."""
    from teacher_service.planning import plan as make_plan

    result = make_plan(config)
    if config.json:
        print(json.dumps(asdict(result)))
    else:
        Console().print(plan_table(result))


@app.command
def cache(config: tyro.conf.OmitArgPrefixes[CacheConfig]) -> None:
    """Run the teacher once over all views of all tars and store what it says; the same command resumes."""
    from teacher_service.caching import cache as run_cache

    summary = run_cache(config, Console(stderr=True))
    print(json.dumps(asdict(summary)) if config.json else summary_text(summary))


@app.command
def verify(config: tyro.conf.OmitArgPrefixes[VerifyConfig]) -> None:
    """Compare all checksums of a store, then compute random rows anew with the teacher; exit code 1 if any differs."""
    from teacher_service.verifying import verify as run_verify

    with unit_progress("comparing checksums", quiet=config.json) as progress:
        report = run_verify(config, progress)
    if config.json:
        print(json.dumps(asdict(report)))
    else:
        print_deep_report(report, Console())
    if not report.sound:
        raise CorruptStoreError(verdict(report))


def print_deep_report(report: "DeepReport", console: Console) -> None:
    """A verification for people."""
    from feature_store.summary import print_report

    print_report(report.checksums, console)
    for each in report.mismatches:
        row = f"unit {each.unit} #{each.position} view {each.view} {each.key}"
        console.print(f"{row}: {each.what}: {each.reason}", markup=False, soft_wrap=True)
    worst = ", ".join(f"{path} {share:.0%}" for path, share in report.worst.items())
    if report.rows:
        console.print(
            f"{report.rows} rows computed anew; largest distance, of what is explained: {worst}", markup=False
        )


def verdict(report: "DeepReport") -> str:
    """What is wrong with a store, in one line with the next step."""
    store, found = report.checksums.store, report.checksums.findings
    if found:
        remedy = f"`feature-store repair {store}` says what helps"
        return f"{len(found)} findings in {store}, so no row was computed anew; {remedy}"
    rows = {(each.unit, each.position, each.view) for each in report.mismatches}
    units = ", ".join(map(str, sorted({each.unit for each in report.mismatches})))
    return (
        f"{len(rows)} of {report.rows} rows in {store} are not what the teacher says of the tars' samples (units "
        f"{units}); do not train on it: write those units again, or find out what changed the tars"
    )


def plan_table(plan: "Plan") -> Table:
    """A plan for people."""
    table = Table("", "value", title=f"{plan.teacher} -> {plan.store}", title_justify="left", show_header=False)
    table.add_row("samples", f"{plan.samples:,} in {plan.units:,} units (tars), capacity {plan.capacity:,}")
    table.add_row("views", f"{plan.views} per sample, {plan.rows:,} images through the teacher")
    for name, (tokens, channels, codec) in plan.taps.items():
        table.add_row(f"tap {name}", f"{tokens} tokens x {channels} channels, {codec}")
    table.add_section()
    for kind, size in plan.bytes.items():
        table.add_row(kind, decimal(size))
    table.add_row("total", f"{decimal(plan.total_bytes)} in {plan.objects:,} objects")
    table.add_section()
    table.add_row("already written", f"{plan.committed_units:,} of {plan.units:,} units")
    table.add_row("to write", decimal(plan.remaining_bytes))
    verdict = "fits" if plan.fits else f"does NOT fit: {decimal(plan.remaining_bytes - plan.free_bytes)} missing"
    table.add_row("free disk", f"{decimal(plan.free_bytes)}: {verdict}")
    return table


def summary_text(summary: "CacheSummary") -> str:
    """A finished job for people."""
    return (
        f"{summary.store}: {summary.units_written} units written, {summary.units_skipped} were there, "
        f"{summary.quarantined} samples quarantined; {summary.images:,} images in {summary.seconds:.1f} s "
        f"({summary.images_per_second:,.1f} images/s), {summary.teacher_seconds:.1f} s of it in the teacher"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``teacher-service``."""
    return run(app, "teacher-service", argv)
