"""Loggers that repeat metrics.jsonl: TensorBoard, Weights & Biases, MLflow."""

import uuid
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from feature_store.errors import InputError
from student_trainer.config import TrainConfig, config_to_dict
from student_trainer.engine.metrics import MetricsLog


class Logger(Protocol):
    """Takes scalars by name and step; one of your own is handed to ``train(loggers=...)``."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log values at a step, counted in optimizer steps done."""
        ...

    def close(self) -> None:
        """Write the remaining values."""
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
    """A run of Weights & Biases; a resumed run continues the same one. WANDB_MODE=offline needs no account."""

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


class Mlflow:
    """A run of MLflow; a resumed run continues the same one. MLFLOW_TRACKING_URI says where to."""

    def __init__(self, experiment: str, config: TrainConfig) -> None:
        import mlflow  # pyright: ignore[reportMissingImports] - optional extra

        mlflow.set_experiment(experiment)
        kept = config.run / "mlflow_id"
        run_id = kept.read_text() if kept.is_file() else None
        self._mlflow = mlflow
        run = mlflow.start_run(run_id=run_id, run_name=None if run_id else config.run.name)
        if run_id is None:
            kept.write_text(run.info.run_id)
            mlflow.log_dict(config_to_dict(config), "config.json")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Send values to the run."""
        self._mlflow.log_metrics(dict(values), step=step)

    def close(self) -> None:
        """End the run's session."""
        self._mlflow.end_run()


class RunLog:
    """A metrics log whose numbers also go to loggers; the log itself is the record."""

    def __init__(self, log: MetricsLog, loggers: Sequence[Logger]) -> None:
        self._log, self._loggers = log, loggers

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append a line; numbers of step and epoch lines go to every logger as ``kind/name``, nested ones likewise."""
        self._log.write(kind, step, **values)
        if kind in ("step", "epoch"):
            for logger in self._loggers:
                logger.scalars(_numbers(kind, values), step)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._log.close()
        for logger in self._loggers:
            logger.close()


def _numbers(prefix: str, values: Mapping[str, Any]) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            numbers |= _numbers(f"{prefix}/{name}", value)
        elif isinstance(value, int | float):
            numbers[f"{prefix}/{name}"] = value
    return numbers


def require_loggers(config: TrainConfig) -> None:
    """Refuse a run whose loggers are not installed, before anything is computed.

    Raises:
        InputError: A logger is not installed; names the package.
    """
    for asked, package in (
        (config.tensorboard, "tensorboard"),
        (config.wandb is not None, "wandb"),
        (config.mlflow is not None, "mlflow"),
    ):
        if asked and find_spec(package) is None:
            raise InputError(f"--{package} needs {package}; install with `pip install 'scalekd-cache[{package}]'`")


def make_loggers(config: TrainConfig, first_step: int) -> list[Logger]:
    """The loggers that a run asks for.

    Args:
        config: The run.
        first_step: Optimizer steps done before.
    """
    loggers: list[Logger] = []
    if config.tensorboard:
        loggers.append(TensorBoard(config.run / "tensorboard", first_step))
    if config.wandb is not None:
        loggers.append(Wandb(config.wandb, config))
    if config.mlflow is not None:
        loggers.append(Mlflow(config.mlflow, config))
    return loggers


def _wandb_id(run: Path) -> str:
    """The run's id at W&B, kept in its folder so that a resumed run finds it."""
    path = run / "wandb_id"
    if not path.is_file():
        path.write_text(uuid.uuid4().hex[:12])
    return path.read_text()
