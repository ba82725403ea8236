"""Command line of the trainer: train, evaluate, export."""

import json as json_module
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from feature_store.cli import run
from student_trainer.config import TrainConfig
from student_trainer.evaluate import EvaluateConfig
from student_trainer.evaluate import evaluate as run_evaluate
from student_trainer.export import ExportConfig
from student_trainer.export import export as run_export
from student_trainer.train import train as run_train

app = tyro.extras.SubcommandApp()

Flat = tyro.conf.OmitArgPrefixes  # --store rather than --config.store


@app.command
def train(config: Annotated[TrainConfig, tyro.conf.arg(name="")], json: bool = False) -> None:
    """Train a student against a store, a live teacher, or no teacher at all.

    Args:
        config: The run.
        json: Print the result as JSON on stdout.
    """
    result = run_train(config)
    if json:
        _print_json(asdict(result))
        return
    _print_table(
        f"run {result.run}",
        {
            "best top-1": _percent(result.best_top1),
            "last top-1": _percent(result.last_top1),
            "steps": result.steps,
            "seconds per step": "-" if result.seconds_per_step is None else f"{result.seconds_per_step:.4f}",
            "teacher seconds": f"{result.teacher_seconds:.1f}",
        },
    )


@app.command
def evaluate(config: Annotated[EvaluateConfig, tyro.conf.arg(name="")], json: bool = False) -> None:
    """Print a trained student's top-1 and top-5 accuracy on a tar set.

    Args:
        config: What to evaluate.
        json: Print JSON instead of a table.
    """
    accuracy = run_evaluate(config)
    if json:
        _print_json(asdict(accuracy))
        return
    rows = {
        "top-1": _percent(accuracy.top1),
        "top-5": _percent(accuracy.top5),
        "samples": accuracy.samples,
        "unreadable": len(accuracy.unreadable),
    }
    _print_table(str(config.run or config.checkpoint), rows)
    for line in accuracy.unreadable:
        Console(stderr=True).print(f"unreadable: {line}", markup=False, highlight=False)


@app.command
def export(config: Annotated[ExportConfig, tyro.conf.arg(name="")], json: bool = False) -> None:
    """Write a trained student as a plain timm checkpoint, and as ONNX if asked.

    Args:
        config: What to export.
        json: Print JSON instead of text.
    """
    files = [str(path) for path in run_export(config)]
    if json:
        _print_json({"files": files})
    else:
        print("\n".join(files))


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} %"


def _print_table(title: str, rows: dict[str, Any]) -> None:
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in rows.items():
        table.add_row(name, str(value))
    Console().print(table)


def _print_json(values: dict[str, Any]) -> None:
    print(json_module.dumps(values, indent=2, default=str))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``student-trainer``."""
    return run(app, "student-trainer", argv)
