"""Command line of the teacher's side: say what a cache will cost, write it, serve it."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import tyro
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from feature_store.cli import run
from teacher_service.config import CacheConfig, PlanConfig
from teacher_service.serving.config import ServeConfig
from teacher_service.serving.tokens import Scope, create_token

if TYPE_CHECKING:
    from teacher_service.caching import CacheSummary
    from teacher_service.planning import Plan

# The commands import what they run themselves: torch takes seconds, and --help should not.

app = tyro.extras.SubcommandApp()
token = tyro.extras.SubcommandApp()


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
def serve(config: tyro.conf.OmitArgPrefixes[ServeConfig]) -> None:
    """Serve a store over HTTP, and its teacher if asked to; prints its URL as JSON, then one JSON line per request."""
    from teacher_service.serving.server import serve as run_service

    run_service(config)


@token.command
def create(name: str, scope: tuple[Scope, ...] = ("read",), file: Path = Path("tokens.jsonl")) -> None:
    """Make a bearer token: its hash is appended to the file, the token itself is printed this once.

    Args:
        name: Whose it is; appears in logs.
        scope: What it is good for: read (cached rows and the store), compute (the live teacher), admin (everything).
        file: File of hashes, for ``serve --tokens``. Remove a line to revoke a token.
    """
    print(create_token(file, name, scope))


app.command(token, name="token")


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
