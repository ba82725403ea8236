"""Experiment trackers that repeat metrics.jsonl: TensorBoard and Weights & Biases, each an optional extra."""

import uuid
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from feature_store.errors import InputError
from student_trainer.config import TrainConfig, config_to_dict
from student_trainer.engine.metrics import MetricsLog


class Tracker(Protocol):
    """Takes scalars by name and step."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log values at a step, counted in optimizer steps done."""
        ...

    def close(self) -> None:
        """Hand over what is left."""
        ...


class TensorBoard:
    """Event files in the run's folder; ``tensorboard --logdir RUN``."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """Open a new event file.

        Args:
            folder: Where to.
            first_step: Steps done; what an interrupted process logged after it is hidden.
        """
        from torch.utils.tensorboard import SummaryWriter  # takes seconds

        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write values to the event file."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write out what is buffered."""
        self._writer.close()


class Wandb:
    """A run of Weights & Biases; a resumed run goes on in the same one. WANDB_MODE=offline needs no account."""

    def __init__(self, project: str, config: TrainConfig) -> None:
        import wandb  # pyright: ignore[reportMissingImports] - optional extra

        self._run = wandb.init(
            project=project,
            name=config.run.name,
            id=_wandb_id(config.run),
            dir=str(config.run),
            config=config_to_dict(config),
            resume="allow",
        )

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Send values to the run."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """End the run's session."""
        self._run.finish()


class TrackedLog:
    """A metrics log whose numbers also go to trackers; the log itself is the record."""

    def __init__(self, log: MetricsLog, trackers: Sequence[Tracker]) -> None:
        self._log, self._trackers = log, trackers

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append a line; numbers of step and epoch lines go to every tracker as ``kind/name``."""
        self._log.write(kind, step, **values)
        numbers = {f"{kind}/{k}": v for k, v in values.items() if isinstance(v, int | float)}
        if kind in ("step", "epoch"):
            for tracker in self._trackers:
                tracker.scalars(numbers, step)

    def __enter__(self) -> "TrackedLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._log.close()
        for tracker in self._trackers:
            tracker.close()


def require_trackers(config: TrainConfig) -> None:
    """Refuse a run whose trackers are not installed, before anything is computed.

    Raises:
        InputError: Says what to install.
    """
    for asked, option, package in (
        (config.tensorboard, "--tensorboard", "tensorboard"),
        (config.wandb is not None, "--wandb", "wandb"),
    ):
        if asked and find_spec(package) is None:
            raise InputError(f"{option} needs {package}; install with `pip install .[{package}]`")


def open_log(config: TrainConfig, path: Path, first_step: int) -> TrackedLog:
    """The run's log: metrics.jsonl, and the trackers it asks for.

    Args:
        config: The run.
        path: metrics.jsonl.
        first_step: Optimizer steps done before.
    """
    trackers: list[Tracker] = []
    if config.tensorboard:
        trackers.append(TensorBoard(config.run / "tensorboard", first_step))
    if config.wandb is not None:
        trackers.append(Wandb(config.wandb, config))
    return TrackedLog(MetricsLog(path), trackers)


def _wandb_id(run: Path) -> str:
    """The run's id at W&B, kept in its folder so that a resumed run finds it."""
    path = run / "wandb_id"
    if not path.is_file():
        path.write_text(uuid.uuid4().hex[:12])
    return path.read_text()
