"""Training on a GPU: autocast, pinned copies, NCCL, synchronised BatchNorm, deterministic, compiled, live teacher."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from process_runs import run_group
from training_world import changed, shared_world, train_config

from student_trainer.config import OptimConfig, TrainConfig
from student_trainer.data.loader import BatchLoader
from student_trainer.engine.checkpoint import load_checkpoint
from student_trainer.engine.metrics import read_metrics
from student_trainer.plan import resolve
from student_trainer.teachers.config import LiveOptions
from student_trainer.train import Run, train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    return train_config(tmp_path / "run", device="cuda", epochs=2, optim=OptimConfig(lr=1e-3))


def totals(run: Path) -> list[float]:
    return [line["loss"]["total"] for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "step"]


def test_losses_are_those_of_a_cpu_when_in_float32(config, tmp_path):
    optim = OptimConfig("momentum", lr=1e-3)
    train(replace(config, optim=optim))
    train(replace(config, optim=optim, run=tmp_path / "cpu", device="cpu"))
    assert totals(config.run) == pytest.approx(totals(tmp_path / "cpu"), rel=1e-3)


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_autocast_stays_close_to_float32(config, tmp_path, amp):
    train(replace(config, amp=amp))
    train(replace(config, run=tmp_path / "exact"))
    assert totals(config.run)[0] == pytest.approx(totals(tmp_path / "exact")[0], rel=0.05)


def test_batches_are_pinned_and_workers_feed_the_device(config):
    run = Run(resolve(replace(config, workers=2)))
    batch = next(iter(BatchLoader(run.plan.dataset, run.plan.sampler, workers=2, pin=True)))
    assert batch.pixels.is_pinned()
    run.close()
    assert train(replace(config, workers=2)).steps == 6


def test_live_teacher_gives_the_losses_of_the_store(config, tmp_path):
    train(replace(config, epochs=1))
    live = changed(
        config, run=tmp_path / "live", source="live", teacher=LiveOptions(checkpoint=shared_world().checkpoint)
    )
    result = train(replace(live, epochs=1))
    assert totals(live.run)[0] == pytest.approx(totals(config.run)[0], rel=1e-2)
    assert result.teacher_seconds > 0


def test_deterministic_runs_repeat_to_the_bit(config, tmp_path):
    weights = []
    for name in ("first", "second"):
        train(replace(config, run=tmp_path / name, deterministic=True))
        weights.append(load_checkpoint(tmp_path / name / "last.pt").weights)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_compiled_run_trains(config):
    assert train(replace(config, compile=True, epochs=1)).steps == 3


def test_a_group_of_one_over_nccl_trains_with_synchronised_batchnorm(config):
    assert run_group(replace(config, sync_bn=True), 1) == [{"steps": 6}]


def test_loss_that_is_not_finite_ends_the_run_at_the_next_logged_step_with_the_checkpoint_kept(config):
    broken = replace(config, epochs=3, log_every=2, optim=OptimConfig("momentum", lr=1e30))
    with pytest.raises(Exception, match=r"not finite"):
        train(broken)
