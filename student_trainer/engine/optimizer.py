"""Optimizer with its parameter groups, learning-rate schedule."""

from collections.abc import Iterable
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info  # pyright: ignore[reportPrivateImportUsage]
from timm.scheduler.scheduler import Scheduler
from timm.scheduler.scheduler_factory import create_scheduler_v2
from torch import Tensor, nn
from torch.optim import Optimizer

from feature_store.errors import InputError
from student_trainer.config import OptimConfig, TrainConfig
from student_trainer.distilled import DistilledStudent

_FUSED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)


def make_optimizer(config: OptimConfig, module: DistilledStudent) -> Optimizer:
    """A timm optimizer over student and projectors; on GPUs torch's fused kind, where it has one.

    Raises:
        InputError: timm knows no such optimizer, or it needs derivatives of gradients.
    """
    try:
        optimizer = create_optimizer_v2(
            _groups(config, module),  # pyright: ignore[reportArgumentType] - groups are fine
            opt=config.opt,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            **_fused(config.opt, module),  # pyright: ignore[reportArgumentType]
        )
    except (ValueError, TypeError, AssertionError) as error:
        raise InputError(
            f"--optim.opt {config.opt!r} cannot be used: {error}; see timm.optim.list_optimizers()"
        ) from error
    if getattr(optimizer, "is_second_order", False):
        raise InputError(f"--optim.opt {config.opt!r} needs derivatives of gradients; choose one that does not")
    return optimizer


def _fused(name: str, module: nn.Module) -> dict[str, bool]:
    on_gpu = next(module.parameters()).is_cuda
    return {"fused": True} if on_gpu and get_optimizer_info(name).opt_class in _FUSED else {}


def _groups(config: OptimConfig, module: DistilledStudent) -> list[dict[str, Any]]:
    """The parameters without weight decay, then those with it."""
    positions, named = module.projector_positions(), module.no_weight_decay()
    decay_positions = config.decay_all if config.decay_positions is None else config.decay_positions
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for name, leaf in module.named_parameters():
        spared = leaf.ndim <= 1 or name.endswith(".bias") or name in named  # timm's rule
        decays = decay_positions if name in positions else config.decay_all or not spared
        groups[decays].append(leaf)
    free, decayed = groups
    return [group for group in ({"params": free, "weight_decay": 0.0}, {"params": decayed}) if group["params"]]


def make_scheduler(config: TrainConfig, optimizer: Optimizer, steps_per_epoch: int) -> Scheduler:
    """The learning rate as a function of the step: linear warm-up, then cosine over the remaining steps, or steps."""
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


def state_bytes(optimizer: Optimizer) -> int:
    """Approximate bytes of the optimizer in a checkpoint: the moments of each parameter."""
    return sum(
        (2 if "betas" in group else 1 if group.get("momentum") else 0) * _bytes(group["params"])
        for group in optimizer.param_groups
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
