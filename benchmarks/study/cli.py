"""Command line of the study: ``python -m benchmarks.study``."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import tyro

from benchmarks.study import networks  # noqa: F401 - spawned runs import this module, and build the teacher's tail
from benchmarks.study.data import prepare_images
from benchmarks.study.questions import QUESTIONS
from benchmarks.study.results import RESULTS, write_made, write_question
from benchmarks.study.stores import Workshop
from benchmarks.study.sweeps import finished_runs, run_question
from benchmarks.study.tiers import TIERS
from feature_store.errors import InputError, UserError

app = tyro.extras.SubcommandApp()


TierName = Literal["cpu", "cpu-10k", "gpu", "tiny"]


@app.command
def run(
    data: Path,
    out: Path,
    only: tuple[str, ...] = (),
    seeds: tuple[int, ...] = (),
    tier: TierName = "cpu",
    results: Path | None = None,
    processes: int | None = None,
) -> None:
    """Train what is missing, question by question and seed by seed; the same command continues after an interruption.

    Args:
        data: Folder of webdataset tars of 32 px images, ``*train*.tar*`` and ``*val*.tar*``.
        out: Folder of teachers, stores and runs.
        only: Names of the questions to run, in this order; default all, the most valuable first.
        seeds: Seeds instead of the tier's.
        tier: Sizes: cpu (hours on two cores), cpu-10k (four times the steps), gpu (one large GPU), tiny (a rehearsal).
        results: Folder of the JSON files; default results/TIER beside this module.
        processes: Runs at a time instead of the tier's.
    """
    known = {question.name: question for question in QUESTIONS}
    if unknown := [name for name in only if name not in known]:
        raise InputError(f"--only has {', '.join(unknown)}, expected some of {', '.join(known)}")
    workshop, folder = _workshop(data, out, tier, processes), results or RESULTS / tier
    for question in (known[name] for name in only or known):
        print(question.name, flush=True)
        write_question(folder, question, run_question(question, seeds or workshop.tier.seeds, workshop))
        write_made(folder, workshop)


@app.command
def collect(data: Path, out: Path, tier: TierName = "cpu", results: Path | None = None) -> None:
    """Write the JSON files of what is finished, also while ``run`` is at work or after it was stopped.

    Args:
        data: As given to run.
        out: As given to run.
        tier: As given to run.
        results: As given to run.
    """
    workshop, folder = _workshop(data, out, tier), results or RESULTS / tier
    for question in QUESTIONS:
        if (found := finished_runs(question, workshop.tier.seeds, workshop)) is not None:
            write_question(folder, question, found)
    write_made(folder, workshop)


def _workshop(data: Path, out: Path, tier: str, processes: int | None = None) -> Workshop:
    sizes = replace(TIERS[tier], processes=processes or TIERS[tier].processes)
    return Workshop(out, sizes, prepare_images(data, out / tier / "images", sizes))


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
