"""From gradients to new weights: clipping, loss scaling, weight decay, learning rates and the moving average."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from student_trainer.trainee import Trainee
from torch import nn

from feature_store.errors import InputError
from student_trainer.config import OptimConfig, TrainConfig
from student_trainer.engine.optimizer import Updates, make_optimizer, make_scheduler
from student_trainer.methods import StudentShape, TaskOnly
from student_trainer.students.student import Student

CPU = torch.device("cpu")
PLAIN = OptimConfig(opt="momentum", lr=0.1, momentum=0.0, weight_decay=0.0)


def untrained() -> Trainee:
    student = Student("test_vit", 4, (64, 64), {"depth": 4})
    return Trainee(student, TaskOnly(TaskOnly.Config(), StudentShape(student.dims, student.grids, 4), None))


@pytest.fixture
def trainee() -> Trainee:
    torch.manual_seed(0)
    return untrained()


def config(optim: OptimConfig = PLAIN, **changes) -> TrainConfig:
    return TrainConfig(
        run=Path("r"), student="test_vit", tars=("a.tar",), method="none", optim=optim,
        **{"epochs": 10, "batch_size": 8, **changes},
    )  # fmt: skip


def weights(module: nn.Module) -> torch.Tensor:
    return torch.cat([leaf.detach().flatten() for leaf in module.parameters()])


def step_of(trainee: Trainee, config: TrainConfig, factor: float) -> torch.Tensor:
    """How far the weights move when the gradient has this norm, along (1, 1, ...)."""
    updates = Updates(config, trainee, 3, CPU)
    before = weights(trainee)
    total = sum(leaf.sum() for leaf in trainee.parameters()) * factor / len(before) ** 0.5
    updates.backward(total)
    updates.apply(1)
    return before - weights(trainee)


@pytest.mark.parametrize("amp", ["off", "float16"])
@pytest.mark.parametrize(("norm", "clipped"), [(1.0, 1.0), (8.0, 2.0)])
def test_gradients_are_clipped_at_their_true_norm_when_the_loss_is_scaled(trainee, amp, norm, clipped):
    moved = step_of(trainee, config(replace(PLAIN, clip_grad=2.0), amp=amp), norm)
    assert moved.norm() == pytest.approx(0.1 * clipped, rel=1e-3)


def test_gradients_are_whole_when_nothing_is_clipped(trainee):
    assert step_of(trainee, config(), 100.0).norm() == pytest.approx(10.0, rel=1e-3)


def test_gradients_are_dropped_and_the_rate_goes_on_when_an_update_is_made(trainee):
    updates = Updates(config(replace(PLAIN, sched="step", decay_epochs=1), epochs=3), trainee, 1, CPU)
    rates = []
    for step in (1, 2):
        rates.append(updates.lr)
        updates.backward(sum(leaf.sum() for leaf in trainee.parameters()))
        updates.apply(step)
        assert all(leaf.grad is None for leaf in trainee.parameters())
    assert [*rates, updates.lr] == pytest.approx([0.1, 0.01, 0.001])


def test_average_keeps_its_share_when_weights_move(trainee):
    updates = Updates(config(ema_decay=0.75), trainee, 3, CPU)
    seen = []
    for step in (1, 2):
        updates.backward(sum(leaf.sum() for leaf in trainee.parameters()))
        updates.apply(step)
        seen.append(weights(trainee.student.model))
    assert updates.ema is not None
    torch.testing.assert_close(weights(updates.ema.module), 0.75 * seen[0] + 0.25 * seen[1])


@pytest.mark.parametrize(
    ("changes", "averaged"),
    [({}, False), ({"ema_decay": 0.9}, True), ({"ema_decay": 0.9, "ema_eval": False}, False)],
)
def test_averaged_weights_are_validated_when_kept_and_asked_for(trainee, changes, averaged):
    updates = Updates(config(**changes), trainee, 3, CPU)
    assert (updates.validated is not trainee.student.model) == averaged


def test_optimizer_goes_on_as_before_when_its_state_is_restored(trainee):
    """AdamW with an average: the second of two steps is the same in the run that was restored after the first."""
    torch.manual_seed(0)
    other = untrained()
    settings = config(OptimConfig(), ema_decay=0.5, amp="float16")
    first, second = Updates(settings, trainee, 3, CPU), Updates(settings, other, 3, CPU)

    def step(updates: Updates, of: Trainee, number: int) -> None:
        updates.backward(sum((leaf**2).sum() for leaf in of.parameters()))
        updates.apply(number)

    step(first, trainee, 1)
    other.load_state_dict(trainee.state_dict())
    second.load_state_dict(deepcopy(first.state_dict()))
    second.scheduler.step_update(1)
    step(first, trainee, 2)
    step(second, other, 2)
    assert torch.equal(weights(trainee), weights(other))
    assert first.ema is not None
    assert second.ema is not None
    assert torch.equal(weights(first.ema.module), weights(second.ema.module))
    scales = [updates.state_dict()["scaler"] for updates in (first, second)]
    assert scales[0] == scales[1] != {}


@pytest.mark.parametrize(
    ("optim", "ema", "copies"),
    [
        (OptimConfig(), None, 2),  # both moments
        (OptimConfig(), 0.9, 3),
        (OptimConfig(opt="momentum"), None, 1),
        (PLAIN, None, 0),
    ],
)
def test_state_takes_moments_and_the_average_when_its_bytes_are_counted(trainee, optim, ema, copies):
    updates = Updates(config(optim, ema_decay=ema), trainee, 3, CPU)
    assert updates.state_bytes() == copies * 4 * len(weights(trainee))


@pytest.mark.parametrize(
    ("changes", "free"),
    [
        ({}, "norms, biases, positions"),
        ({"decay_all": True}, ""),
    ],
)
def test_weight_decay_spares_what_timm_spares_unless_told_otherwise(trainee, changes, free):
    optimizer = make_optimizer(OptimConfig(weight_decay=0.3, **changes), trainee)
    decays = {id(leaf): group["weight_decay"] for group in optimizer.param_groups for leaf in group["params"]}
    for name, leaf in trainee.named_parameters():
        spared = bool(free) and (leaf.ndim <= 1 or name.endswith((".bias", "pos_embed", "cls_token")))
        assert decays[id(leaf)] == (0.0 if spared else 0.3), name


@pytest.mark.parametrize(
    ("opt", "message"),
    [
        ("adamx", r"--optim.opt 'adamx' cannot be used: .*timm.optim.list_optimizers\(\)"),
        ("adahessian", "--optim.opt 'adahessian' needs derivatives of gradients"),
    ],
)
def test_optimizer_is_refused_when_timm_has_none_or_it_needs_more(trainee, opt, message):
    with pytest.raises(InputError, match=message):
        make_optimizer(OptimConfig(opt=opt), trainee)


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


def test_rate_warms_up_and_falls_to_its_least_when_cosine(trainee):
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
