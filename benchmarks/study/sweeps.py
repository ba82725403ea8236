"""Sweeps of the study: one per question, run by ``student-trainer compare``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.study.questions import Question
from benchmarks.study.stores import Workshop
from student_trainer.sweeps.compare import CompareConfig, InputsNow, compare, is_finished
from student_trainer.sweeps.comparison import Comparison, compare_runs, read_run
from student_trainer.sweeps.file import read_sweep


def run_question(question: Question, seeds: Sequence[int], workshop: Workshop) -> Comparison:
    """Train what is missing of a question; runs that another question has trained are kept.

    All questions of a student share one folder of runs, so that a setting that two of them have is trained once.

    Raises:
        UserError: A teacher or a store could not be made, or runs failed.
    """
    tier, sweep = workshop.tier, _sweep(question, workshop)
    sweep.parent.mkdir(parents=True, exist_ok=True)
    sweep.write_text(yaml.safe_dump(sweep_file(question, workshop), sort_keys=False))
    return compare(
        CompareConfig(
            sweep=sweep,
            out=_folder(question, workshop),
            seeds=tuple(seeds),
            processes=tier.processes,
            threads=1 if tier.processes > 1 else None,
        )
    )


def finished_runs(question: Question, seeds: Sequence[int], workshop: Workshop) -> Comparison | None:
    """Finished runs of a question, also while it runs; None if it was never started."""
    path = _sweep(question, workshop)
    if not path.exists():
        return None
    sweep, inputs = read_sweep(path, _folder(question, workshop), seeds=seeds), InputsNow()
    done = [read_run(run, sweep.score) for run in sweep.runs if is_finished(run.config, inputs)]
    return compare_runs(sweep, done)


def _sweep(question: Question, workshop: Workshop) -> Path:
    return workshop.folder / "sweeps" / f"{question.name}.yaml"


def _folder(question: Question, workshop: Workshop) -> Path:
    return workshop.folder / "students" / question.student


def sweep_file(question: Question, workshop: Workshop) -> dict[str, Any]:
    """The sweep as ``student-trainer compare`` reads it, with the paths of this folder."""
    tier, images = workshop.tier, workshop.images
    return {
        "title": question.asks,
        "baseline": question.baseline,
        "base": {
            **tier.student(question.student),
            "tars": list(images.train),
            "val_tars": list(images.val),
            "num_classes": None,
            "epochs": tier.epochs,
            "val_every": tier.epochs,  # test once, after the last step: no choosing by test accuracy
            "batch_size": tier.batch_size,
            "crop_pct": 1.0,
            "report": False,
            "progress": False,
            **tier.base,
        },
        "settings": {name: _setting(own, workshop) for name, own in question.settings(tier).items()},
    }


def _setting(own: dict[str, Any], workshop: Workshop) -> dict[str, Any]:
    """A setting with paths in place of names, its teacher and its store made."""
    tier, images = workshop.tier, workshop.images
    setting = {**own, "store": str(workshop.store(own["store"]))}
    if own["store"] == "few":
        setting["tars"] = list(images.few)
    if "teacher" in own:
        setting["teacher"] = {"checkpoint": str(workshop.teacher(own["teacher"]["checkpoint"]))}
    if own.get("keys_file") == "few":
        setting["keys_file"] = str(images.few_keys)
    if own.get("epochs") == "few":  # as many steps as the others
        steps = tier.epochs * (images.samples // tier.batch_size)
        setting["epochs"] = setting["val_every"] = round(steps / (images.few_labels // tier.batch_size))
    return setting
