"""From gradients to new weights: clipping, loss scaling, weight decay, learning rates and the moving average."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from training_world import train_config

from feature_store.errors import InputError
from student_trainer.config import OptimConfig, TrainConfig
from student_trainer.data.loader import BatchLoader
from student_trainer.distilled import DistilledStudent
from student_trainer.engine.optimizer import make_optimizer, make_scheduler, state_bytes
from student_trainer.methods import DistillBatch, Terms
from student_trainer.plan import resolve
from student_trainer.train import Run

PLAIN = OptimConfig(opt="momentum", lr=0.1, momentum=0.0, weight_decay=0.0)


class Sloped(nn.Module):
    """In place of student and method: a loss whose gradient has this norm, along (1, 1, ...)."""

    def __init__(self, module: nn.Module, norm: float = 1.0) -> None:
        super().__init__()
        self.module, self.norm = module, norm

    def forward(self, batch: DistillBatch, task_factor: torch.Tensor | None = None) -> Terms:
        slope = self.norm / len(weights(self.module)) ** 0.5
        return Terms({"task": sum(leaf.sum() for leaf in self.module.parameters()) * slope}, {"task": 1.0})


def config(optim: OptimConfig = PLAIN, **changes) -> TrainConfig:
    asked = {"method": "none", "student": "test_vit", "student_kwargs": {"depth": 4}, "device": "cpu", **changes}
    return train_config(Path("r"), optim=optim, **asked)


def run_of(optim: OptimConfig = PLAIN, norm: float = 1.0, **changes) -> Run:
    run = Run(resolve(config(optim, **changes)))
    run.module = Sloped(run.module, norm)
    return run


def step(run: Run) -> torch.Tensor:
    """How far the weights move in one step."""
    batch, before = next(iter(BatchLoader(run.plan.dataset, run.plan.sampler))), weights(run.module)
    run.step([batch])
    return before - weights(run.module)


def weights(module: nn.Module) -> torch.Tensor:
    return torch.cat([leaf.detach().flatten() for leaf in module.parameters()])


@pytest.mark.parametrize("amp", ["off", "float16"])
@pytest.mark.parametrize(("norm", "clipped"), [(1.0, 1.0), (8.0, 2.0)])
def test_gradients_are_clipped_at_their_true_norm_when_the_loss_is_scaled(amp, norm, clipped):
    assert step(run_of(replace(PLAIN, clip_grad=2.0), norm, amp=amp)).norm() == pytest.approx(0.1 * clipped, rel=1e-3)


def test_gradients_are_whole_when_nothing_is_clipped():
    assert step(run_of(norm=100.0)).norm() == pytest.approx(10.0, rel=1e-3)


def test_gradients_are_dropped_and_the_rate_goes_on_when_an_update_is_made():
    run = run_of(replace(PLAIN, sched="step", decay_epochs=1), epochs=3, batch_size=25)
    rates = []
    for _ in range(2):
        rates.append(run.optimizer.param_groups[0]["lr"])
        step(run)
        assert all(leaf.grad is None for leaf in run.module.parameters())
    assert [*rates, run.optimizer.param_groups[0]["lr"]] == pytest.approx([0.1, 0.01, 0.001])


def test_average_keeps_its_share_when_weights_move():
    run, seen = run_of(ema_decay=0.75), []
    for _ in range(2):
        step(run)
        seen.append(weights(run.student.model))
    assert run.ema is not None
    torch.testing.assert_close(weights(run.ema.module), 0.75 * seen[0] + 0.25 * seen[1])


@pytest.mark.parametrize(
    ("changes", "averaged"),
    [({}, False), ({"ema_decay": 0.9}, True), ({"ema_decay": 0.9, "ema_eval": False}, False)],
)
def test_averaged_weights_are_validated_when_kept_and_asked_for(changes, averaged):
    run = run_of(**changes)
    assert (run.eval_model is not run.student.model) == averaged


def test_run_goes_on_as_before_when_its_state_is_restored():
    """AdamW with an average: the second of two steps is the same in the run that was restored after the first."""
    first, second = (run_of(OptimConfig(), ema_decay=0.5, amp="float16", seed=seed) for seed in (0, 1))
    step(first)
    second.restore(first.checkpoint())
    second.scheduler.step_update(1)
    for run in (first, second):
        step(run)
    assert torch.equal(weights(first.module), weights(second.module))
    assert first.ema is not None
    assert second.ema is not None
    assert torch.equal(weights(first.ema.module), weights(second.ema.module))
    assert first.checkpoint().scaler == second.checkpoint().scaler != {}


@pytest.mark.parametrize(("optim", "copies"), [(OptimConfig(), 2), (OptimConfig(opt="momentum"), 1), (PLAIN, 0)])
def test_moments_of_the_optimizer_are_counted_in_bytes(optim, copies):
    run = run_of(optim)
    assert state_bytes(run.optimizer) == copies * 4 * len(weights(run.module))


@pytest.fixture
def module() -> DistilledStudent:
    return resolve(config()).distilled


@pytest.mark.parametrize(
    ("changes", "free"),
    [
        ({}, "norms, biases, positions"),
        ({"decay_all": True}, ""),
    ],
)
def test_weight_decay_spares_what_timm_spares_unless_told_otherwise(module, changes, free):
    optimizer = make_optimizer(OptimConfig(weight_decay=0.3, **changes), module)
    decays = {id(leaf): group["weight_decay"] for group in optimizer.param_groups for leaf in group["params"]}
    for name, leaf in module.named_parameters():
        spared = bool(free) and (leaf.ndim <= 1 or name.endswith((".bias", "pos_embed", "cls_token")))
        assert decays[id(leaf)] == (0.0 if spared else 0.3), name


@pytest.mark.parametrize(
    ("opt", "message"),
    [
        ("adamx", r"--optim.opt 'adamx' cannot be used: .*timm.optim.list_optimizers\(\)"),
        ("adahessian", "--optim.opt 'adahessian' needs derivatives of gradients"),
    ],
)
def test_optimizer_is_refused_when_timm_has_none_or_it_needs_more(module, opt, message):
    with pytest.raises(InputError, match=message):
        make_optimizer(OptimConfig(opt=opt), module)


def rates(**optim) -> list[float]:
    """Learning rates of 4 epochs of 5 steps, and after them."""
    settings = config(OptimConfig(lr=1.0, **optim), epochs=4)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make_scheduler(settings, optimizer, steps_per_epoch=5)
    seen = [optimizer.param_groups[0]["lr"]]
    for step in range(1, 21):
        scheduler.step_update(step)
        seen.append(optimizer.param_groups[0]["lr"])
    return seen


def test_rate_warms_up_and_falls_to_its_least_when_cosine():
    seen = rates(warmup_epochs=2, warmup_lr=0.5, min_lr=0.25)
    assert seen[:11] == pytest.approx([0.5 + 0.05 * step for step in range(11)])  # 2 epochs of 5 steps
    assert seen[15] == pytest.approx((1.0 + 0.25) / 2)
    assert seen[20] == pytest.approx(0.25)
    assert seen[10:] == sorted(seen[10:], reverse=True)


def test_rate_falls_at_its_epochs_counted_from_the_first_when_in_steps():
    seen = rates(sched="step", decay_epochs=2, decay_rate=0.5, warmup_epochs=1, warmup_lr=0.0)
    assert seen[:6] == pytest.approx([0.2 * step for step in range(6)])
    assert seen[5:10] == pytest.approx([1.0] * 5)
    assert seen[10:20] == pytest.approx([0.5] * 10)


def test_rate_follows_the_batch_when_the_schedule_is_built():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.25)
    settings = config(OptimConfig(lr=1.0, lr_batch=32, min_lr=0.4), epochs=2)  # a batch of 8
    scheduler = make_scheduler(settings, optimizer, steps_per_epoch=5)
    scheduler.step_update(10)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)
