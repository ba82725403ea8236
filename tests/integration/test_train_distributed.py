"""Several processes train as one: same losses, one writer, one error, exact resume. Gloo, on CPUs."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import pytest
import torch
import torch.distributed as dist
from process_runs import kill, poison_second_process, run_alone, run_group, start_group, wait_for_lines
from torch import nn
from training_world import TIMING, changed, samples, shared_world, train_config, write_tar

from feature_store.errors import UserError
from student_trainer.config import OptimConfig, TrainConfig
from student_trainer.engine.checkpoint import load_checkpoint
from student_trainer.engine.distributed import Group
from student_trainer.engine.metrics import read_metrics
from student_trainer.evaluate import Accuracy, EvaluateConfig, Evaluator, evaluate
from student_trainer.methods.scalekd import ScaleKDConfig
from student_trainer.plan import resolve
from student_trainer.teachers.config import ViewsConfig


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    """A run without BatchNorm: several processes and one see the same."""
    return train_config(
        tmp_path / "run",
        student="test_vit",
        student_kwargs={"depth": 4},
        val_tars=shared_world().val_tars,
        epochs=3,
        scalekd=ScaleKDConfig(norm="layer"),
        # small steps of plain SGD: sums in another order differ in the last bit, and large steps or Adam's division
        # by tiny second moments would make more of that
        optim=OptimConfig(opt="momentum", lr=3e-4, clip_grad=10.0),
        device="cpu",
    )


def lines(config: TrainConfig, kind: str) -> list[dict]:
    found = (line for line in read_metrics(config.run / "metrics.jsonl") if line["kind"] == kind)
    return [{name: value for name, value in line.items() if name not in TIMING} for line in found]


def images_per_step(config: TrainConfig) -> float:
    """Images of all processes, as the logged throughput and the median time of a step have it; all steps are logged."""
    logged = read_metrics(config.run / "metrics.jsonl")
    paces = [1 / line["speed"]["images_per_second"] for line in logged if line["kind"] == "step"]
    last = next(line for line in reversed(logged) if line["kind"] == "epoch")
    return last["speed"]["seconds_per_step"] / median(paces)


def assert_same_curves(config: TrainConfig, other: TrainConfig) -> None:
    mine, theirs = lines(config, "step"), lines(other, "step")
    assert len(mine) == len(theirs) == 9
    for a, b in zip(mine, theirs, strict=True):
        assert (a["step"], a["lr"]) == (b["step"], b["lr"])
        for group in ("loss", "raw"):
            assert a[group] == pytest.approx(b[group], rel=1e-4)


def test_two_processes_give_the_losses_of_one_when_they_share_a_batch(config, tmp_path):
    alone = replace(config, run=tmp_path / "alone")
    assert run_alone(alone) == {"steps": 9}
    split = replace(config, accumulate=2)
    assert run_group(config, 2) == run_group(replace(split, run=tmp_path / "split"), 2) == [{"steps": 9}] * 2
    assert_same_curves(config, alone)
    assert_same_curves(replace(split, run=tmp_path / "split"), alone)
    assert [line["val"]["samples"] for line in lines(config, "epoch")] == [10, 10, 10]
    for run in (config, alone):
        assert images_per_step(run) == pytest.approx(8, rel=1e-6)
    assert lines(config, "start") == lines(alone, "start")
    weights, expected = (load_checkpoint(c.run / "last.pt").weights for c in (config, alone))
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5)


def test_group_goes_on_to_the_bit_when_killed_and_resumed(config, tmp_path):
    """With what a process has for itself: drop path's random numbers, and BatchNorm statistics."""
    config = replace(
        config,
        student="test_convnext",
        student_kwargs={"drop_path_rate": 0.3},
        scalekd=ScaleKDConfig(),
        ema_decay=0.9,
        checkpoint_every=2,
    )
    whole = replace(config, run=tmp_path / "whole")
    assert run_group(whole, 2) == [{"steps": 9}] * 2
    processes = start_group(config, 2)
    assert wait_for_lines(config, 7, processes)  # start, 3 steps, epoch, 2 steps: beyond the checkpoint at step 4
    kill(processes)
    assert run_group(replace(config, resume=True), 2) == [{"steps": 9}] * 2
    for kind in ("step", "epoch"):
        assert lines(config, kind) == lines(whole, kind)
    mine, theirs = load_checkpoint(config.run / "last.pt"), load_checkpoint(whole.run / "last.pt")
    for part in ("weights", "loss", "ema"):
        a, b = getattr(mine, part), getattr(theirs, part)
        assert all(torch.equal(a[name], b[name]) for name in b)
    states = [state["cpu"] for state in mine.rng]
    assert all(torch.equal(a, b["cpu"]) for a, b in zip(states, theirs.rng, strict=True))
    assert not torch.equal(*states)  # each process draws its own


