"""Command line of the trainer: train, presets, evaluate, export, compare."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.table import Table

from feature_store.errors import InputError
from feature_store.tools.command_line import run
from feature_store.tools.terminal import Console, say, say_json
from student_trainer.config import TrainConfig, config_to_dict
from student_trainer.engine.distributed import OtherProcessError, is_main_process
from student_trainer.evaluate import Accuracy, EvaluateConfig
from student_trainer.evaluate import evaluate as run_evaluate
from student_trainer.export import ExportConfig
from student_trainer.export import export as run_export
from student_trainer.recipes import PRESETS, preset_rows
from student_trainer.sweeps.compare import CompareConfig
from student_trainer.sweeps.compare import compare as run_compare
from student_trainer.sweeps.report import comparison_columns, comparison_rows
from student_trainer.train import train as run_train

if TYPE_CHECKING:
    PresetName = str
else:
    PresetName = Literal[tuple(PRESETS)]

app = tyro.extras.SubcommandApp()

_CLASSES_SHOWN = 10


@app.command
def train(
    config: Annotated[TrainConfig, tyro.conf.arg(name="")],
    preset: PresetName | None = None,
    print_config: bool = False,
    json: bool = False,
) -> None:
    """Train a student against a store, a live teacher, or no teacher at all.

    Args:
        config: The run.
        preset: Start from a released pair's settings, see `student-trainer presets`; options on the command
            line override it.
        print_config: Print the settings as JSON and do nothing.
        json: Print the result as JSON on stdout.
    """
    if print_config:
        _print_json(config_to_dict(config))
        return
    try:
        result = run_train(config)
    except OtherProcessError as error:  # which the main process prints
        raise SystemExit(error.exit_code) from None
    if not is_main_process():
        return
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
def presets(
    name: Annotated[PresetName | None, tyro.conf.Positional] = None, cache_command: bool = False, json: bool = False
) -> None:
    """List the released pairs of teacher and student, or print one's settings as JSON.

    Args:
        name: The preset to print.
        cache_command: Print the line that caches its teacher's features; replace TARS and STORE by your own.
        json: Print the list as JSON.
    """
    if cache_command:
        if name is None:
            raise InputError("--cache-command prints one preset's line; name the preset")
        say(PRESETS[name].cache_command())
    elif name is not None:
        preset = PRESETS[name]
        settings = config_to_dict(preset.config())
        settings = {key: value for key, value in settings.items() if key not in ("run", "tars")}
        about = {"source": asdict(preset.source), "differs": dict(preset.differs), "teacher": asdict(preset.teacher)}
        _print_json({**settings, **about, "cache_command": preset.cache_command()})
    elif json:
        _print_json({"presets": preset_rows()})
    else:
        _print_presets()


@app.command
def evaluate(config: Annotated[EvaluateConfig, tyro.conf.arg(name="")], json: bool = False) -> None:
    """Print a trained student's accuracy on a set of images, per class too, and the cost of a forward pass.

    Args:
        config: The evaluation.
        json: Print JSON instead of a table.
    """
    evaluation = run_evaluate(config)
    accuracy = evaluation.accuracy
    if json:
        _print_json({**asdict(accuracy), **{k: v for k, v in asdict(evaluation).items() if k != "accuracy"}})
        return
    rows = {
        "top-1": _percent(accuracy.top1),
        "top-5": _percent(accuracy.top5),
        "samples": accuracy.samples,
        "unreadable": len(accuracy.unreadable),
        "images per second": f"{evaluation.images_per_second:.1f}",
        "images per second, forward only": f"{evaluation.forward_images_per_second:.1f}",
        "GFLOPs per image": f"{evaluation.flops / 1e9:.3f}",
        "parameters": f"{evaluation.parameters:,}",
    }
    _print_table(str(config.run or config.checkpoint), rows)
    _print_classes(accuracy)
    for line in (*evaluation.notes, *(f"unreadable: {line}" for line in accuracy.unreadable)):
        say(line, error=True)


@app.command
def export(config: Annotated[ExportConfig, tyro.conf.arg(name="")], json: bool = False) -> None:
    """Write a trained student as a plain timm checkpoint, and as ONNX if asked.

    Args:
        config: The export.
        json: Print JSON instead of text.
    """
    files = [str(path) for path in run_export(config)]
    if json:
        _print_json({"files": files})
    else:
        say(*files)


@app.command
def compare(config: Annotated[CompareConfig, tyro.conf.arg(name="")], json: bool = False) -> None:
    """Train several settings with several seeds, and write a table, plots and a report; resumes.

    Args:
        config: The sweep.
        json: Print the results as JSON on stdout.
    """
    comparison = run_compare(config)
    if json:
        _print_json(asdict(comparison))
        return
    table = Table()
    for i, column in enumerate(comparison_columns(comparison)):
        table.add_column(column, justify="right" if i else "left")
    for row in comparison_rows(comparison):
        table.add_row(*row)
    say(comparison.title)
    Console().print(table)
    say(f"report: {config.folder / 'report.html'}")


def _print_classes(accuracy: Accuracy) -> None:
    """Print the classes of lowest accuracy; all of them with --json."""
    seen = [(top1, index) for index, top1 in enumerate(accuracy.per_class) if top1 is not None]
    worst = {
        f"class {index}": f"{top1:.2f} % of {accuracy.class_samples[index]}"
        for top1, index in sorted(seen)[:_CLASSES_SHOWN]
    }
    _print_table(f"lowest top-1, {len(worst)} of {len(seen)} classes", worst)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} %"


def _print_table(title: str, rows: dict[str, Any]) -> None:
    table = Table(show_header=False)
    for name, value in rows.items():
        table.add_row(name, str(value))
    say(title)  # as a title of the table it would be broken to the table's width
    Console().print(table)


def _print_presets() -> None:
    table = Table(title="presets, with the paper's ImageNet-1K top-1", title_justify="left")
    for column in ("preset", "teacher", "size", "schedule", "paper"):
        table.add_column(column, no_wrap=column != "teacher", overflow="fold")
    for row in preset_rows():
        table.add_row(*(str(row[str(column.header)]) for column in table.columns))
    Console().print(table)


def _print_json(values: dict[str, Any]) -> None:
    say_json(values, indent=2)


RENAMED = {
    "--scalekd.alphas-stage3": "give --scalekd.alpha-stage3 (their sum) and --scalekd.beta-stage3 (the first's share)",
    "--scalekd.alphas-stage4": "give --scalekd.alpha-stage4 (their sum) and --scalekd.beta-stage4 (the first's share); "
    "for --method fd, --fd.alpha (the first)",
}
"""Options of earlier releases: what to give instead."""
LISTS = ("--gpus", "--seeds", "--set", "--store", "--store-weights", "--tars", "--val-tars")
"""Options that take several values."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``student-trainer``."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if renamed := next((name for a in arguments if (name := a.partition("=")[0].replace("_", "-")) in RENAMED), None):
        say(f"student-trainer: {renamed} was replaced: {RENAMED[renamed]}", error=True)
        return InputError.exit_code
    return run(_with_preset(arguments), "student-trainer", arguments, lists=LISTS, extra="student")


def _with_preset(arguments: Sequence[str]) -> tyro.extras.SubcommandApp:
    """The commands, the preset's settings being ``train``'s defaults; tyro reads them before any argument."""
    if list(arguments[:1]) != ["train"]:
        return app
    flags = [flag for argument in arguments[1:] for flag in argument.split("=", 1)]
    asked = [value for flag, value in pairwise(flags) if flag == "--preset"]
    if not asked or asked[-1] not in PRESETS:  # tyro refuses an unknown one, and takes the last of several
        return app
    commands = tyro.extras.SubcommandApp()
    commands.command(name="train")(partial(train, config=PRESETS[asked[-1]].config()))
    commands.command(presets)  # with a single command, its name could not be given
    return commands
