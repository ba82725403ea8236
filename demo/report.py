"""The report: one HTML file that needs nothing else."""

import base64
from collections.abc import Callable
from html import escape
from pathlib import Path
from string import Template

from demo.feature_maps import FeatureMaps, feature_map_rows
from demo.findings import findings
from demo.plots import DARK, LIGHT, Theme, accuracy_bars, loss_curves
from demo.results import Results
from demo.students import PROCESSES
from demo.table import COLUMNS, TEXT_COLUMNS, facts, rows

_TEMPLATE = Path(__file__).with_name("report.html")


def write_report(path: Path, results: Results, maps: FeatureMaps) -> None:
    """Fill the template."""
    title = "One teacher pass, many students: handwritten digits"
    page = Template(_TEMPLATE.read_text()).substitute(
        title=title,
        lead=_lead(results),
        findings="\n".join(f"<li>{escape(sentence)}</li>" for sentence in findings(results)),
        processes=PROCESSES,
        head="".join(_cell("th", i, column, ' scope="col"') for i, column in enumerate(COLUMNS)),
        rows=_rows(results),
        facts="\n".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts(results).items()),
        accuracy=_picture("Test accuracy per method", lambda theme: accuracy_bars(results, theme)),
        loss=_picture("Training cross entropy over steps", lambda theme: loss_curves(results, theme)),
        maps=_picture("Views of digits above the teacher's maps of them", lambda theme: feature_map_rows(maps, theme)),
        variance=f"{maps.variance:.0%}",
        software=escape(", ".join(f"{name} {version}" for name, version in results.software.items())),
    )
    path.write_text(page)


def _lead(results: Results) -> str:
    return escape(
        f"A teacher was trained on scikit-learn's digits and run once over {results.store.views} augmented views of "
        f"each training image; its features went into a store. The same small student was then trained in "
        f"{len(results.settings)} settings."
    )


def _rows(results: Results) -> str:
    lines, previous = [], results.settings[0].labels
    for setting, cells in zip(results.settings, rows(results), strict=True):
        section = "" if setting.labels == previous else ' class="section"'
        previous = setting.labels
        lines.append(f"<tr{section}>{''.join(_cell('td', i, cell) for i, cell in enumerate(cells))}</tr>")
    return "\n".join(lines)


def _cell(tag: str, column: int, text: str, attributes: str = "") -> str:
    kind = ' class="text"' if column < TEXT_COLUMNS else ""
    return f"<{tag}{kind}{attributes}>{escape(text)}</{tag}>"


def _picture(description: str, plot: Callable[[Theme], bytes]) -> str:
    """A plot that follows the page's light or dark scheme."""
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{_data_url(plot(DARK))}">'
        f'<img src="{_data_url(plot(LIGHT))}" alt="{escape(description)}"></picture>'
    )


def _data_url(image: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"
