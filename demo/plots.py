"""The report's plots as PNG bytes, each for a light and a dark page."""

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from demo.results import Results
from demo.students import METHODS, SettingResult

# Okabe and Ito's colours, told apart by colour-blind readers too
COLOURS = dict(
    zip(
        [method.label for method in METHODS],
        ("#8c8c8c", "#e69f00", "#56b4e9", "#009e73", "#cc79a7"),
        strict=True,
    )
)
_SMOOTHED_STEPS = 10
_DPI = 144


@dataclass(frozen=True)
class Theme:
    """Colours of text and lines on one kind of page; the plots themselves are transparent."""

    text: str
    faint: str


LIGHT = Theme(text="#1f2328", faint="#d0d7de")
DARK = Theme(text="#e6edf3", faint="#3d444d")

Plot = Callable[[Theme], bytes]


def png(figure: Figure) -> bytes:
    """A figure as a PNG with a transparent ground."""
    encoded = BytesIO()
    figure.savefig(encoded, format="png", dpi=_DPI, transparent=True, bbox_inches="tight")
    return encoded.getvalue()


def themed(theme: Theme) -> "mpl.RcParams":
    """Matplotlib settings of a theme, for ``matplotlib.rc_context``."""
    text = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), theme.text)
    lines = {"axes.edgecolor": theme.faint, "grid.color": theme.faint}
    plain = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9.0, "legend.frameon": False}
    return mpl.RcParams({**text, **lines, **plain})


def accuracy_bars(results: Results, theme: Theme) -> bytes:
    """Mean accuracy per method as bars, every seed as a dot, the teacher as a line."""
    with mpl.rc_context(themed(theme)):
        figure = Figure(figsize=(8, 3.4), layout="constrained")
        for axes, labels in zip(figure.subplots(1, 2, sharey=True), ("few", "all"), strict=True):
            _bars(axes, results.with_labels(labels), results.teacher.top1, theme)
        figure.axes[0].set_ylim(_floor(results), 100.5)
        figure.axes[0].set_ylabel(f"test top-1 % (axis starts at {_floor(results)})")
        return png(figure)


def _bars(axes: Axes, settings: list[SettingResult], teacher: float, theme: Theme) -> None:
    for x, setting in enumerate(settings):
        axes.bar(x, setting.mean, width=0.7, color=COLOURS[setting.method])
        axes.annotate(  # at the bar's foot, clear of the dots
            f"{setting.mean:.1f}", (x, 0), (0, 4), xycoords=("data", "axes fraction"), textcoords="offset points",
            ha="center", color="black",
        )  # fmt: skip
        spots = np.linspace(-0.15, 0.15, len(setting.top1)) if len(setting.top1) > 1 else [0.0]
        axes.plot(x + np.asarray(spots), setting.top1, "o", markersize=4, color=theme.text, markeredgecolor="white")
    axes.axhline(teacher, linestyle="--", linewidth=1, color=theme.text)
    axes.annotate(f"teacher {teacher:.1f}", (-0.4, teacher), (0, 3), textcoords="offset points", va="bottom")
    axes.set_xticks(range(len(settings)), [setting.method.replace(" ", "\n", 1) for setting in settings])
    axes.set_title(_title(settings[0]))


def _title(setting: SettingResult) -> str:
    seeds = f"{len(setting.seeds)} seeds" if len(setting.seeds) > 1 else "1 seed"
    return f"{setting.labels} labels: {setting.images:,} images, {seeds}"


def _floor(results: Results) -> int:
    """Where the accuracy axis starts: the ten below every dot, with room to see the lowest bar."""
    return max(0, int(min(min(setting.top1) for setting in results.settings) - 5) // 10 * 10)


def loss_curves(results: Results, theme: Theme) -> bytes:
    """Cross entropy with the labels over steps, unweighted, mean over seeds and smoothed."""
    with mpl.rc_context(themed(theme)):
        figure = Figure(figsize=(8, 3.2), layout="constrained")
        for axes, labels in zip(figure.subplots(1, 2, sharey=True), ("few", "all"), strict=True):
            for setting in results.with_labels(labels):
                _curve(axes, setting)
            axes.set_title(_title(results.with_labels(labels)[0]))
            axes.set_xlabel("step")
            axes.grid(visible=True, alpha=0.5)
        figure.axes[0].set_ylabel("cross entropy (training)")
        figure.axes[0].legend()
        return png(figure)


def _curve(axes: Axes, setting: SettingResult) -> None:
    losses = np.mean(setting.curves, axis=0)
    window = min(_SMOOTHED_STEPS, len(losses) // 2)
    smooth = np.convolve(losses, np.full(window, 1 / window), mode="valid")
    steps = np.arange(len(smooth)) + window
    dashed = "--" if "live" in setting.method else "-"
    axes.plot(steps, smooth, dashed, label=setting.method, color=COLOURS[setting.method], linewidth=1.6)
