"""Building blocks of self-contained HTML reports."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from feature_store.tools.terminal import printable
from student_trainer.reports.plots import can_plot


def _shown(value: Any) -> Any:
    """Text of a template's expression; names may hold control characters, and what has no form in UTF-8."""
    return value if isinstance(value, Markup) else printable(str(value))


_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent), autoescape=True, finalize=_shown, undefined=StrictUndefined
)


def _render(template: str, **values: Any) -> Markup:
    return Markup(_TEMPLATES.get_template(template).render(values))  # nosec B704 # autoescape is on


def page(title: str, lead: str, sections: Mapping[str, Sequence[Markup]]) -> str:
    """A whole page: the parts of every section under its heading."""
    return str(_render("page.html", title=title, lead=lead, sections=sections))


def plots_or_note(draw: Callable[[], Sequence[str]]) -> list[Markup]:
    """Figures from SVG elements, or what to install for them."""
    if not can_plot():
        install = "pip install 'scalekd-cache[report]'"
        return [Markup(f'<p class="note">Plots need matplotlib: <code>{install}</code>.</p>')]  # nosec B704 # constant
    return [Markup(f"<figure>{figure}</figure>") for figure in draw()]  # nosec B704 # SVG from matplotlib, which escapes


def key_value_table(values: Mapping[str, Any]) -> Markup:
    """A table of two columns: names and values."""
    return _render("key_values.html", values=values)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> Markup:
    """A table of text cells under a caption."""
    return _render("table.html", columns=columns, rows=rows, caption=caption)
