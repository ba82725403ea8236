"""Checkpoints of a run: written whole or not at all, read without running anything they contain."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from feature_store.backends.files import replacing
from feature_store.errors import InputError, MismatchError, ResourceError, one_line
from feature_store.teacher.weights import read_file

FORMAT = 2

# Options that say where something lies, or how much of it is used: what comes of them is compared instead, see a run's
# inputs.
_PLACES = frozenset(
    {"store", "source", "tars", "views_from", "val_tars", "keys_file", "num_views", "teacher.checkpoint",
     "student_kwargs.checkpoint_path"}
)  # fmt: skip
# Options that cannot change a run's numbers.
_FREE = frozenset(
    {"run", "resume", "progress", "workers", "start_method", "log_every", "val_every", "checkpoint_every",
     "check_all_pixels", "scratch", "allow_pipe", "token_file", "tensorboard", "wandb", "report", "preset",
     "scalekd.checkpoint_later_blocks"}
)  # fmt: skip


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        epoch: Epoch in progress.
        batch: Batches of it that are done.
        step: Optimizer steps done in all.
        best_top1: Best validation accuracy so far, in percent; None before the first validation.
        teacher_seconds: Time spent in a live teacher.
        means: State of the epoch's running means.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    best_top1: float | None = None
    teacher_seconds: float = 0.0
    means: dict[str, Any] | None = None


@dataclass(frozen=True)
class Checkpoint:
    """Everything a run needs to go on as if it had never stopped.

    The learning-rate schedule is a function of the step and has no state of its own.

    Attributes:
        student: The student's timm name, arguments, input size and normalisation, see ``train``.
        weights: State dict of the timm model.
        loss: State dict of the loss module: the projectors.
        optimizer: State dict of the optimizer.
        progress: How far the run is.
        rng: Random state per device kind, of every process.
        ema: State dict of the timm model with averaged weights; None if none are kept.
        scaler: State dict of float16's gradient scaler; empty for other dtypes.
        ema_eval: Whether the averaged weights are those to use.
    """

    student: dict[str, Any]
    weights: dict[str, Any]
    loss: dict[str, Any]
    optimizer: dict[str, Any]
    progress: Progress
    rng: Sequence[dict[str, Any]]
    ema: dict[str, Any] | None = None
    scaler: dict[str, Any] = field(default_factory=dict)
    ema_eval: bool = True

    @property
    def trained(self) -> dict[str, Any]:
        """The weights to use, which are those the run validates: averaged ones if it keeps and evaluates any."""
        return self.ema if self.ema is not None and self.ema_eval else self.weights


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint durably: temporary file, fsync, rename.

    Raises:
        ResourceError: The disk is full or refuses; the checkpoint that was there before stays.
    """
    fields = {name: getattr(checkpoint, name) for name in checkpoint.__dataclass_fields__}
    try:
        with replacing(path, durable=True) as partial, partial.open("wb") as file:
            torch.save({"format": FORMAT, **fields, "progress": asdict(checkpoint.progress)}, file)
    except (OSError, RuntimeError) as error:  # torch tells of a failed write by a RuntimeError
        raise ResourceError(
            f"checkpoint {path} cannot be written: {one_line(error)}; make room on the disk and run the same command "
            "with --resume, the checkpoint before this one is whole"
        ) from error


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint on the CPU.

    Raises:
        InputError: Missing, damaged, or not a checkpoint of this trainer.
    """
    if not path.exists():
        raise InputError(f"checkpoint {path} does not exist; give the folder or a .pt file of a training run")
    try:
        saved = read_file(path)
    except InputError as error:
        raise _not_a_checkpoint(path, "it " + str(error).removeprefix(f"checkpoint {path} ")) from error
    found = saved.get("format") if isinstance(saved, dict) else None
    if found is None:
        raise _not_a_checkpoint(path, "it has no format number; give the run's folder, or its best.pt or last.pt")
    if found != FORMAT:
        raise InputError(
            f"{path} has checkpoint format {found!r}, this build reads {FORMAT}; use the release that wrote it"
        )
    try:
        saved.setdefault("ema_eval", True)  # not in checkpoints from before there was a choice
        fields = {name: saved[name] for name in Checkpoint.__dataclass_fields__}
        return Checkpoint(**{**fields, "progress": Progress(**fields["progress"])})
    except (KeyError, TypeError) as error:
        raise _not_a_checkpoint(path, f"it is incomplete: {one_line(error)}; use the release that wrote it") from error


def _not_a_checkpoint(path: Path, reason: str) -> InputError:
    return InputError(f"{path} is not a checkpoint of student-trainer: {reason}")


def rng_state() -> dict[str, Any]:
    """State of torch's generators, the only random numbers a training step draws."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Inverse of rng_state; generators of devices this machine lacks are left out."""
    torch.set_rng_state(state["cpu"])
    for device, cuda in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
        torch.cuda.set_rng_state(cuda, device)


def require_same_run(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuse to resume a run with other settings or other data.

    Args:
        saved: The run's config.json.
        current: What it would be now.

    Raises:
        MismatchError: Names the first field that differs.
    """
    for section in ("config", "inputs"):
        before, now = _flat(saved[section]), _flat(current[section])
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name) and not (section == "config" and _is_free(name)):
                raise MismatchError(
                    f"{section}.{name}",
                    where="the run",
                    expected=before.get(name),
                    got=now.get(name),
                    remedy="resume with the settings and data the run was started with, or choose another --run",
                )


def _is_free(name: str) -> bool:
    return name in _FREE | _PLACES or name.partition(".")[0] == "expect"


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        nested = isinstance(value, Mapping) and value
        flat |= _flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return flat
