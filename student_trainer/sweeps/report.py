"""Results of a comparison as JSON, Markdown, HTML."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean

from feature_store.backends.files import write_text
from student_trainer.reports.pages import page, plots_or_note, table
from student_trainer.reports.plots import Curve, bars, curves
from student_trainer.sweeps.comparison import Comparison, SettingResult


def write_comparison(folder: Path, comparison: Comparison, *, plots: bool = True) -> None:
    """Write results.json and table.md, and with plots report.html too (matplotlib or not, see write_run_report)."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "results.json", json.dumps(asdict(comparison), indent=2, default=str) + "\n")
    write_text(folder / "table.md", markdown_table(comparison))
    if not plots:
        return
    caption = _caption(comparison)
    sections = {
        "Results": [table(comparison_columns(comparison), comparison_rows(comparison), caption)],
        "Plots": plots_or_note(lambda: _comparison_plots(comparison)),
        "Runs": [table(("Setting", "Seed", "Top-1 %", "Steps", "Folder"), _run_rows(comparison))],
    }
    seeds = len({run.seed for setting in comparison.settings for run in setting.runs})
    lead = f"{len(comparison.settings)} settings, {seeds} seeds, compared with {comparison.baseline}"
    write_text(folder / "report.html", page(comparison.title, lead, sections))


def comparison_columns(comparison: Comparison) -> tuple[str, ...]:
    """The table's columns."""
    interval = f"{comparison.confidence:.0%} interval"
    return ("Setting", "Top-1 %", "Std", "Seeds", f"vs {comparison.baseline}", interval, "Seconds / step")


def comparison_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """The table's cells, a row per setting."""
    return [_row(setting) for setting in comparison.settings]


def markdown_table(comparison: Comparison) -> str:
    """The table as Markdown, with what its columns mean."""
    columns, rows = comparison_columns(comparison), comparison_rows(comparison)
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in (columns, *rows)]
    ruler = "|" + "|".join([" --- ", *[" ---: "] * (len(columns) - 1)]) + "|"
    return "\n".join([lines[0], ruler, *lines[1:], "", _caption(comparison), ""])


def _caption(comparison: Comparison) -> str:
    which = (
        "of the best epoch, chosen by this accuracy itself" if comparison.score == "best" else "after the last epoch"
    )
    return (
        f"Top-1 is the validation accuracy {which}, mean over seeds; std is the sample standard deviation over seeds. "
        f"The difference to {comparison.baseline!r} is paired by seed, in points, with Student's "
        f"{comparison.confidence:.0%} confidence interval over seeds."
    )


def _row(setting: SettingResult) -> tuple[str, ...]:
    found = setting.difference
    low, high = (found.low, found.high) if found is not None else (None, None)
    return (
        setting.name,
        _number(setting.mean, "{:.2f}"),
        _number(setting.std, "{:.2f}"),
        str(len(setting.runs)),
        "-" if found is None else f"{found.mean:+.2f}",
        "-" if low is None else f"{low:+.2f} to {high:+.2f}",
        _number(setting.seconds_per_step, "{:.4f}"),
    )


def _run_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    runs = [run for setting in comparison.settings for run in setting.runs]
    return [(run.setting, str(run.seed), f"{run.top1:.2f}", str(run.steps), str(run.folder)) for run in runs]


def _comparison_plots(comparison: Comparison) -> list[str]:
    settings = [setting for setting in comparison.settings if setting.runs]
    if not settings:
        return []
    figures = [bars({s.name: [run.top1 for run in s.runs] for s in settings}, x="validation top-1 %")]
    losses = {s.name: _mean_curve([list(enumerate(run.task_loss or (), 1)) for run in s.runs]) for s in settings}
    figures.append(
        curves({name: curve for name, curve in losses.items() if curve}, x="epoch", y="task loss, unweighted")
    )
    accuracies = {s.name: _mean_curve([run.top1_curve for run in s.runs]) for s in settings}
    if any(len(curve) > 1 for curve in accuracies.values()):
        figures.append(curves(accuracies, x="epoch", y="validation top-1 %"))
    return figures


def _mean_curve(runs: Sequence[Curve]) -> Curve:
    """Mean over seeds, as far as all of them go."""
    return [(points[0][0], mean(p[1] for p in points)) for points in zip(*runs, strict=False)]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
