"""A run's folder: its files, its lock."""

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from feature_store.backends.base import PARTIAL_SUFFIX
from feature_store.backends.files import write_text
from feature_store.commits.locks import locked
from feature_store.errors import InputError, MismatchError, ResourceError
from feature_store.format.versions import software_versions
from student_trainer.config import TrainConfig, config_to_dict
from student_trainer.engine.checkpoint import (
    Checkpoint,
    Progress,
    load_checkpoint,
    require_same_run,
    resume_notes,
    save_checkpoint,
)
from student_trainer.engine.metrics import rewind_metrics, set_aside_accuracies
from student_trainer.students.load import BEST, LAST

_LOCK, _WRITER = ".lock", ".writer"  # the second one says who holds the first


@contextmanager
def reserved(run: Path) -> Iterator[None]:
    """Reserve the run's folder for this process while the context lasts; it is made if needed.

    Raises:
        InputError: It is a file.
        ResourceError: Another process writes it, or it cannot be made.
    """
    if run.exists() and not run.is_dir():
        raise InputError(f"--run {run} already exists and is no folder; choose another one")
    with ExitStack() as held:
        held.callback(_remove_if_empty, run)  # when the lock is gone
        try:
            held.enter_context(locked(run / _LOCK, "it is locked"))
            (run / _WRITER).write_text(f"process {os.getpid()} of {socket.gethostname()}")
        except ResourceError as error:
            raise ResourceError(
                f"--run {run} is being written by {_writer(run)}; wait until it ends, or choose another folder"
            ) from error
        except OSError as error:
            raise ResourceError(f"--run {run} cannot be written: {error}; choose another folder") from error
        held.callback((run / _WRITER).unlink, missing_ok=True)
        yield


def _writer(run: Path) -> str:
    with suppress(OSError, UnicodeDecodeError):
        if writer := (run / _WRITER).read_text().strip():
            return writer
    return "another process"


def _remove_if_empty(run: Path) -> None:
    with suppress(OSError):
        run.rmdir()


