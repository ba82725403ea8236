"""Plots of a store's features.

Shape legend: n rows, H W grid, N = H*W tokens, C channels.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from feature_store.errors import InputError
from feature_store.inputs.base import SampleSource
from feature_store.inputs.open import open_sources
from feature_store.inputs.options import DEFAULT, TarOptions
from feature_store.tools.features import (
    INSTALL,
    ChannelProfile,
    channel_profile,
    frequency_energy,
    principal_colours,
    replay_views,
)
from feature_store.tools.options import make_folder
from feature_store.tools.row_subset import pick, sampled_shards
from feature_store.tools.terminal import printable

if TYPE_CHECKING:
    from jinja2 import Template
    from matplotlib.figure import Figure

    from feature_store.store import Store

PAGE = "index.html"
_DPI = 150
_INK, _ACCENT, _SOFT = "#1b1f24", "#c2410c", "#2f6f9f"
_STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8b949e",
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "figure.facecolor": "white",
}


@dataclass(frozen=True)
class Picture:
    """One figure of the page.

    Attributes:
        name: File name without ending.
        title: Heading.
        caption: Content, and how to read it.
        figure: The figure.
    """

    name: str
    title: str
    caption: str
    figure: "Figure"


def plot(
    store: "Store",
    out: Path,
    tars: Sequence[str] = (),
    *,
    tap: str = "stage4",
    rows: int = 256,
    thumbnails: int = 8,
    seed: int = 0,
    tar_options: TarOptions = DEFAULT,
) -> list[Path]:
    """Draw a tap's features.

    Args:
        store: The store.
        out: Folder for the files; made if needed.
        tars: The store's tars, for the thumbnails; without them that picture is left out.
        tap: The tap to draw.
        rows: Rows to average over.
        thumbnails: Views to show.
        seed: Chooses rows and views.
        tar_options: Options for opening tars.

    Returns:
        The files written, the page last.

    Raises:
        InputError: matplotlib or scipy is missing, the tap has no grid, the store has no rows, or out is a file.
        MismatchError: A tar or a view's pixels are not those of the store.
    """
    pyplot = _pyplot()
    grid, rng = _grid(store, tap), np.random.default_rng(seed)
    chosen = pick(np.concatenate(sampled_shards(store, rng)), rows, rng)
    features_nNC = store.source([tap]).read(chosen).taps[tap].astype(np.float32)
    energy_HW, profile = frequency_energy(features_nNC, grid), channel_profile(features_nNC)
    opened = open_sources(tars, tar_options, written=store.manifest.inputs).sources if tars else []
    shown = pick(_with_tars(store, chosen, opened), thumbnails, rng) if tars else chosen[:0]
    pixels = replay_views(store, opened, shown) if tars else None
    with pyplot.rc_context(_STYLE):
        pictures = [_frequency_picture(energy_HW, len(chosen)), _channel_picture(profile, len(chosen))]
        if pixels is not None:
            values = store.source([tap]).read(shown).taps[tap].astype(np.float32)
            colours = principal_colours(values, grid, features_nNC)
            names = [f"{unit}/{position} v{view}" for unit, position, view in shown]
            pictures.append(_view_picture(pixels, colours, names))
        make_folder(out, "--out")
        files = [_save(picture, out) for picture in pictures]
    for picture in pictures:
        pyplot.close(picture.figure)
    page = out / PAGE
    page.write_text(_page(store, tap, pictures, files, len(chosen)), encoding="utf-8")
    return [*files, page]


def _pyplot() -> Any:
    try:
        import matplotlib as mpl

        mpl.use("agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise InputError(f"plots need matplotlib, which is not installed; {INSTALL}") from error
    return pyplot


def _grid(store: "Store", tap: str) -> tuple[int, int]:
    manifest = store.manifest
    grids = {"stage4": manifest.split.output_grid, "stage3": manifest.split.input_grid}
    drawable = [name for name in manifest.taps if name in grids]
    if tap not in drawable:
        raise InputError(
            f"tap {tap!r} cannot be drawn: the store has {', '.join(drawable)} on a grid; choose with --tap"
        )
    return grids[tap]


def _with_tars(store: "Store", rows: np.ndarray, tars: Sequence[SampleSource]) -> np.ndarray:
    """Rows whose tars were given, or tars of the same names, spread over the rows."""
    infos, hashes, given = store.manifest.tars, {tar.header_sha256 for tar in tars}, {tar.name for tar in tars}
    names = [tar.name for tar in infos]
    same = [infos[unit].header_sha256 in hashes for unit in rows[:, 0]]
    found = rows[same if any(same) else [names[unit] in given for unit in rows[:, 0]]]
    if not len(found):
        raise InputError(
            f"none of the rows drawn is in the tars given ({', '.join(sorted(given))}); the store was written from "
            f"{', '.join(names[:3])}{'...' if len(names) > 3 else ''}: give those with --tars"
        )
    return found


def _frequency_picture(energy_HW: np.ndarray, rows: int) -> Picture:
    pyplot = _pyplot()
    figure = pyplot.figure(figsize=(10, 4.4), layout="constrained")
    surface, flat = figure.add_subplot(1, 2, 1, projection="3d"), figure.add_subplot(1, 2, 2)
    from matplotlib.colors import LogNorm

    scale = LogNorm(energy_HW.min(), energy_HW.max())
    _surface(surface, energy_HW, scale)
    image = flat.imshow(energy_HW, cmap="viridis", norm=scale)
    height, width = energy_HW.shape
    flat.set(xlabel="horizontal frequency", ylabel="vertical frequency", title="Mean magnitude by frequency")
    flat.set(xticks=_ticks(width), yticks=_ticks(height))
    flat.spines[:].set_visible(False)
    if max(height, width) <= 10:
        _write_values(flat, energy_HW, scale)
    bar = figure.colorbar(image, ax=flat, shrink=0.8, label="mean magnitude, log scale")
    bar.outline.set_visible(False)
    _plain_numbers(bar.ax.yaxis)
    share = energy_HW[0, 0] / energy_HW.sum()
    others = np.delete(energy_HW.ravel(), 0)
    ratio = f", {energy_HW[0, 0] / others.mean():.1f} times the mean of the others" if len(others) else ""
    caption = (
        f"Magnitude of each spatial frequency of the feature maps (orthonormal DCT per channel), averaged over all "
        f"channels and {rows} rows. The direct component (0, 0) is {share:.0%} of the sum{ratio}. The alternative "
        "view path of ScaleKD removes exactly this component."
    )
    return Picture("frequency", "Energy by frequency", caption, figure)


def _surface(axes: Any, energy_HW: np.ndarray, scale: Any) -> None:
    rows, columns = np.mgrid[: energy_HW.shape[0], : energy_HW.shape[1]]
    if min(energy_HW.shape) > 1:
        axes.plot_surface(
            columns, rows, energy_HW, cmap="viridis", norm=scale, rcount=64, ccount=64, edgecolor="white", linewidth=0.3
        )
    axes.set(xlabel="horizontal", ylabel="vertical", zlabel="mean magnitude")
    axes.set(xticks=_ticks(energy_HW.shape[1]), yticks=_ticks(energy_HW.shape[0]))
    axes.view_init(elev=28, azim=40)
    axes.set_box_aspect(None, zoom=0.9)


def _plain_numbers(axis: Any) -> None:
    """0.6 and 20 on a logarithmic axis rather than powers of ten."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    low, high = axis.get_view_interval()
    wide = high / low > 50  # then the powers of ten are enough
    axis.set_major_formatter(Plain())
    axis.set_minor_formatter(Plain(labelOnlyBase=wide, minor_thresholds=(2, 0.5)))


def _ticks(size: int) -> list[int]:
    return list(range(0, size, max(1, size // 7)))


def _write_values(axes: Any, energy_HW: np.ndarray, scale: Any) -> None:
    for (row, column), value in np.ndenumerate(energy_HW):
        dark = scale(value) < 0.6
        axes.text(column, row, f"{value:.2g}", ha="center", va="center", fontsize=6.5, color="white" if dark else _INK)


def _channel_picture(profile: ChannelProfile, rows: int) -> Picture:
    pyplot = _pyplot()
    figure, (ranked, scatter) = pyplot.subplots(1, 2, figsize=(10, 3.9), layout="constrained")
    rank = np.arange(1, len(profile.mean) + 1)
    for values, label, colour in (
        (profile.largest, "largest magnitude", _ACCENT),
        (profile.rms, "root mean square", _SOFT),
        (profile.std, "standard deviation", "#6b7280"),
    ):
        ranked.plot(rank, np.sort(values)[::-1], label=label, color=colour, linewidth=1.5)
    ranked.set(xscale="log", yscale="log", xlabel="channels, each curve by its own rank", title="Channels by size")
    ranked.grid(alpha=0.25)
    ranked.legend(frameon=False)
    _plain_numbers(ranked.xaxis)
    _plain_numbers(ranked.yaxis)
    outliers = profile.outliers
    scatter.scatter(profile.mean, profile.std, s=9, color=_SOFT, alpha=0.55, linewidths=0)
    scatter.scatter(profile.mean[outliers], profile.std[outliers], s=22, color=_ACCENT)
    for channel in outliers[:10]:
        scatter.annotate(
            str(channel), (profile.mean[channel], profile.std[channel]), xytext=(4, 3), textcoords="offset points"
        )
    scatter.set(xlabel="mean", ylabel="standard deviation", yscale="log", title="Each channel's place and spread")
    scatter.grid(alpha=0.25)
    _plain_numbers(scatter.yaxis)
    named = ", ".join(map(str, outliers[:10])) + (" and more" if len(outliers) > 10 else "")
    heavy = (
        f"{len(outliers)} outlier channels ({named}) reach more than six times as far as the median channel: a scale "
        "per token alone would spend its range on them."
        if len(outliers)
        else "No channel reaches more than six times as far as the median channel."
    )
    caption = f"All {len(rank)} channels over {rows} rows and their tokens. {heavy}"
    return Picture("channels", "Channel profile", caption, figure)


def _view_picture(pixels_nHWC: np.ndarray, colours_nHWC: np.ndarray, labels: list[str]) -> Picture:
    pyplot = _pyplot()
    per_line = min(4, len(pixels_nHWC))
    lines = -(-len(pixels_nHWC) // per_line)
    figure = pyplot.figure(figsize=(2.5 * per_line, 1.4 * lines))
    columns = [1, 1, 0.12] * per_line  # a view, its features, a gap
    cells = figure.add_gridspec(
        lines, len(columns), width_ratios=columns, wspace=0.03, hspace=0.22, left=0.01, right=1.0, top=0.93, bottom=0.01
    )
    for index, (pixels, colours, label) in enumerate(zip(pixels_nHWC, colours_nHWC, labels, strict=True)):
        line, column = index // per_line, 3 * (index % per_line)
        view, features = (figure.add_subplot(cells[line, column + side]) for side in (0, 1))
        view.imshow(pixels)
        view.set_title(label, fontsize=7, pad=3)
        features.imshow(colours, interpolation="nearest")
        for axis in (view, features):
            axis.set_axis_off()
    caption = (
        "Views as the teacher saw them (unit/position and view; replayed, CRC checked), each beside its feature map: "
        "the three main directions of the standardised features over all rows drawn, as red, green and blue. The same "
        "colour means the same direction in every map."
    )
    return Picture("views", "Views and their features", caption, figure)


def _save(picture: Picture, out: Path) -> Path:
    path = out / f"{picture.name}.png"
    picture.figure.savefig(path, dpi=_DPI)
    return path


def _page(store: "Store", tap: str, pictures: Sequence[Picture], files: Sequence[Path], rows: int) -> str:
    manifest = store.manifest
    info = manifest.taps[tap]
    facts = {
        "store": store.objects.url,
        "teacher": manifest.teacher.name,
        "tap": f"{tap}: {info.tokens} tokens of {info.channels} channels, stored as {info.codec}",
        "views": f"{manifest.num_views} a sample, policy {manifest.policy.name}, seed {manifest.seed}",
        "rows drawn": f"{rows:,}",
        "manifest": manifest.fingerprint(),
    }
    return _template().render(
        title=printable(f"Features of {manifest.teacher.name}"),
        facts={name: printable(value) for name, value in facts.items()},
        pictures=[(picture, _base64(file)) for picture, file in zip(pictures, files, strict=True)],
    )


def _template() -> "Template":
    from jinja2 import Environment, PackageLoader

    return Environment(autoescape=True, loader=PackageLoader("feature_store.tools", "")).get_template("plot.html")


def _base64(file: Path) -> str:
    return base64.b64encode(file.read_bytes()).decode()
