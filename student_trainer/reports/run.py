"""Report of a run: numbers, curves, settings as one HTML file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from feature_store.backends.files import write_text
from student_trainer.engine.metrics import read_metrics
from student_trainer.engine.run_folder import read_description
from student_trainer.reports.pages import key_value_table, page, plots_or_note
from student_trainer.reports.plots import curves


def write_run_report(folder: Path) -> Path:
    """Write report.html into a run's folder, from its config.json and metrics.jsonl.

    Without matplotlib (the ``report`` extra) it has no curves, and says so.

    Raises:
        InputError: Not a run's folder, or a damaged one.
    """
    description, lines = read_description(folder / "config.json"), read_metrics(folder / "metrics.jsonl")
    steps = [line for line in lines if line["kind"] == "step"]
    epochs = [line for line in lines if line["kind"] == "epoch"]
    resumed = {f"step {line['step']}": "; ".join(line["notes"]) for line in lines if line.get("notes")}
    sections = {
        "Results": [key_value_table(run_numbers(steps, epochs))],
        "Curves": plots_or_note(lambda: _run_curves(steps, epochs)),
        **({"Changes on resuming": [key_value_table(resumed)]} if resumed else {}),
        "Settings": [key_value_table(_flat(description["config"]))],
        "Plan": [key_value_table(_flat(description["plan"]))],
        "Inputs": [key_value_table(_flat(description["inputs"]))],
        "Software": [key_value_table(description["software"])],
    }
    asked = description["config"]
    path = folder / "report.html"
    write_text(path, page(f"Run {folder.name}", f"{asked['student']}, method {asked['method']}", sections))
    return path


def run_numbers(steps: Sequence[Mapping[str, Any]], epochs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """A run's results in words.

    Args:
        steps: Its step lines of metrics.jsonl.
        epochs: Its epoch lines.
    """
    top1 = [line["val"]["top1"] for line in epochs if "val" in line]
    numbers: dict[str, str] = {"epochs": str(len(epochs))}
    if epochs:
        last = epochs[-1]
        numbers |= {"steps": str(last["step"])}
        numbers |= {f"{name}, mean of the last epoch": f"{value:.4g}" for name, value in last["loss"].items()}
        speed = last["speed"]
        numbers |= {"teacher seconds": f"{speed['teacher_seconds']:.1f}"}
        if speed["seconds_per_step"] is not None:
            numbers |= {"seconds per step, median": f"{speed['seconds_per_step']:.4f}"}
    if top1:
        numbers = {"best top-1": f"{max(top1):.2f} %", "last top-1": f"{top1[-1]:.2f} %", **numbers}
    if steps:
        numbers |= {
            "images per second, mean": f"{mean(line['speed']['images_per_second'] for line in steps):.1f}",
            "share of time waiting for data": f"{mean(line['speed']['data_wait'] for line in steps):.1%}",
            "largest memory": f"{max(line['speed']['memory'] for line in steps) / 2**20:,.0f} MiB",
        }
    return numbers


def _run_curves(steps: Sequence[Mapping[str, Any]], epochs: Sequence[Mapping[str, Any]]) -> list[str]:
    if not (steps or epochs):
        return []
    lines = steps or epochs
    terms = {name: [(line["step"], line["loss"][name]) for line in lines] for name in lines[-1]["loss"]}
    figures = [curves(terms, x="step", y="loss terms")]
    accuracies = {
        name: [(line["epoch"] + 1, line["val"][key]) for line in epochs if "val" in line]
        for name, key in (("top-1", "top1"), ("top-5", "top5"))
    }
    if accuracies["top-1"]:
        figures.append(curves(accuracies, x="epoch", y="validation accuracy %"))
    if steps:
        curve = {"learning rate": [(line["step"], line["lr"]) for line in steps]}
        figures.append(curves(curve, x="step", y="learning rate"))
        for key, label in (("images_per_second", "images per second"), ("data_wait", "data wait")):
            curve = {label: [(line["step"], line["speed"][key]) for line in steps]}
            figures.append(curves(curve, x="step", y=label))
    return figures


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat
