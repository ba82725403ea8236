"""Figures of docs/results.md as SVG files."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_TEXT, _BLUE, _GREY = "#444444", "#0072b2", "#8c8c8c"  # readable on light and dark pages
_SERIES = (_BLUE, "#e69f00", "#009e73")
_STYLE: dict[str, Any] = {
    "axes.spines.top": False, "axes.spines.right": False, "font.size": 9.0, "legend.frameon": False,
    "svg.fonttype": "none", "text.color": _TEXT, "axes.labelcolor": _TEXT, "xtick.color": _TEXT, "ytick.color": _TEXT,
    "axes.edgecolor": _TEXT,
}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """A setting in a figure.

    Attributes:
        setting: Its name in the sweep.
        name: Its label.
        values: Top-1 of every seed, in percent.
        low: Lower end of the interval of the difference to the baseline; None without one.
        high: Upper end.
        difference: Mean difference to the baseline; None for the baseline itself.
    """

    setting: str
    name: str
    values: tuple[float, ...]
    difference: float | None = None
    low: float | None = None
    high: float | None = None


def accuracy_figure(path: Path, points: Sequence[Point]) -> None:
    """Every seed as a dot, the mean as a line, a row per setting."""
    with _figure(path, height=0.8 + 0.34 * len(points)) as axes:
        for row, point in enumerate(points):
            mean = sum(point.values) / len(point.values)
            axes.plot([mean, mean], [row - 0.3, row + 0.3], color=_BLUE, linewidth=2)
            axes.plot(point.values, [row] * len(point.values), "o", color=_BLUE, markersize=4, alpha=0.6)
        axes.set_yticks(range(len(points)), [point.name for point in points])
        axes.invert_yaxis()
        axes.set_xlabel("top-1 %, one dot per seed, line: mean")
        axes.grid(visible=True, axis="x", alpha=0.3)


def difference_figure(path: Path, points: Sequence[Point], baseline: str) -> None:
    """Differences to a baseline with their intervals, in the order given, from left to right."""
    known = [(point, point.difference) for point in points if point.difference is not None]
    with _figure(path, height=2.8) as axes:
        axes.axhline(0, color=_GREY, linewidth=1)
        for column, (point, difference) in enumerate(known):
            if point.low is not None and point.high is not None:
                axes.plot([column, column], [point.low, point.high], color=_BLUE, linewidth=2, alpha=0.6)
            axes.plot(column, difference, "o", color=_BLUE)
        axes.set_xticks(range(len(known)), [point.name for point, _ in known])
        axes.set_ylabel(f"top-1 points over '{baseline}',\n95 % interval over seeds", parse_math=False)
        axes.grid(visible=True, axis="y", alpha=0.3)


def cosine_figure(path: Path, settings: Sequence[str], cosines: dict[str, Sequence[float | None]]) -> None:
    """Mean cosine of projected and teacher's maps, a row per setting and a colour per view path; None: not trained."""
    with _figure(path, height=0.8 + 0.34 * len(settings)) as axes:
        for (name, values), colour in zip(cosines.items(), _SERIES, strict=False):
            known = [(value, row) for row, value in enumerate(values) if value is not None]
            axes.plot([value for value, _ in known], [row for _, row in known], "o", color=colour, label=name)
        axes.set_yticks(range(len(settings)), settings)
        axes.set_ylim(len(settings) - 0.5, -0.5)
        axes.set_xlabel("mean cosine to the teacher's map in the last epoch")
        axes.grid(visible=True, axis="x", alpha=0.3)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def spectrum_figure(path: Path, energies: dict[str, Sequence[float]]) -> None:
    """Magnitude per spatial frequency, by teacher; frequencies are grouped by the larger of their two indices."""
    with _figure(path, height=2.6) as axes:
        for (name, values), colour in zip(energies.items(), _SERIES, strict=False):
            axes.plot(range(len(values)), values, "o-", color=colour, label=name)
        axes.set_xticks(range(max(map(len, energies.values()))))
        axes.set(xlabel="spatial frequency (0: mean over the map)", ylabel="mean magnitude", yscale="log")
        axes.grid(visible=True, alpha=0.3)
        axes.legend()


@contextmanager
def _figure(path: Path, height: float) -> Iterator[Axes]:
    with mpl.rc_context(mpl.RcParams({**_STYLE, "svg.hashsalt": path.name})):
        figure = Figure(figsize=(7, height), layout="constrained")
        axes = figure.subplots()
        yield axes
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", transparent=True, metadata={"Date": None})
