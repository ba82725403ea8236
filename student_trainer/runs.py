"""A run's folder: what it was made from, and whether it may be started, continued or must be left alone."""

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from feature_store.errors import InputError
from feature_store.versions import software_versions
from student_trainer.checkpoint import Checkpoint, load_checkpoint, require_same_run
from student_trainer.config import TrainConfig, config_to_dict
from student_trainer.metrics import rewind_metrics


class RunFolder:
    """The files of one run.

    Attributes:
        path: The folder.
        metrics: metrics.jsonl.
        last: last.pt, where the run resumes.
        best: best.pt, the epoch with the best validation accuracy; absent without validation.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics, self.last, self.best = path / "metrics.jsonl", path / "last.pt", path / "best.pt"

    @classmethod
    def open(cls, config: TrainConfig, inputs: Mapping[str, Any], resolved: Mapping[str, Any]) -> "RunFolder":
        """Make the folder of a new run, or check that a run may continue in it.

        Args:
            config: What was asked for.
            inputs: Names and hashes of what is read.
            resolved: What the config left open (device, classes...); informative.

        Raises:
            InputError: The folder holds something and the config does not say resume.
            MismatchError: The run was started with other settings or data.
        """
        folder = cls(config.run)
        description = {"config": config_to_dict(config), "inputs": dict(inputs)}
        described = config.run / "config.json"
        if config.resume and described.is_file():
            require_same_run(read_description(described), description)
            return folder
        partial = described.with_name(described.name + ".partial")
        # all that is there of a run killed while it was begun
        if config.run.exists() and (not config.run.is_dir() or set(config.run.iterdir()) - {partial}):
            step = "it holds no run to continue;" if config.resume else "add --resume to continue it, or"
            raise InputError(f"--run {config.run} already exists; {step} choose another folder")
        config.run.mkdir(parents=True, exist_ok=True)
        versions = {**software_versions(), "git": _git_commit()}
        partial.write_text(json.dumps({**description, "resolved": dict(resolved), "software": versions}, indent=2))
        partial.replace(described)
        return folder

    def saved(self) -> Checkpoint | None:
        """Where the run resumes; None if it starts from nothing."""
        return load_checkpoint(self.last) if self.last.is_file() else None

    def rewind(self, checkpoint: Checkpoint | None) -> None:
        """Cut the metrics back to where the run resumes."""
        if self.metrics.is_file():
            rewind_metrics(self.metrics, -1 if checkpoint is None else checkpoint.progress.step)


def read_description(path: Path) -> dict[str, Any]:
    """A run's config.json.

    Raises:
        InputError: It is missing or damaged.
    """
    if not path.is_file():
        raise InputError(f"{path} is missing: not the folder of a training run, or the file was removed")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}; restore it or choose another --run") from error


def _git_commit() -> str | None:
    """Commit of this package's own checkout, if it runs from one."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():  # installed: the enclosing checkout, if any, is somebody else's
        return None
    try:
        found = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
