"""Statistics of a sweep: mean, deviation, paired difference per setting."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev

from student_trainer.engine.metrics import read_metrics
from student_trainer.sweeps.file import Run, Sweep


@dataclass(frozen=True)
class RunResult:
    """Result of one run, read from its folder.

    Attributes:
        setting: Name of its setting.
        seed: Its seed.
        folder: Where it lies.
        top1: The compared accuracy, in percent.
        steps: Optimizer steps.
        seconds_per_step: Median over steps of the process that ended the run; None if it made none.
        teacher_seconds: Time in a live teacher; 0 with a store.
        task_loss: Task loss per epoch, without the weight that the method gives it.
        top1_curve: (epochs done, top-1 in percent) of every validation.
    """

    setting: str
    seed: int
    folder: Path
    top1: float
    steps: int
    seconds_per_step: float | None
    teacher_seconds: float
    task_loss: tuple[float, ...]
    top1_curve: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Difference:
    """Mean of a setting minus the baseline, over the seeds both have.

    Attributes:
        mean: Mean of the differences, in points.
        low: Lower end of its t confidence interval; None with fewer than two pairs, or a value not finite.
        high: Upper end; None as low.
        pairs: Seeds that both settings finished.
    """

    mean: float
    low: float | None
    high: float | None
    pairs: int


@dataclass(frozen=True)
class SettingResult:
    """A row of the table.

    Attributes:
        name: The setting.
        runs: Its finished runs, by seed.
        mean: Mean top-1 over seeds; None before the first run is finished.
        std: Sample standard deviation over seeds; None with fewer than two.
        difference: To the baseline; None for the baseline itself, and where no seed pairs.
        seconds_per_step: Median over runs.
        teacher_seconds: Mean over runs.
    """

    name: str
    runs: tuple[RunResult, ...]
    mean: float | None
    std: float | None
    difference: Difference | None
    seconds_per_step: float | None
    teacher_seconds: float


@dataclass(frozen=True)
class Comparison:
    """All of a sweep's results.

    Attributes:
        title: Title of the report.
        baseline: The setting others are compared with.
        score: ``last`` or ``best``, see SweepFile.
        confidence: Of the intervals, e.g. 0.95.
        settings: The rows.
    """

    title: str
    baseline: str
    score: str
    confidence: float
    settings: tuple[SettingResult, ...]


def read_run(run: Run, score: str) -> RunResult:
    """The result of a finished run."""
    epochs = [line for line in read_metrics(run.config.run / "metrics.jsonl") if line["kind"] == "epoch"]
    curve = tuple((line["epoch"] + 1, line["val"]["top1"]) for line in epochs if "val" in line)
    accuracies = [top1 for _, top1 in curve]
    speeds = [line["speed"] for line in epochs]
    paces = [speed["seconds_per_step"] for speed in speeds if speed["seconds_per_step"] is not None]
    return RunResult(
        setting=run.setting,
        seed=run.seed,
        folder=run.config.run,
        top1=max(accuracies) if score == "best" else accuracies[-1],
        steps=epochs[-1]["step"],
        seconds_per_step=paces[-1] if paces else None,
        teacher_seconds=speeds[-1]["teacher_seconds"],
        task_loss=tuple(line["raw"]["task"] for line in epochs),
        top1_curve=curve,
    )


def compare_runs(sweep: Sweep, results: Sequence[RunResult], confidence: float = 0.95) -> Comparison:
    """Lay results side by side.

    Args:
        sweep: The sweep.
        results: Its finished runs.
        confidence: Of the intervals, between 0 and 1.
    """
    by_setting = {name: sorted((r for r in results if r.setting == name), key=_seed) for name in sweep.settings}
    baseline = by_setting[sweep.baseline]
    rows = tuple(
        _row(name, runs, None if name == sweep.baseline else paired_difference(runs, baseline, confidence))
        for name, runs in by_setting.items()
    )
    return Comparison(sweep.title, sweep.baseline, sweep.score, confidence, rows)


def paired_difference(runs: Sequence[RunResult], baseline: Sequence[RunResult], confidence: float) -> Difference | None:
    """Difference of top-1 on the seeds both have; None if they share none.

    The interval is Student's, over the per-seed differences: mean -/+ t(confidence, n - 1) * sd / sqrt(n). It
    covers variance over seeds (weights, order, dropout) only.
    """
    ours, theirs = ({run.seed: run.top1 for run in group} for group in (runs, baseline))
    seeds = sorted(ours.keys() & theirs.keys())
    differences = [ours[seed] - theirs[seed] for seed in seeds]
    if not differences:
        return None
    center, pairs = mean(differences), len(differences)
    if pairs < 2:
        return Difference(center, None, None, pairs)
    low, high = _interval([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds], confidence)
    return Difference(center, low, high, pairs)


def _interval(ours: Sequence[float], theirs: Sequence[float], confidence: float) -> tuple[float | None, float | None]:
    """Ends of the interval; None where a value is not finite."""
    from scipy.stats import ttest_rel  # slow to import

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # equal differences: t is infinite, the interval a point
        low, high = ttest_rel(ours, theirs).confidence_interval(confidence)
    return (float(low), float(high)) if math.isfinite(low) else (None, None)


def _row(name: str, runs: Sequence[RunResult], difference: Difference | None) -> SettingResult:
    top1, paces = [run.top1 for run in runs], [r.seconds_per_step for r in runs if r.seconds_per_step is not None]
    return SettingResult(
        name=name,
        runs=tuple(runs),
        mean=mean(top1) if top1 else None,
        std=stdev(top1) if len(top1) > 1 else None,
        difference=difference,
        seconds_per_step=median(paces) if paces else None,
        teacher_seconds=mean(run.teacher_seconds for run in runs) if runs else 0.0,
    )


def _seed(run: RunResult) -> int:
    return run.seed
