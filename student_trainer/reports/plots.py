"""Plots as SVG elements in the text colour of their page."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from io import StringIO
from typing import TYPE_CHECKING, Any

from markupsafe import escape

if TYPE_CHECKING:  # an optional extra, and slow to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = Sequence[tuple[float, float]]  # (x, y) points

# Okabe and Ito's colours, told apart by colour-blind readers too
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b8a800", "#8c8c8c")
_DASHES = ("-", "--", ":")  # for more curves than colours
_TEXT = "#010203"  # stands for the page's text colour, see _to_svg


def can_plot() -> bool:
    """Whether matplotlib is installed (``pip install 'scalekd-cache[report]'``)."""
    return find_spec("matplotlib") is not None


def curves(series: Mapping[str, Curve], *, x: str, y: str, log: bool = False) -> str:
    """Lines over a common axis, as an SVG element.

    Args:
        series: Points by name.
        x: Label of the x axis.
        y: Label of the y axis.
        log: Logarithmic y axis.
    """
    with _figure(height=3.0) as (figure, axes):
        for i, (name, points) in enumerate(series.items()):
            style: dict[str, Any] = {"color": _COLOURS[i % len(_COLOURS)], "linestyle": _dash(i)}
            marker = "o" if len(points) == 1 else None
            axes.plot([p[0] for p in points], [p[1] for p in points], label=name, marker=marker, **style)
        axes.set(xlabel=x, ylabel=y, yscale="log" if log else "linear")
        axes.grid(visible=True, alpha=0.3)
        if len(series) > 1:
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        return _to_svg(figure, f"{y} over {x}")


def bars(groups: Mapping[str, Sequence[float]], *, x: str) -> str:
    """A bar per group up to the mean of its values, every value as a dot, as an SVG element."""
    with _figure(height=0.7 + 0.38 * len(groups)) as (figure, axes):
        names = list(groups)
        for row, (name, values) in enumerate(groups.items()):
            if values:
                mean = sum(values) / len(values)
                axes.barh(row, mean, height=0.65, color=_COLOURS[row % len(_COLOURS)], alpha=0.75)
                offsets = [row + 0.2 * (i - (len(values) - 1) / 2) / len(values) for i in range(len(values))]
                axes.plot(values, offsets, "o", markersize=4, color=_TEXT, label=name)
        known = [value for values in groups.values() for value in values]
        low, high = _range(known)
        axes.set(xlabel=f"{x} (axis starts at {low:g})" if low else x, xlim=(low, high))
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        return _to_svg(figure, f"{x} of {', '.join(names)}")


def _range(values: Sequence[float]) -> tuple[float, float]:
    """An axis that shows differences between bars: it starts well below the lowest dot, at a round number."""
    low, high = min(values), max(values)
    margin = max(high - low, 0.02 * abs(high), 0.1)
    step = 10.0 if margin > 4 else 1.0
    return max(0.0, (low - margin) // step * step), high + 0.1 * margin


def _dash(i: int) -> str:
    return _DASHES[i // len(_COLOURS) % len(_DASHES)]


@contextmanager
def _figure(height: float) -> "Iterator[tuple[Figure, Axes]]":
    """An empty figure in this module's style; height in inches."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    coloured = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor", "grid.color")
    plain = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9.0, "legend.frameon": False}
    plain["text.parse_math"] = False  # names of settings are shown as they are, $ and all
    # text stays text: small files, searchable, in the page's font
    with mpl.rc_context(mpl.RcParams({**dict.fromkeys(coloured, _TEXT), **plain, "svg.fonttype": "none"})):
        figure = Figure(figsize=(8, height), layout="constrained")
        yield figure, figure.subplots()


def _to_svg(figure: "Figure", description: str) -> str:
    """The figure as an inline ``<svg>``, black text and lines turned into the page's own colour."""
    import matplotlib as mpl

    encoded = StringIO()
    mpl.rcParams["svg.hashsalt"] = description  # the same figure gives the same bytes; two on a page share no id
    figure.savefig(encoded, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    drawn = encoded.getvalue()
    drawn = drawn[drawn.index("<svg") :].replace(_TEXT, "currentColor")
    return drawn.replace("<svg", f'<svg role="img" aria-label="{escape(description)}"', 1)