@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_group_validates_the_student_that_it_saves_when_that_has_batchnorm(config, ema_decay):
    config = replace(config, student="test_resnet", student_kwargs={}, method="none", ema_decay=ema_decay, epochs=1)
    assert run_group(config, 2, require_one_student) == [{"steps": 3}] * 2
    (epoch,) = lines(config, "epoch")
    saved = evaluate(EvaluateConfig(checkpoint=config.run / "last.pt", tars=config.val_tars, workers=0, device="cpu"))
    assert epoch["val"]["top1"] == saved.accuracy.top1


def require_one_student() -> None:
    """Refuse to validate a student of which any process has other weights or statistics."""
    validate = Evaluator.unless_stopped

    def checked(self: Evaluator, model: nn.Module, stop: Callable[[], bool]) -> Accuracy | None:
        own = {name: value.clone() for name, value in model.state_dict().items()}
        others = [None] * dist.get_world_size()
        dist.all_gather_object(others, own)
        if differing := [name for name in own for other in others if not torch.equal(own[name], other[name])]:
            raise UserError(f"processes validate different students: {differing}")
        return validate(self, model, stop)

    Evaluator.unless_stopped = checked


def test_group_names_the_rows_of_the_process_whose_loss_is_not_finite(config):
    first, second = run_group(config, 2, poison_second_process)
    assert second["error"].startswith("OtherProcessError: another process of the run failed: the loss")
    assert first["error"].startswith("UserError: the loss is not finite at step 2 (epoch 0): task ")
    rows = list(resolve(config, group=Group(1, 2)).sampler)[2]
    assert f"first rows of the batch: unit {rows[0].unit} position {rows[0].position} view 0" in first["error"]


def test_group_ends_with_one_reason_when_one_of_its_processes_has_bad_data(config, tmp_path):
    content = samples(16, seed=1)
    for sample in content[::2]:
        sample["png"] = b"not an image"
    tar = write_tar(tmp_path / "bad.tar", content)
    alone = {"method": "none", "num_classes": 4, "views": ViewsConfig(size=64), "store": None, "val_tars": ()}
    outcomes = run_group(changed(config, tars=(tar,), batch_size=2, **alone), 2)
    reasons = sorted(outcome["error"].split(";")[0] for outcome in outcomes)
    assert reasons[0].startswith("InputError: no image of a batch can be read: bad.tar/")
    assert reasons[1] == "ResourceError: another process of the run ended"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sync_bn": True}, "InputError: --sync-bn with several processes needs GPUs"),
        ({"batch_size": 9}, "InputError: a batch of 9 cannot be shared by 2 processes in 1 passes each"),
        ({"device": "cuda:0"}, "InputError: --device is cuda:0, but 2 processes were started; use --device cuda"),
    ],
)
def test_group_is_refused_once_when_it_cannot_train(config, change, message):
    first, second = run_group(replace(config, **change), 2)
    assert first["error"].startswith(message)
    assert not config.run.exists()
    if "device" not in change:  # that one is met before the processes know each other
        assert second["error"].startswith("OtherProcessError: another process of the run failed")


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_run_goes_on_with_another_number_of_processes_on_the_same_samples(config, tmp_path, before, after):
    """Without random numbers in a step, the losses stay those of one process, up to rounding."""
    alone = replace(config, run=tmp_path / "alone")
    assert run_alone(alone) == {"steps": 9}
    processes = start_group(replace(config, checkpoint_every=2), before)
    assert wait_for_lines(config, 7, processes)  # start, 3 steps, epoch, 2 steps: beyond the checkpoint at step 4
    kill(processes)
    resumed = replace(config, resume=True, checkpoint_every=2)
    assert run_group(resumed, after) == [{"steps": 9}] * after
    assert_same_curves(config, alone)
    *_, start = lines(config, "start")
    assert any(f"processes {before} before, {after} from here on: the same samples" in note for note in start["notes"])


def test_torchrun_trains_and_prints_once_when_it_starts_the_command(config, tmp_path):
    arguments = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "--", "student_trainer", "train", "--run", str(config.run), "--student", config.student,
        "--device", "cpu",
        "--student-kwargs", json.dumps(config.student_kwargs), "--store", config.teacher.store, "--tars", *config.tars,
        "--epochs", "1", "--batch-size", "8", "--workers", "0", "--scalekd.norm", "layer", "--json",
    ]  # fmt: skip
    done = subprocess.run(
        arguments, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 3
    assert done.stderr.count("epoch 1/1: loss") == 1
    assert len(lines(config, "epoch")) == 1