class RunFolder:
    """The files of one run.

    Attributes:
        path: The folder.
        metrics: metrics.jsonl.
        last: last.pt, where the run resumes.
        best: best.safetensors, the student of the epoch with the best validation accuracy; absent without validation.
        earlier_best: earlier-best.safetensors, the same on validation tars that a resumed run no longer uses.
        description: config.json: settings, inputs, plan and versions at the run's start.
        progress: progress.json: epoch, step, best accuracy, and whether all epochs are done.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics, self.last, self.best = path / "metrics.jsonl", path / LAST, path / BEST
        self.description, self.progress = path / "config.json", path / "progress.json"
        self.earlier_best = path / f"earlier-{BEST}"

    @classmethod
    def open(
        cls, config: TrainConfig, inputs: Mapping[str, Any], plan: Mapping[str, Any]
    ) -> tuple["RunFolder", list[str]]:
        """Make the folder of a new run, or check that a run may continue in it. It must be reserved.

        Other validation tars, or none, do not change what is learned: an unfinished run continues with them.

        Args:
            config: The run's configuration.
            inputs: Names and hashes of what is read.
            plan: Description of the resolved plan.

        Returns:
            The folder, and what differs from the run as it was before, a sentence each.

        Raises:
            InputError: The folder holds something and the config does not say resume.
            MismatchError: The run was started with other settings or data.
        """
        folder = cls(config.run)
        versions = {**software_versions(), "git": _git_commit()}
        description = {
            "config": config_to_dict(config),
            "inputs": dict(inputs),
            "plan": dict(plan),
            "software": versions,
        }
        described = folder.description
        if config.resume and described.is_file():
            saved = read_description(described)
            require_same_run(saved, {**description, "inputs": {**inputs, **_validation(saved["inputs"])}})
            folder._remove_partials()
            notes = folder._change_validation(config, saved, inputs)
            return folder, [*resume_notes(saved, description), *notes]
        # a lock and partial files are all that a run killed at its start has left
        if any(path.name not in (_LOCK, _WRITER) and path.suffix != PARTIAL_SUFFIX for path in config.run.iterdir()):
            step = "it holds no run to continue;" if config.resume else "add --resume to continue it, or"
            raise InputError(f"--run {config.run} already exists; {step} choose another folder")
        folder._remove_partials()
        folder._describe(description)
        return folder, []

    def saved(self) -> Checkpoint | None:
        """Where the run resumes; None if it starts from nothing."""
        return load_checkpoint(self.last) if self.last.is_file() else None

    def rewind(self, checkpoint: Checkpoint | None) -> None:
        """Cut the metrics back to where the run resumes, which is unfinished from here on."""
        progress = None if checkpoint is None else checkpoint.progress
        if progress is not None:
            self._write_progress(progress, finished=False)
        if self.metrics.is_file():
            rewind_metrics(self.metrics, *((-1, 0) if progress is None else (progress.step, progress.epoch)))

    def save(self, checkpoint: Checkpoint) -> None:
        """Write last.pt, then progress.json.

        Raises:
            ResourceError: The disk is full or refuses; the checkpoint that was there before stays.
        """
        save_checkpoint(self.last, checkpoint)
        self._write_progress(checkpoint.progress, finished=False)

    def finish(self, progress: Progress) -> None:
        """Note that all epochs are done."""
        self._write_progress(progress, finished=True)

    def finished_epochs(self) -> int | None:
        """Epochs of a run that is finished; None if it is not."""
        if not self.progress.is_file():
            return None
        try:
            progress = json.loads(self.progress.read_text())
            return progress["epoch"] if progress["finished"] else None
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.progress} is damaged: {error!r}; remove it and resume the run") from error

    def _write_progress(self, progress: Progress, *, finished: bool) -> None:
        values = {name: value for name, value in asdict(progress).items() if name != "means"}
        write_text(self.progress, json.dumps({**values, "finished": finished}, indent=2), durable=True)

    def require_room(self, checkpoint_bytes: int) -> None:
        """Refuse a disk without room for a checkpoint.

        Raises:
            ResourceError: There is less.
        """
        free = shutil.disk_usage(self.path).free
        if free < checkpoint_bytes:
            raise ResourceError(
                f"a checkpoint of this run takes about {decimal(checkpoint_bytes)}, but the disk of --run {self.path} "
                f"has {decimal(free)} free; make room, or choose another folder"
            )

    def _describe(self, description: Mapping[str, Any]) -> None:
        write_text(self.description, json.dumps(description, indent=2), durable=True)

    def _remove_partials(self) -> None:
        """Remove partial files of killed processes: the folder is reserved, so no process writes them."""
        for path in self.path.glob(f"*{PARTIAL_SUFFIX}"):
            path.unlink(missing_ok=True)

    def _change_validation(self, config: TrainConfig, saved: dict[str, Any], inputs: Mapping[str, Any]) -> list[str]:
        """Note other validation tars, or none, and set aside the best and the accuracies so far.

        They do not compare with accuracies on other tars. Without any, the best would stay that of an old epoch.

        Returns:
            What was set aside, a sentence.
        """
        if _validation(saved["inputs"]) == _validation(inputs):
            return []
        checkpoint = self.saved()
        finished = checkpoint is not None and checkpoint.progress.epoch >= config.epochs
        if finished and not config.val_tars:
            return []
        if finished:
            raise MismatchError(
                "inputs.val_tars",
                where="the run",
                expected=sorted(saved["inputs"]["val_tars"]),
                got=sorted(inputs["val_tars"]),
                remedy="the run is finished: measure it on other tars with `student-trainer evaluate`",
            )
        if checkpoint is not None:
            self.save(replace(checkpoint, progress=replace(checkpoint.progress, best_top1=None)))
        if self.metrics.is_file():
            set_aside_accuracies(self.metrics)
        notes = []
        if self.best.is_file():
            self.best.replace(self.earlier_best)
            notes.append(f"validation differs from here on: {BEST} so far is kept as {self.earlier_best.name}")
        changed = {"config": {**saved["config"], "val_tars": list(config.val_tars)}}
        self._describe({**saved, **changed, "inputs": {**saved["inputs"], **_validation(inputs)}})
        return notes


def _validation(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a run's inputs that is used for validation only."""
    return {"val_tars": inputs["val_tars"]}


def read_description(path: Path) -> dict[str, Any]:
    """A run's config.json.

    Raises:
        InputError: It is missing or damaged.
    """
    if not path.is_file():
        raise InputError(f"{path} is missing: not the folder of a training run, or the file was removed")
    try:
        described = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}; restore it or choose another --run") from error
    if not isinstance(described, dict) or not {"config", "inputs"} <= described.keys():
        raise InputError(f"{path} is damaged: it has no config or inputs; restore it or choose another --run")
    return described


def _git_commit() -> str | None:
    """Commit of this package's own checkout, if it runs from one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # installed: an enclosing checkout, if any, is another project's
        return None
    try:
        found = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
