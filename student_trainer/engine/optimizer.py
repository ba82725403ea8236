"""From a loss to new weights: optimizer, learning rate, loss scaling, clipping and the moving average."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from timm.optim import create_optimizer_v2  # pyright: ignore[reportPrivateImportUsage]
from timm.scheduler.scheduler import Scheduler
from timm.scheduler.scheduler_factory import create_scheduler_v2
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer

from feature_store.errors import InputError
from student_trainer.config import OptimConfig, TrainConfig

if TYPE_CHECKING:
    from student_trainer.trainee import Trainee


class Updates:
    """Everything between ``backward`` and the next forward pass.

    Attributes:
        optimizer: Over student and projectors, with the learning rates of the run's batch size.
        scheduler: The learning rate as a function of the step; it has no state of its own.
        ema: Moving average of the student's weights, or None.
    """

    def __init__(self, config: TrainConfig, trainee: "Trainee", steps_per_epoch: int, device: torch.device) -> None:
        self._student, self._clip_grad = trainee.student.model, config.optim.clip_grad
        self._parameters = [parameter for parameter in trainee.parameters() if parameter.requires_grad]
        self.optimizer = make_optimizer(config.optim.at(config.batch_size), trainee)
        self.scheduler = make_scheduler(config, self.optimizer, steps_per_epoch)
        self._scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "float16")
        self.ema = None if config.ema_decay is None else ModelEmaV3(self._student, decay=config.ema_decay)
        self._evaluates_ema = config.ema_eval

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return self.optimizer.param_groups[0]["lr"]

    @property
    def validated(self) -> nn.Module:
        """The timm model with the weights to use: averaged ones if any are kept and evaluated."""
        return self.ema.module if self.ema is not None and self._evaluates_ema else self._student

    def backward(self, loss: Tensor) -> None:
        """Add the loss's gradients."""
        self._scaler.scale(loss).backward()

    def apply(self, step: int) -> None:
        """Make the step-th update, counted from 1, out of the gradients, and drop them."""
        if self._clip_grad is not None:
            self._scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self._parameters, self._clip_grad)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step_update(step)
        if self.ema is not None:
            self.ema.update(self._student, step)

    def state_bytes(self) -> int:
        """What this takes in a checkpoint, about: moments of each parameter, and the averaged weights."""
        moments = sum(
            (2 if "betas" in group else 1 if group.get("momentum") else 0) * _bytes(group["params"])
            for group in self.optimizer.param_groups
        )
        return moments + (0 if self.ema is None else _bytes(self.ema.parameters()))

    def state_dict(self) -> dict[str, Any]:
        """The parts of a checkpoint that are kept here."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of state_dict.

        Raises:
            RuntimeError: Tensors that do not fit.
            ValueError: Parameter groups that do not fit.
        """
        self.optimizer.load_state_dict(state["optimizer"])
        if self._scaler.is_enabled():
            self._scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])


def make_optimizer(config: OptimConfig, trainee: "Trainee") -> Optimizer:
    """A timm optimizer over student and projectors.

    Raises:
        InputError: timm knows no such optimizer, or it needs derivatives of gradients.
    """
    try:
        optimizer = create_optimizer_v2(
            _groups(config, trainee),  # pyright: ignore[reportArgumentType] - groups are fine
            opt=config.opt,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
        )
    except (ValueError, TypeError, AssertionError) as error:
        raise InputError(
            f"--optim.opt {config.opt!r} cannot be used: {error}; see timm.optim.list_optimizers()"
        ) from error
    if getattr(optimizer, "is_second_order", False):
        raise InputError(f"--optim.opt {config.opt!r} needs derivatives of gradients; choose one that does not")
    return optimizer


def _groups(config: OptimConfig, trainee: "Trainee") -> list[dict[str, Any]]:
    """The parameters without weight decay, then those with it."""
    positions, named = trainee.projector_positions(), trainee.no_weight_decay()
    decay_positions = config.decay_all if config.decay_positions is None else config.decay_positions
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for name, leaf in trainee.named_parameters():
        spared = leaf.ndim <= 1 or name.endswith(".bias") or name in named  # timm's rule
        decays = decay_positions if name in positions else config.decay_all or not spared
        groups[decays].append(leaf)
    free, decayed = groups
    return [group for group in ({"params": free, "weight_decay": 0.0}, {"params": decayed}) if group["params"]]


def make_scheduler(config: TrainConfig, optimizer: Optimizer, steps_per_epoch: int) -> Scheduler:
    """The learning rate as a function of the step: linear warm-up, then cosine over what is left, or steps."""
    optim = config.optim.at(config.batch_size)
    after_warmup = optim.sched == "cosine"  # steps are counted from the first epoch
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=optim.sched,
        num_epochs=max(config.epochs - optim.warmup_epochs, 1) if after_warmup else config.epochs,  # pyright: ignore[reportArgumentType] - parts of an epoch are fine
        decay_epochs=optim.decay_epochs,
        decay_rate=optim.decay_rate,
        min_lr=optim.min_lr,
        warmup_lr=optim.warmup_lr,
        warmup_epochs=optim.warmup_epochs,  # pyright: ignore[reportArgumentType]
        warmup_prefix=after_warmup,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )
    assert scheduler is not None  # only for sched "none"
    return scheduler


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
