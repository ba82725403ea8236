"""Command line of the demo: ``python -m demo``, or ``make demo``."""

import sys
from collections.abc import Sequence
from pathlib import Path

import tyro
from rich.console import Console

from demo.findings import findings
from demo.job import run_demo
from demo.settings import FULL, QUICK
from demo.table import facts, rich_table
from feature_store.errors import UserError


def demo(out: Path = Path("demo/out"), quick: bool = False) -> None:
    """Distil a small student from one teacher pass, on scikit-learn's handwritten digits.

    Args:
        out: Where data, store, runs, results.json and report.html go.
        quick: Rehearse with tiny sizes, in under a minute; the accuracies then mean nothing.
    """
    console = Console()
    results = run_demo(out, QUICK if quick else FULL, console)
    console.print(rich_table(results))
    for name, value in facts(results).items():
        console.print(f"[bold]{name}[/bold]: {value}", highlight=False)
    console.print("\n[bold]What the numbers show[/bold]")
    for sentence in findings(results):
        console.print(f"- {sentence}", highlight=False)
    console.print(f"\nReport: {out / 'report.html'}", highlight=False, soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    try:
        tyro.cli(demo, prog="python -m demo", args=argv, config=(tyro.conf.FlagCreatePairsOff,))
    except UserError as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
