"""The four released schedules: T1 and T2 (traditional), A1 and A2 (advanced).

Rates are written down for the released batch size; ``OptimConfig.at`` scales them with the real one. SGD and AdamW
scale in proportion, as the released code's runner does; LAMB with the square root, as timm's training script does,
because its step is already normalised by the weights' norm.
"""

from dataclasses import dataclass, field
from typing import Any

from student_trainer.config import OptimConfig


@dataclass(frozen=True)
class Schedule:
    """How a student is trained, whatever the pair.

    Attributes:
        name: T1, T2, A1 or A2.
        policy: View policy to cache with, ``teacher-service cache --policy``.
        epochs: Passes over the samples.
        batch_size: Samples per step that the rates are for.
        optim: Optimizer and rates.
        more: Other options of TrainConfig.
    """

    name: str
    policy: str
    epochs: int
    batch_size: int
    optim: OptimConfig
    more: dict[str, Any] = field(default_factory=dict)

    def options(self) -> dict[str, Any]:
        """Options of TrainConfig."""
        return {"epochs": self.epochs, "batch_size": self.batch_size, "optim": self.optim, **self.more}


_SGD = {"opt": "momentum", "lr": 0.1, "lr_batch": 256, "momentum": 0.9, "weight_decay": 1e-4, "decay_all": True}

T1 = Schedule(
    name="T1",
    policy="rrc_flip",
    epochs=100,
    batch_size=256,
    optim=OptimConfig(**_SGD, sched="step", decay_epochs=30, decay_rate=0.1),
    more={"sync_bn": True},
)
T2 = Schedule(
    name="T2",
    policy="rrc_flip",
    epochs=100,
    batch_size=256,
    optim=OptimConfig(**_SGD, sched="cosine", min_lr=0.0),
)
A1 = Schedule(
    name="A1",
    policy="a1",
    epochs=300,
    batch_size=2048,
    optim=OptimConfig(
        opt="lamb",
        lr=5e-3,
        lr_batch=2048,
        lr_scale="sqrt",
        weight_decay=0.02,
        decay_all=True,
        clip_grad=5.0,
        sched="cosine",
        min_lr=0.0,
        warmup_epochs=5,
        warmup_lr=0.25 * 5e-3,
    ),
)
A2 = Schedule(
    name="A2",
    policy="a2",
    epochs=300,
    batch_size=1024,
    optim=OptimConfig(
        opt="adamw",
        lr=1e-3,
        lr_batch=1024,
        weight_decay=0.05,
        clip_grad=5.0,
        sched="cosine",
        min_lr=1e-5,
        warmup_epochs=20,
        warmup_lr=1e-6,
    ),
    more={"ema_decay": 1 - 1e-4},
)
SCHEDULES = {schedule.name: schedule for schedule in (T1, T2, A1, A2)}
