"""Sweeps whose runs are processes: one of them killed, or the whole sweep told to end."""

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from forked_programs import Program
from training_world import shared_world

from feature_store.errors import FailedError
from student_trainer.sweeps.compare import CompareConfig, compare

SECONDS = 120  # until something that takes seconds counts as hanging


def sweep(folder: Path, settings: str) -> CompareConfig:
    """Runs of a student without a teacher, two at a time."""
    world = shared_world()
    (folder / "sweep.yaml").write_text(f"{{settings: {settings}, seeds: [0]}}")
    changes = {
        "student": "test_resnet", "method": "none", "num_classes": 4, "views.size": 64, "device": "cpu",
        "tars": f"[{', '.join(world.tars)}]", "val_tars": world.val_tars[0], "batch_size": 4, "workers": 0,
        "checkpoint_every": 1, "report": "false",
    }  # fmt: skip
    settings_of_all = tuple(f"{name}={value}" for name, value in changes.items())
    return CompareConfig(sweep=folder / "sweep.yaml", out=folder / "out", set=settings_of_all, processes=2)


def wait_until(happened: Callable[[], object]) -> None:
    until = time.monotonic() + SECONDS
    while not happened():
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.05)


def steps(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.is_file() else 0


def is_finished(run: Path) -> bool:
    progress = run / "progress.json"
    return progress.is_file() and json.loads(progress.read_text())["finished"]


def when(happened: Callable[[], object], do: Callable[[], object]) -> threading.Thread:
    """Do something in a thread as soon as something else happened."""
    thread = threading.Thread(target=lambda: (wait_until(happened), do()))
    thread.start()
    return thread


def test_other_runs_finish_when_one_is_killed(tmp_path, capsys):
    config = sweep(tmp_path, "{killed: {epochs: 400, val_every: 400, log_every: 1}, other: {epochs: 1}}")
    runs = config.folder / "runs"

    def kill() -> None:
        (process,) = (p for p in multiprocessing.active_children() if p.name.endswith("killed-seed0"))
        process.kill()

    killer = when(lambda: steps(runs / "killed-seed0") > 2, kill)
    with pytest.raises(FailedError, match=r"1 of 2 runs failed.*\n  killed, seed 0: its process was ended by SIGKILL"):
        compare(config)
    killer.join()
    assert [len(row["runs"]) for row in json.loads((config.folder / "results.json").read_text())["settings"]] == [0, 1]
    assert "other, seed 0: finished" in capsys.readouterr().err
    assert is_finished(runs / "other-seed0")
    assert not is_finished(runs / "killed-seed0")


def test_runs_end_with_the_sweep_when_it_is_killed(tmp_path):
    config = sweep(tmp_path, "{one: {epochs: 100000, val_every: 100000, log_every: 1}}")
    command = ["compare", config.sweep, "--out", config.folder, "--processes", "2", "--set", *config.set]
    main = Program("student-trainer", command, tmp_path)
    one = config.folder / "runs" / "one-seed0"
    wait_until(lambda: steps(one) > 2)
    children = Path(f"/proc/{main.pid}/task/{main.pid}/children").read_text().split()
    main.kill()
    assert len(children) >= 1
    wait_until(lambda: not any(Path(f"/proc/{child}").exists() for child in children))
    done = steps(one)
    time.sleep(0.3)
    assert steps(one) == done


@pytest.mark.parametrize(("number", "ends"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_runs_end_with_the_sweep_when_it_is_told_to(tmp_path, number, ends):
    config = sweep(tmp_path, "{one: {epochs: 100000, val_every: 100000, log_every: 1}}")
    one = config.folder / "runs" / "one-seed0"
    sender = when(lambda: steps(one) > 2, lambda: os.kill(os.getpid(), number))
    with pytest.raises(ends):
        compare(config)
    sender.join()
    assert not multiprocessing.active_children()
    assert not is_finished(one)
