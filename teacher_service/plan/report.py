"""Tables of a forecast; lines of a finished job."""

import math
from typing import TYPE_CHECKING

from rich.filesize import decimal
from rich.table import Table

from feature_store.tools.terminal import Console

if TYPE_CHECKING:
    from collections.abc import Sequence

    from teacher_service.cache.job import CacheSummary
    from teacher_service.plan.forecast import Forecast
    from teacher_service.plan.timing import Timing


def print_forecast(forecast: "Forecast", console: Console) -> None:
    """The plan, then its alternatives."""
    for table in (plan_table(forecast), codec_table(forecast), views_table(forecast)):
        console.print(table)
    print_notes(forecast.plan.notes, console)
    if forecast.timing is None:
        console.print("time and break-even: not measured; --time-samples N times N samples on this machine")
    else:
        console.print(f"timed with {forecast.timing.samples} samples on {forecast.timing.device}{_divided(forecast)}")
        console.print(written(forecast.timing, forecast.plan.remaining_bytes), soft_wrap=True)


def print_notes(notes: "Sequence[str]", console: Console) -> None:
    """Notes on the tars."""
    for note in notes:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)


def written(timing: "Timing", remaining: int) -> str:
    """Bytes over which the write rate was measured, and the limits of the measurement."""
    share = f"write rate measured for {decimal(timing.written)} of {decimal(remaining)}"
    if timing.disk is None:
        return f"{share}: disks slow down after some tens of gigabytes; --write-seconds N measures for longer"
    first, steady = decimal(round(timing.disk.first)), decimal(round(timing.disk.steady))
    beyond = "" if timing.written >= remaining else "; not measured beyond that"
    return f"{share}: the disk took {first}/s at first, {steady}/s at the end, which is predicted with{beyond}"


def plan_table(forecast: "Forecast") -> Table:
    """Sizes, free disk and time of the job."""
    plan = forecast.plan
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
    table.add_row("free disk", _verdict(plan.free_bytes, plan.remaining_bytes))
    if (views := plan.view_tars) is not None:
        table.add_section()
        table.add_row(
            f"views in {views.url}", f"about {decimal(views.total_bytes)}, {decimal(round(views.view_bytes))} each"
        )
        table.add_row("views to write", decimal(views.remaining_bytes))
        table.add_row("free disk there", _verdict(views.free_bytes, views.needed_bytes))
    if (timing := forecast.timing) is not None and forecast.seconds is not None:
        rate, count = forecast.processes / timing.seconds_per_image(plan.views), forecast.processes
        devices = "one device" if count == 1 else f"{count} devices"
        table.add_row("time", f"{duration(forecast.seconds)} on {devices}, {rate:,.1f} images/s from then on")
    return table


def _divided(forecast: "Forecast") -> str:
    """Conditions of a time that was divided among processes."""
    if forecast.processes == 1 or forecast.timing is None:
        return ""
    return (
        f", divided by {forecast.processes} tar by tar: true if each process has such a device and cores for "
        f"{forecast.timing.workers} decode workers to itself, and the disk takes "
        f"{decimal(round(forecast.write_rate or 0))}/s from all of them"
    )


def _verdict(free: int | None, needed: int) -> str:
    if free is None:
        return "a bucket has no limit known here"
    return f"{decimal(free)}: " + ("fits" if needed <= free else f"does NOT fit: {decimal(needed - free)} missing")


def codec_table(forecast: "Forecast") -> Table:
    """Bytes by tap codec."""
    table = Table("--tap-codec", "whole store", title="codecs", title_justify="left")
    for codec, size in forecast.codec_bytes.items():
        table.add_row(codec, decimal(size) + ("" if forecast.plan.has_room(size) else ", does not fit"))
    return table


def views_table(forecast: "Forecast") -> Table:
    """Costs by number of views; the time columns only if it was measured."""
    table = Table("--views", "whole store", title="views", title_justify="left")
    timed = forecast.timing is not None
    for title in ("device time", "pays after epochs", "or students of") if timed else ():
        table.add_column(title)
    for cost in forecast.view_counts:
        cells = [f"{cost.views}", decimal(cost.total_bytes) + ("" if cost.fits else ", does not fit")]
        if cost.device_hours is not None and cost.break_even_epochs is not None:
            students = (cost.break_even_students or {}).items()
            cells += [
                duration(3600 * cost.device_hours),
                f"{cost.break_even_epochs:,.1f}",
                ", ".join(f"{epochs} epochs: {max(1, math.ceil(count))}" for epochs, count in students),
            ]
        table.add_row(*cells)
    return table


def duration(seconds: float) -> str:
    """Seconds in s, min or h."""
    if seconds < 120:
        return f"{seconds:,.1f} s"
    return f"{seconds / 60:,.1f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def summary_lines(summary: "CacheSummary") -> list[str]:
    """A finished job, predictions beside measurements."""
    shares = ", ".join(f"{stage} {share:.0%}" for stage, share in summary.stages.items())
    predicted = "" if summary.predicted_seconds is None else f", predicted {duration(summary.predicted_seconds)}"
    lines = [
        f"{summary.store}: {summary.units_written} units written, {summary.units_skipped} already committed, "
        f"{summary.quarantined} samples quarantined; {summary.images:,} images in {summary.seconds:.1f} s{predicted} "
        f"({summary.images_per_second:,.1f} images/s, {summary.device_hours:.3g} device-hours), "
        f"{summary.teacher_seconds:.1f} s of it in the teacher; {decimal(summary.bytes_written)} written, predicted "
        f"{decimal(summary.predicted_bytes)}"
    ]
    if shares:
        lines.append(f"stages worked: {shares} of the time; bottleneck: {summary.bottleneck}")
    return lines
