"""The five released schedules: T1, T2, A1, A2, A3.

Rates are written down for the batch size they were released for; ``OptimConfig.at`` scales them with the real one.
That is this project's rule: the released code uses its rates as written at any batch. SGD and AdamW scale in
proportion; LAMB with the square root, as in timm's training script, because its step is already normalised by the
weights' norm.
"""

from dataclasses import dataclass, field
from typing import Any

from feature_store.views import PolicyName
from student_trainer.config import OptimConfig


@dataclass(frozen=True)
class Schedule:
    """Training settings that do not depend on the pair.

    Attributes:
        name: T1, T2, A1, A2 or A3.
        policy: View policy to cache with, ``teacher-service cache --policy``.
        epochs: Passes over the samples.
        batch_size: Samples per step that the rates are for.
        optim: Optimizer and rates.
        more: Other options of TrainConfig.
    """

    name: str
    policy: PolicyName
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
    more={"ema_decay": 1 - 1e-4, "label_smoothing": 0.1},
)
A3 = Schedule(
    name="A3",
    policy="a3",
    epochs=300,
    batch_size=1536,
    optim=OptimConfig(
        opt="adamw",
        lr=7e-4,
        lr_batch=1536,
        weight_decay=0.067,
        decay_all=True,
        decay_positions=False,
        clip_grad=1.0,
        sched="cosine",
        min_lr=0.0,
        warmup_epochs=20,
        warmup_lr=1e-6 * 7e-4,
    ),
)
SCHEDULES = {schedule.name: schedule for schedule in (T1, T2, A1, A2, A3)}
