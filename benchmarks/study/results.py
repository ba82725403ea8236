"""Results of the study as JSON files that are committed, one per question."""

import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.study.questions import Question
from benchmarks.study.stores import Workshop
from feature_store.backends.files import write_text
from student_trainer.engine.metrics import read_metrics
from student_trainer.sweeps.comparison import Comparison, RunResult

RESULTS = Path(__file__).with_name("results")


@dataclass(frozen=True)
class Results:
    """Committed results of one tier.

    Attributes:
        questions: By name, see write_question; those without a run are missing.
        made: Teachers and stores, see Workshop.reports, and the machine.
    """

    questions: dict[str, Any]
    made: dict[str, Any]


def write_question(folder: Path, question: Question, comparison: Comparison) -> None:
    """Write a question's runs: no paths, numbers rounded to what they are worth."""
    settings = {setting.name: [_run(run) for run in setting.runs] for setting in comparison.settings if setting.runs}
    content = {"question": question.name, "baseline": question.baseline, "settings": settings}
    _write(folder / f"{question.name}.json", content)


def write_made(folder: Path, workshop: Workshop) -> None:
    """Write the reports of teachers and stores, beside those of earlier runs, the tier's sizes and the machine."""
    tier, images = workshop.tier, workshop.images
    sizes = {
        "epochs": tier.epochs,
        "batch_size": tier.batch_size,
        "steps": tier.epochs * (images.samples // tier.batch_size),
        "images": images.samples,
        "few_labels": images.few_labels,
        "views": tier.views,
        "policy": {"name": tier.policy, **tier.policy_options},
    }
    before = read_results(folder).made
    reports = {
        kind: dict(sorted({**before.get(kind, {}), **made}.items())) for kind, made in workshop.reports().items()
    }
    _write(folder / "made.json", {"tier": sizes, "machine": machine(), **reports})


def read_results(folder: Path) -> Results:
    """Read what write_question and write_made wrote."""
    files = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    made = files.pop("made", {})
    return Results(files, made)


def runs_of(question: dict[str, Any], setting: str) -> list[RunResult]:
    """Runs of a setting as the trainer's comparison takes them; empty if none is finished."""
    return [
        RunResult(
            setting=setting,
            seed=run["seed"],
            folder=Path(),
            top1=run["top1"],
            steps=run["steps"],
            seconds_per_step=run["seconds_per_step"],
            teacher_seconds=run["teacher_seconds"],
            task_loss=tuple(run["task_loss"]),
            top1_curve=(),
        )
        for run in question["settings"].get(setting, [])
    ]


def machine() -> dict[str, Any]:
    """The hardware and software that decide seconds."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _run(run: RunResult) -> dict[str, Any]:
    return {
        "seed": run.seed,
        "top1": round(run.top1, 2),
        "steps": run.steps,
        "seconds_per_step": None if run.seconds_per_step is None else round(run.seconds_per_step, 4),
        "teacher_seconds": round(run.teacher_seconds, 1),
        "task_loss": [round(loss, 3) for loss in run.task_loss],
        "terms": {name: round(value, 3) for name, value in _last_terms(run.folder).items()},
    }


def _last_terms(folder: Path) -> dict[str, float]:
    """Every term of the loss in the last epoch, unweighted."""
    return [line for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "epoch"][-1]["raw"]


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=1) + "\n")
