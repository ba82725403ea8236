"""The report: one HTML file that needs nothing else."""

import base64
from collections.abc import Iterator, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from demo.feature_maps import FeatureMaps, feature_map_rows
from demo.findings import findings
from demo.plots import DARK, LIGHT, Plot, accuracy_bars, loss_curves
from demo.results import Results
from demo.students import PROCESSES
from demo.table import COLUMNS, TEXT_COLUMNS, facts, rows

_TEMPLATES = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)


def write_report(path: Path, results: Results, maps: FeatureMaps) -> None:
    """Fill the template."""
    page = _TEMPLATES.get_template("report.html").render(
        title="One teacher pass, many students: handwritten digits",
        lead=_lead(results),
        findings=findings(results),
        processes=PROCESSES,
        columns=COLUMNS,
        text_columns=TEXT_COLUMNS,
        rows=list(_rows(results)),
        facts=facts(results),
        accuracy=_themes(lambda theme: accuracy_bars(results, theme)),
        loss=_themes(lambda theme: loss_curves(results, theme)),
        maps=_themes(lambda theme: feature_map_rows(maps, theme)),
        variance=f"{maps.variance:.0%}",
        software=", ".join(f"{name} {version}" for name, version in results.software.items()),
    )
    path.write_text(page + "\n")


def _lead(results: Results) -> str:
    return (
        f"A teacher was trained on scikit-learn's digits and run once over {results.store.views} augmented views of "
        f"each training image; its features went into a store. The same small student was then trained in "
        f"{len(results.settings)} settings."
    )


def _rows(results: Results) -> Iterator[tuple[bool, Sequence[str]]]:
    """Cells of every row, with whether a section of the table begins there."""
    previous = results.settings[0].labels
    for setting, cells in zip(results.settings, rows(results), strict=True):
        yield setting.labels != previous, cells
        previous = setting.labels


def _themes(plot: Plot) -> dict[str, str]:
    """A plot's URLs for a light and a dark page."""
    return {"light": _data_url(plot(LIGHT)), "dark": _data_url(plot(DARK))}


def _data_url(image: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"
