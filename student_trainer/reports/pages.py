"""Building blocks of HTML reports that need nothing beside them."""

import html
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from feature_store.tools.terminal import printable
from student_trainer.reports.plots import can_plot

_PAGE = Path(__file__).with_name("page.html")


def escape(text: str) -> str:
    """Text as HTML; names may hold control characters, and what has no form in UTF-8."""
    return html.escape(printable(text))


def plots_or_note(draw: Callable[[], Sequence[str]]) -> list[str]:
    """Figures, or what to install for them."""
    if not can_plot():
        return ['<p class="note">Plots need matplotlib: <code>pip install .[report]</code>.</p>']
    return [f"<figure>{figure}</figure>" for figure in draw()]


def page(title: str, lead: str, body: Sequence[str]) -> str:
    """A whole page; title and lead are text, the body HTML."""
    return Template(_PAGE.read_text()).substitute(title=escape(title), lead=escape(lead), body="\n".join(body))


def section(title: str, *parts: str) -> str:
    """A heading over HTML."""
    return f"<h2>{escape(title)}</h2>\n" + "\n".join(parts)


def words(values: Mapping[str, Any]) -> str:
    """A table of two columns: names and values."""
    rows = "".join(f"<tr><td>{escape(str(k))}</td><td>{escape(str(v))}</td></tr>" for k, v in values.items())
    return f'<table class="words">{rows}</table>'


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """A table of text cells; the caption is text too."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    lines = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    above = f"<caption>{escape(caption)}</caption>" if caption else ""
    table = f"<table>{above}<thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"
    return f'<div class="scroll" tabindex="0" role="region" aria-label="table">{table}</div>'
