"""A run that stops anywhere goes on as if it had not: same metrics and same weights, to the bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from training_world import shared_world

from feature_store.errors import InputError, MismatchError
from student_trainer.checkpoint import load_checkpoint
from student_trainer.config import OptimConfig, TeacherConfig, TrainConfig
from student_trainer.metrics import read_metrics
from student_trainer.scalekd import ScaleKDConfig
from student_trainer.train import Trainer, train

# Python 3.12 and later warn of fork under threads
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")

TIMING = {"images_per_second", "data_wait", "seconds_per_step", "teacher_seconds"}


class Killed(BaseException):
    """Stands in for SIGKILL: nothing in the trainer may handle it."""


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    world = shared_world()
    return TrainConfig(
        run=tmp_path / "run",
        student="test_vit",
        student_kwargs={"drop_path_rate": 0.3, "depth": 4},  # draws random numbers in every step
        tars=world.tars,
        val_tars=world.val_tars,
        store=world.store,
        epochs=3,
        batch_size=8,
        workers=0,
        log_every=1,
        checkpoint_every=2,
        optim=OptimConfig(lr=1e-3, warmup_epochs=1),
        progress=False,
    )


def numbers(run) -> list[dict]:
    """What must be the same: everything but times."""
    lines = (line for line in read_metrics(run / "metrics.jsonl") if line["kind"] != "start")
    return [{name: value for name, value in line.items() if name not in TIMING} for line in lines]


def assert_equal_runs(run, other) -> None:
    assert numbers(run) == numbers(other)
    for name in ("last.pt", "best.pt"):
        mine, theirs = load_checkpoint(run / name), load_checkpoint(other / name)
        for part in ("weights", "loss"):
            a, b = getattr(mine, part), getattr(theirs, part)
            assert a.keys() == b.keys()
            assert all(torch.equal(a[key], b[key]) for key in a)
        assert replace(mine.progress, teacher_seconds=0.0) == replace(theirs.progress, teacher_seconds=0.0)
        assert torch.equal(mine.rng["cpu"], theirs.rng["cpu"])


def die_after(monkeypatch, steps: int, method: str = "step") -> None:
    whole, done = getattr(Trainer, method), []

    def dying(self, *arguments):
        if len(done) == steps:
            raise Killed
        done.append(1)
        return whole(self, *arguments)

    monkeypatch.setattr(Trainer, method, dying)


# checkpoints lie at steps 2, 3 (epoch end), 4, 6 (epoch end), 8: in mid-epoch, at its end, and before the first
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8])
def test_run_is_the_uninterrupted_one_to_the_bit_when_killed_and_resumed(config, tmp_path, monkeypatch, steps):
    whole = train(replace(config, run=tmp_path / "whole"))
    with monkeypatch.context() as patch:
        die_after(patch, steps)
        with pytest.raises(Killed):
            train(config)
    resumed = train(replace(config, resume=True))
    assert_equal_runs(config.run, tmp_path / "whole")
    assert resumed.steps == whole.steps == 9
    assert resumed.best_top1 == whole.best_top1
    assert len(resumed.history) == 3


def test_run_repeats_the_end_of_an_epoch_when_killed_between_its_line_and_its_checkpoint(config, tmp_path, monkeypatch):
    train(replace(config, run=tmp_path / "whole"))
    with monkeypatch.context() as patch:
        die_after(patch, 3, "checkpoint")  # step 2, best and last of epoch 0; dies at step 4's
        with pytest.raises(Killed):
            train(config)
    with monkeypatch.context() as patch:
        die_after(patch, 1, "checkpoint")  # step 4's; dies at the end of epoch 1, whose line is written by then
        with pytest.raises(Killed):
            train(replace(config, resume=True))
    assert numbers(config.run)[-1]["kind"] == "epoch"
    train(replace(config, resume=True))
    assert_equal_runs(config.run, tmp_path / "whole")


def test_run_is_the_uninterrupted_one_when_live_and_resumed(config, tmp_path, monkeypatch):
    world = shared_world()
    config = replace(config, source="live", teacher=TeacherConfig(checkpoint=world.checkpoint), epochs=2)
    train(replace(config, run=tmp_path / "whole"))
    with monkeypatch.context() as patch:
        die_after(patch, 4)
        with pytest.raises(Killed):
            train(config)
    before = load_checkpoint(config.run / "last.pt").progress.teacher_seconds
    resumed = train(replace(config, resume=True))
    assert_equal_runs(config.run, tmp_path / "whole")
    assert resumed.teacher_seconds > before > 0


def test_run_with_workers_is_the_one_without_when_resumed(config, tmp_path, monkeypatch):
    config = replace(config, epochs=2)
    train(replace(config, run=tmp_path / "whole"))
    with monkeypatch.context() as patch:
        die_after(patch, 2)
        with pytest.raises(Killed):
            train(config)
    train(replace(config, resume=True, workers=1, start_method="fork"))
    assert_equal_runs(config.run, tmp_path / "whole")


def test_finished_run_gives_its_result_when_resumed(config):
    result = train(config)
    again = train(replace(config, resume=True))
    assert again == replace(result, seconds_per_step=None)


def test_run_starts_when_resumed_before_it_began(config):
    assert train(replace(config, resume=True, epochs=1)).steps == 3


def test_run_is_the_uninterrupted_one_when_the_process_is_killed(config, tmp_path):
    train(replace(config, run=tmp_path / "whole"))
    arguments = [
        sys.executable, "-m", "student_trainer", "train", "--run", str(config.run), "--student", config.student,
        "--student-kwargs", json.dumps(config.student_kwargs), "--store", str(config.store), "--tars", *config.tars,
        "--val-tars", *config.val_tars, "--epochs", "3", "--batch-size", "8", "--workers", "0", "--log-every", "1",
        "--checkpoint-every", "2", "--optim.lr", "1e-3", "--optim.warmup-epochs", "1", "--no-progress",
    ]  # fmt: skip
    process = subprocess.Popen(arguments, env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())})
    deadline = time.monotonic() + 60
    while not (config.run / "last.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    train(replace(config, resume=True))
    assert_equal_runs(config.run, tmp_path / "whole")


def test_run_is_refused_when_its_folder_exists_and_resume_is_not_asked(config):
    train(replace(config, epochs=1, method="none"))
    with pytest.raises(InputError, match=r"--run .*run already exists; add --resume to continue it"):
        train(replace(config, epochs=1, method="none"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 4}, r"config.batch_size differs: the run has 8, got 4; resume with the settings"),
        ({"optim": OptimConfig(lr=1e-3)}, r"config.optim.warmup_epochs differs: the run has 1, got 0"),
        ({"scalekd": ScaleKDConfig(tpp=False)}, r"config.scalekd.tpp differs: the run has True, got False"),
        ({"val_tars": ()}, r"inputs.val_tars(.val-0.tar)? differs"),
    ],
)
def test_run_is_refused_when_resumed_with_other_settings(config, change, message):
    train(replace(config, epochs=1))
    with pytest.raises(MismatchError, match=message):
        train(replace(config, epochs=1, resume=True, **change))


def test_run_is_refused_when_resumed_with_another_store(config, tmp_path):
    train(replace(config, epochs=1))
    other = shared_world("vit", "f32")
    with pytest.raises(MismatchError, match=r"inputs.store differs: the run has '[0-9a-f]+', got '[0-9a-f]+'"):
        train(replace(config, epochs=1, resume=True, store=other.store))


def test_run_resumes_when_the_store_moved(config, tmp_path):
    train(replace(config, epochs=1))
    shutil.copytree(config.store, tmp_path / "moved")
    assert train(replace(config, epochs=1, resume=True, store=tmp_path / "moved")).steps == 3


def test_run_is_refused_when_its_checkpoint_is_of_another_model(config):
    train(replace(config, epochs=1))
    saved = json.loads((config.run / "config.json").read_text())
    saved["config"]["student"] = "test_vit2"
    (config.run / "config.json").write_text(json.dumps(saved))
    with pytest.raises(InputError, match=r"the checkpoint does not fit the run: .*; resume with the versions"):
        train(replace(config, epochs=1, resume=True, student="test_vit2"))
