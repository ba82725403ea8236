"""Pieces of the study: one question with some seeds, run by ``student-trainer compare``."""

from typing import Any

import yaml

from benchmarks.study.questions import Question
from benchmarks.study.stores import Workshop
from student_trainer.sweeps.compare import CompareConfig, compare
from student_trainer.sweeps.comparison import Comparison


def run_piece(question: Question, seeds: tuple[int, ...], workshop: Workshop) -> Comparison:
    """Train what is missing of a question with these seeds; runs of earlier pieces are kept.

    All questions of a student share one folder of runs, so that a setting that two of them have is trained once.

    Raises:
        UserError: A teacher or a store could not be made, or runs failed.
    """
    tier = workshop.tier
    sweep = workshop.folder / "sweeps" / f"{question.name}.yaml"
    sweep.parent.mkdir(parents=True, exist_ok=True)
    sweep.write_text(yaml.safe_dump(sweep_file(question, workshop), sort_keys=False))
    return compare(
        CompareConfig(
            sweep=sweep,
            out=workshop.folder / "students" / question.student,
            seeds=seeds,
            processes=tier.processes,
            threads=1 if tier.processes > 1 else None,
        )
    )


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
