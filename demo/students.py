"""One student trained in five ways, with few labels and with all."""

import multiprocessing
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Literal

import torch

from demo.digits import Digits
from demo.settings import StudentSettings
from demo.teacher import CROP_PCT
from student_trainer.config import TrainConfig
from student_trainer.engine.metrics import read_metrics
from student_trainer.teachers.config import LiveTeacher, StoreTeacher
from student_trainer.train import TrainResult, train

PROCESSES = 2  # students trained at a time, one thread each: networks this small do not gain from a second thread


@dataclass(frozen=True)
class Method:
    """One way to train: what it is called, and the trainer's names for it."""

    label: str
    method: Literal["scalekd", "fd", "kd", "none"]
    source: Literal["store", "live"] = "store"


METHODS = (
    Method("No distillation", "none"),
    Method("KD", "kd"),
    Method("FD", "fd"),
    Method("ScaleKD, store", "scalekd"),
    Method("ScaleKD, live", "scalekd", "live"),
)


@dataclass(frozen=True)
class Setting:
    """A row of the table: one method with ``few`` or ``all`` labels, over its seeds."""

    labels: str
    method: Method
    images: int
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class SettingResult:
    """Result of a setting.

    Attributes:
        labels: ``few`` or ``all``.
        method: Name of the method.
        images: Labelled images trained on.
        seeds: Seeds of weights and order.
        top1: Test accuracy after the last step per seed, in percent.
        mean: Mean of top1.
        spread: Sample standard deviation of top1; None with one seed.
        steps: Optimizer steps of each run.
        seconds_per_step: Median over steps, median over seeds.
        teacher_seconds: Seconds in a live teacher per run, mean over seeds.
        curves: Cross entropy with the labels per step and seed, unweighted.
    """

    labels: str
    method: str
    images: int
    seeds: tuple[int, ...]
    top1: tuple[float, ...]
    mean: float
    spread: float | None
    steps: int
    seconds_per_step: float
    teacher_seconds: float
    curves: tuple[tuple[float, ...], ...]


class Students:
    """Where the runs read and write.

    Attributes:
        student: The student and its training.
    """

    def __init__(self, folder: Path, digits: Digits, store: Path, checkpoint: Path, settings: StudentSettings) -> None:
        self._folder, self._digits, self._store = folder, digits, store
        self._checkpoint, self.student = checkpoint, settings

    def settings(self) -> list[Setting]:
        """All ten settings, in the table's order."""
        labels = (
            ("few", self._digits.few_images, self.student.few_seeds),
            ("all", self._digits.train_images, self.student.all_seeds),
        )
        return [Setting(name, method, images, seeds) for name, images, seeds in labels for method in METHODS]

    def config(self, setting: Setting, seed: int) -> TrainConfig:
        """One run. Nothing but method, source, labels and seed differs between runs."""
        student, method = self.student, setting.method
        name = f"{setting.labels}-{method.method}-{method.source}-seed{seed}"
        epochs = student.steps // (setting.images // student.batch_size)
        return TrainConfig(
            run=self._folder / name,
            student=student.name,
            student_kwargs=student.model_kwargs,
            tars=self._digits.train_tars,
            keys_file=self._digits.few_keys if setting.labels == "few" else None,
            val_tars=self._digits.test_tars,
            method=method.method,
            teacher=(
                LiveTeacher(checkpoint=self._checkpoint, store=self._store)
                if method.source == "live"
                else StoreTeacher(self._store)
            ),
            epochs=epochs,
            val_every=epochs,  # test once, after the last step: no choosing by test accuracy
            batch_size=student.batch_size,
            optim=student.optim,
            scalekd=student.scalekd,
            crop_pct=CROP_PCT,
            device="cpu",
            workers=0,
            seed=seed,
            log_every=1,
            progress=False,
        )

    def run(self) -> Iterator[tuple[Setting, TrainResult]]:
        """Train every setting with every seed; gives each run as it ends, in the order of settings."""
        runs = [(setting, seed) for setting in self.settings() for seed in setting.seeds]
        configs = [self.config(setting, seed) for setting, seed in runs]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["student_trainer.train"])  # takes seconds, so once for all processes
        with ProcessPoolExecutor(PROCESSES, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for (setting, _), result in zip(runs, pool.map(train, configs), strict=True):
                yield setting, result


def summarise(runs: Iterable[tuple[Setting, TrainResult]]) -> list[SettingResult]:
    """Results by setting, in order of first appearance."""
    by_setting: dict[Setting, list[TrainResult]] = {}
    for setting, result in runs:
        by_setting.setdefault(setting, []).append(result)
    return [_summary(setting, results) for setting, results in by_setting.items()]


def _summary(setting: Setting, results: Sequence[TrainResult]) -> SettingResult:
    top1 = tuple(_known(result.last_top1) for result in results)
    return SettingResult(
        labels=setting.labels,
        method=setting.method.label,
        images=setting.images,
        seeds=setting.seeds,
        top1=top1,
        mean=mean(top1),
        spread=stdev(top1) if len(top1) > 1 else None,
        steps=results[0].steps,
        seconds_per_step=median(_known(result.seconds_per_step) for result in results),
        teacher_seconds=mean(result.teacher_seconds for result in results),
        curves=tuple(_cross_entropy(result.run) for result in results),
    )


def _known(value: float | None) -> float:
    assert value is not None  # every run tests and makes steps
    return value


def _cross_entropy(run: Path) -> tuple[float, ...]:
    """The unweighted task loss per step, in which methods can be compared."""
    return tuple(line["raw"]["task"] for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "step")
