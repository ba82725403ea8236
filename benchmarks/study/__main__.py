"""Command line of the study: ``python -m benchmarks.study``."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro

from benchmarks.study import networks  # noqa: F401 - spawned runs import this module, and build the teacher's tail
from benchmarks.study.data import prepare_images
from benchmarks.study.pieces import run_piece
from benchmarks.study.questions import QUESTIONS
from benchmarks.study.results import RESULTS, write_made, write_question
from benchmarks.study.stores import Workshop
from benchmarks.study.tiers import TIERS
from feature_store.errors import InputError, UserError

app = tyro.extras.SubcommandApp()


@app.command
def run(
    data: Path,
    out: Path,
    only: tuple[str, ...] = (),
    seeds: tuple[int, ...] = (),
    tier: Literal["cpu", "gpu", "tiny"] = "cpu",
    results: Path | None = None,
) -> None:
    """Train what is missing, question by question and seed by seed; the same command goes on after an interruption.

    Args:
        data: Folder of webdataset tars of 32 px images, ``*train*.tar*`` and ``*val*.tar*``.
        out: Folder of teachers, stores and runs.
        only: Names of the questions to run, in this order; default all, the most valuable first.
        seeds: Seeds instead of the tier's.
        tier: Sizes: cpu (hours on two cores), gpu (minutes on one large GPU), tiny (a rehearsal).
        results: Folder of the JSON files; default results/TIER beside this module.
    """
    sizes = TIERS[tier]
    folder = results or RESULTS / tier
    known = {question.name: question for question in QUESTIONS}
    if unknown := [name for name in only if name not in known]:
        raise InputError(f"--only has {', '.join(unknown)}, expected some of {', '.join(known)}")
    workshop = Workshop(out / tier, sizes, prepare_images(data, out / tier / "images", sizes))
    asked = seeds or sizes.seeds
    for question in (known[name] for name in only or known):
        for count in range(1, len(asked) + 1):
            print(f"{question.name}: seeds {', '.join(map(str, asked[:count]))}", flush=True)
            comparison = run_piece(question, asked[:count], workshop)
            write_question(folder, question, comparison)
            write_made(folder, workshop)


@app.command
def report() -> None:
    """Write docs/results.md and its figures from the committed JSON files."""
    from benchmarks.study.report import write_report

    write_report(RESULTS, Path(__file__).parents[2] / "docs")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    try:
        app.cli(prog="python -m benchmarks.study", args=argv)
    except UserError as error:
        print(f"study: error: {error}", file=sys.stderr)
        for note in getattr(error, "__notes__", ()):
            print(note, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
