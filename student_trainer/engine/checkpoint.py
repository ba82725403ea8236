"""Checkpoints of a run: atomic files, rules of resuming."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from feature_store.backends.files import replacing
from feature_store.errors import InputError, MismatchError, ResourceError, one_line
from feature_store.teacher.weights import read_file
from student_trainer.students.load import CHECKPOINT_FORMAT

# Settings that may differ when a run is resumed, because they cannot change its numbers. What the teacher is, where it
# lies and how it is read is compared by content instead, see a run's inputs.
_RESUMABLE = frozenset(
    {"run", "resume", "progress", "workers", "start_method", "log_every", "val_every", "checkpoint_every", "scratch",
     "allow_pipe", "tensorboard", "wandb", "mlflow", "report", "preset", "teacher", "expect",
     "scalekd.checkpoint_later_blocks"}
)  # fmt: skip
# Settings that say where something lies: what lies there is compared.
_LOCATIONS = frozenset({"tars", "views_from", "val_tars", "keys_file", "student_kwargs.checkpoint_path"})
# Settings that may change the numbers, or the schedule, from there on, and are told.
_TOLD = frozenset({"device", "epochs"})


@dataclass
class Progress:
    """Progress of a run.

    Attributes:
        epoch: Epoch in progress.
        batch: Batches of it that are done.
        step: Optimizer steps done in all.
        best_top1: Best validation accuracy so far, in percent; None before the first validation.
        teacher_seconds: Time spent in a live teacher.
        means: State of the epoch's running means, see TermMeans; only in checkpoints.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    best_top1: float | None = None
    teacher_seconds: float = 0.0
    means: dict[str, Any] | None = None


@dataclass(frozen=True)
class Checkpoint:
    """Everything a run needs to resume as if it had never stopped.

    The learning-rate schedule is a function of the step and has no state of its own.

    Attributes:
        student: The student's timm name, arguments, input size and normalisation, see ``train``.
        weights: State dict of the timm model.
        loss: State dict of the method: its projectors.
        optimizer: State dict of the optimizer.
        progress: Progress of the run.
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

    def load_into(
        self, student: nn.Module, method: nn.Module, optimizer: Optimizer, scaler: GradScaler, ema: nn.Module | None
    ) -> None:
        """Give a run's parts the state they had.

        Raises:
            InputError: Tensors that do not fit, after a change of timm or of this package.
        """
        try:
            student.load_state_dict(self.weights)
            method.load_state_dict(self.loss)
            optimizer.load_state_dict(self.optimizer)
            if scaler.is_enabled():
                scaler.load_state_dict(self.scaler)
            if ema is not None:
                ema.load_state_dict(self.ema or {})
        except (RuntimeError, ValueError) as error:
            raise InputError(
                f"the checkpoint does not fit the run: {one_line(error)}; resume with the versions in its config.json"
            ) from error


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint durably: temporary file, fsync, rename.

    Raises:
        ResourceError: The disk is full or refuses; the checkpoint that was there before stays.
    """
    fields = {name: getattr(checkpoint, name) for name in checkpoint.__dataclass_fields__}
    try:
        with replacing(path, durable=True) as partial, partial.open("wb") as file:
            torch.save({"format": CHECKPOINT_FORMAT, **fields, "progress": asdict(checkpoint.progress)}, file)
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
        raise _not_a_checkpoint(path, "it has no format number; give the run's folder, or its last.pt")
    if found != CHECKPOINT_FORMAT:
        raise InputError(
            f"{path} has checkpoint format {found!r}, this build reads {CHECKPOINT_FORMAT}; use the release that "
            "wrote it"
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
        current: The settings of this run.

    Raises:
        MismatchError: Names the first field that differs.
    """
    for section in ("config", "inputs"):
        before, now = _flat(_completed(saved[section], current[section])), _flat(current[section])
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name) and not (section == "config" and _may_differ(name)):
                raise MismatchError(
                    f"{section}.{name}",
                    where="the run",
                    expected=before.get(name),
                    got=now.get(name),
                    remedy="resume with the settings and data the run was started with, or choose another --run",
                )


def resume_notes(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Differences between a run and its resumption, a sentence each; the order of samples is always the same.

    Args:
        saved: The run's config.json.
        current: The settings of this run.
    """
    notes = []
    for name, consequence in (
        ("processes", "other random numbers in dropout and drop path, and other rounding"),
        ("device", "rounding may differ"),
    ):
        before, now = saved["plan"].get(name), current["plan"].get(name)
        if before != now:
            notes.append(
                f"{name} {before} before, {now} from here on: the same samples in the same order; {consequence}"
            )
    before, now = saved["config"]["epochs"], current["config"]["epochs"]
    if before != now:
        notes.append(f"epochs {before} before, {now} now: from here on the learning rate follows the new schedule")
    versions = ((name, saved["software"].get(name), current["software"].get(name)) for name in ("torch", "timm"))
    notes += [
        f"{name} {before} before, {now} now: numbers may differ" for name, before, now in versions if before != now
    ]
    return notes


def _completed(saved: Mapping[str, Any], current: Mapping[str, Any]) -> Mapping[str, Any]:
    """Saved inputs with what earlier releases did not record, taken from the current ones."""
    before, now = saved.get("live_teacher"), current.get("live_teacher")
    saved = {"classes": current.get("classes"), **saved}
    return {**saved, "live_teacher": {**now, **before}} if before and now else saved


def _may_differ(name: str) -> bool:
    return name in _RESUMABLE | _LOCATIONS | _TOLD or name.partition(".")[0] in _RESUMABLE


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat
