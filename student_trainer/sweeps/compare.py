"""Runs of a sweep: every unfinished one, then the comparison."""

import json
import os
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tyro.conf import Positional

from feature_store.errors import FailedError, InputError, MismatchError, ResourceError, UserError
from feature_store.processes import usable_cpus
from feature_store.tools.options import check_fields, require
from feature_store.tools.terminal import Console, ProgressBar
from student_trainer.config import TrainConfig, config_to_dict
from student_trainer.engine.checkpoint import require_same_run
from student_trainer.engine.run_folder import RunFolder, read_description
from student_trainer.inputs import open_given, open_inputs
from student_trainer.plan import run_identity
from student_trainer.sweeps.comparison import Comparison, compare_runs, read_run
from student_trainer.sweeps.file import Run, Sweep, read_sweep
from student_trainer.sweeps.processes import attempt, run_in_processes
from student_trainer.sweeps.report import write_comparison
from student_trainer.teachers.open import open_teacher


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Several settings, each with several seeds.

    Attributes:
        sweep: The sweep file, or the name of a ready one (ablation, baselines, beta, alpha, views).
        out: Folder of all runs and of the results; default the sweep's name, in this folder. The same command resumes.
        set: NAME=VALUE changed in every run, e.g. store=swin_l.zarr tars=[a.tar,b.tar] optim.lr=0.1.
        seeds: Seeds instead of the file's.
        processes: Runs at a time, on the CPU or sharing a GPU.
        gpus: Numbers of the GPUs to use, as torch counts them, one run at a time on each; instead of processes.
        threads: CPU threads of each run; default the machine's cores divided by the runs at a time.
        confidence: Of the intervals of differences.
        progress: Show progress on stderr; --no-progress says nothing until the end.
    """

    sweep: Positional[Path]
    out: Path | None = None
    set: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    processes: int = 1
    gpus: tuple[int, ...] = ()
    threads: int | None = None
    confidence: float = 0.95
    progress: bool = True

    def __post_init__(self) -> None:
        """Refuse values no comparison could use.

        Raises:
            InputError: Names the option, the value and what is accepted.
        """
        check_fields(self)
        require(self.processes >= 1, "--processes", self.processes, "at least 1")
        require(self.threads is None or self.threads >= 1, "--threads", self.threads, "at least 1")
        require(0 < self.confidence < 1, "--confidence", self.confidence, "between 0 and 1")
        if self.gpus and self.processes > 1:
            raise InputError("--gpus runs one process on each GPU; leave out --processes")
        require(len(set(self.gpus)) == len(self.gpus), "--gpus", self.gpus, "each GPU once")

    @property
    def folder(self) -> Path:
        """Where results go."""
        return Path(self.sweep.stem) if self.out is None else self.out

    @property
    def in_this_process(self) -> bool:
        """One run after the other, each with its own progress bar."""
        return self.processes == 1 and not self.gpus


def compare(config: CompareConfig) -> Comparison:
    """Run what is not finished, then write results.json, table.md and report.html.

    Tables are also written after every run, so that a long sweep can be watched. A run that fails does not stop
    the others.

    Raises:
        FailedError: Runs failed; the others were finished and written first.
        UserError: The sweep cannot be used.
    """
    gpus = _visible_names(config.gpus)
    sweep = read_sweep(config.sweep, config.folder, config.set, config.seeds)
    inputs_now = InputsNow()
    open_runs = [run for run in sweep.runs if not is_finished(run.config, inputs_now)]
    results = [read_run(run, sweep.score) for run in sweep.runs if run not in open_runs]
    failed: list[tuple[Run, UserError]] = []
    with (
        _RunsProgress(config, done=len(results), total=len(sweep.runs)) as progress,
        closing(_run_all(open_runs, config, gpus)) as ended,
    ):
        for run, error in ended:
            if error is None:
                results.append(read_run(run, sweep.score))
                write_comparison(config.folder, compare_runs(sweep, results, config.confidence), plots=False)
            else:
                failed.append((run, error))
            progress.ended(run, error)
    comparison = compare_runs(sweep, results, config.confidence)
    write_comparison(config.folder, comparison)
    _raise_failures(failed, sweep)
    return comparison


def is_finished(config: TrainConfig, inputs_now: "InputsNow | None" = None) -> bool:
    """Whether a run's folder holds all its epochs, made with these settings from what the paths hold now.

    A run whose inputs cannot be read, or are others now, counts as unfinished: ``train`` says why it cannot continue.
    A run of another number of epochs is refused, although ``train`` would continue it with more: its learning rate
    followed another schedule than those of the sweep's other runs.

    Args:
        config: The run.
        inputs_now: Shared by the runs of a sweep, so that what they read alike is read once.

    Raises:
        MismatchError: The folder holds a run with other settings, or of another number of epochs.
    """
    folder = RunFolder(config.run)
    if not folder.description.is_file():
        return False
    saved, asked = read_description(folder.description), config_to_dict(config)
    require_same_run(saved, {"config": asked, "inputs": saved["inputs"]})
    finished = folder.finished_epochs()
    for epochs in (saved["config"]["epochs"], finished):
        if epochs not in (None, config.epochs):
            raise MismatchError(
                "config.epochs",
                where=f"run {config.run}",
                expected=epochs,
                got=config.epochs,
                remedy="runs with different epochs do not compare: choose another --out, or remove that folder",
            )
    if finished is None:
        return False
    try:
        require_same_run(saved, {"config": asked, "inputs": (inputs_now or InputsNow())(config)})
    except UserError:
        return False
    return True


class InputsNow:
    """Identities of what runs read; a set of images is listed once, what differs by seed only is read once."""

    def __init__(self) -> None:
        self._open = cache(open_given)
        self._known: dict[str, dict[str, Any]] = {}

    def __call__(self, config: TrainConfig) -> dict[str, Any]:
        """The inputs that ``train`` would save for the run.

        Raises:
            UserError: Something cannot be read, or does not fit together.
        """
        key = json.dumps(config_to_dict(replace(config, run=Path(), seed=0)), sort_keys=True)
        if key not in self._known:
            self._known[key] = self._read(config)
        return self._known[key]

    def _read(self, config: TrainConfig) -> dict[str, Any]:
        teacher = open_teacher(config.teacher, torch.device("cpu"))
        inputs = open_inputs(config, teacher.store, teacher.num_views, self._open)
        return run_identity(config, teacher, inputs)


def _visible_names(gpus: Sequence[int]) -> list[str]:
    """Names of these GPUs in CUDA_VISIBLE_DEVICES, which may hide and renumber some, as cluster schedulers do.

    Raises:
        ResourceError: One of them is not there; its runs would train on the CPU.
    """
    seen = torch.cuda.device_count()
    if gpus and max(gpus) >= seen:
        raise ResourceError(f"--gpus has {max(gpus)}, but torch sees {seen} GPUs here, counted from 0; leave it out")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(seen)))
    return [visible.split(",")[gpu].strip() for gpu in gpus]


def _run_all(
    runs: Sequence[Run], config: CompareConfig, visible_gpus: Sequence[str]
) -> Generator[tuple[Run, UserError | None]]:
    """Each run as it ends, with why it failed if it did."""
    if config.in_this_process:
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        for run in runs:
            yield run, attempt(replace(run.config, progress=run.config.progress and config.progress))
        return
    at_a_time = len(visible_gpus) or config.processes
    threads = config.threads or max(1, usable_cpus() // at_a_time)
    asked = [replace(run.config, progress=False) for run in runs]
    with closing(run_in_processes(asked, visible_gpus or [None] * at_a_time, threads)) as ended:
        for index, error in ended:
            yield runs[index], error


def _raise_failures(failed: Sequence[tuple[Run, UserError]], sweep: Sweep) -> None:
    if failed:
        failure = FailedError(
            f"{len(failed)} of {len(sweep.runs)} runs failed; fix the sweep and run the same command again:"
        )
        for run, error in failed:
            failure.add_note(f"  {run.setting}, seed {run.seed}: {error}")
        raise failure


class _RunsProgress:
    """A line per run on stderr, and on a terminal a bar, unless each run has its own."""

    def __init__(self, config: CompareConfig, done: int, total: int) -> None:
        console, enabled = Console(stderr=True), config.progress
        self._enabled = enabled
        shows_bar = enabled and console.is_terminal and not config.in_this_process
        self._bar = ProgressBar(
            TextColumn("runs"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
            TimeRemainingColumn(), console=console, disable=not shows_bar,
        )  # fmt: skip
        self._task = self._bar.add_task("runs", total=total, completed=done)
        if enabled and done:
            console.print(f"{done} of {total} runs were finished before")

    def ended(self, run: Run, error: UserError | None) -> None:
        """One run more."""
        self._bar.update(self._task, advance=1)
        if self._enabled:
            outcome = "finished" if error is None else f"failed: {error}"
            self._bar.console.print(f"{run.setting}, seed {run.seed}: {outcome}")

    def __enter__(self) -> "_RunsProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
