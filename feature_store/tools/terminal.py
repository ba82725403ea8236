"""Terminal output that escapes control characters of foreign text.

Sample keys, tar names, licence notes and errors come from files of others: no control character of theirs reaches the
terminal, and square brackets are no markup. Everything the three programs print goes through here.
"""

import json
import logging
import sys
from typing import Any

import rich.console
import rich.progress
from rich.text import Text


def printable(text: str) -> str:
    r"""Text on one line: control characters, line ends, bidirectional overrides and lone surrogates as ``\x1b``."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class Console(rich.console.Console):  # noqa: TID251 - the one place
    """A rich console whose strings, also those in tables, are text: printable, without markup."""

    def render_str(self, text: str, *, style: Any = "", justify: Any = None, overflow: Any = None, **_: Any) -> Text:
        """Text of a string, without markup."""
        return Text(printable(text), style=style, justify=justify, overflow=overflow)


class ProgressBar(rich.progress.Progress):
    """A rich progress bar that prints nothing if it is disabled; rich before 15 then ends with an empty line."""

    def stop(self) -> None:
        """Stop it and leave its last state, if it is shown."""
        if not self.disable:
            super().stop()


class LogFormatter(logging.Formatter):
    """A formatter of log lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """The line."""
        return printable(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's name
        """The traceback below it."""
        return "\n".join(map(printable, super().formatException(ei).split("\n")))


def say(*lines: str, error: bool = False) -> None:
    """Print lines.

    Args:
        *lines: The lines.
        error: To stderr.
    """
    for line in lines:
        print(printable(line), file=sys.stderr if error else sys.stdout, flush=True)


def say_json(value: Any, indent: int | None = None) -> None:
    """Print a value as JSON, see json_text."""
    print(json_text(value, indent), flush=True)  # noqa: T201


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON in printable ASCII; what JSON has no form for, as text."""
    return json.dumps(value, indent=indent, default=str).replace("\x7f", "\\u007f")
