"""A run that a signal stops: it ends within seconds, says so, and goes on as if it had not stopped, to the bit."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forked_programs import Program
from process_runs import run_group, start_group, wait_for_lines
from stopped_runs import at_update
from training_world import TIMING, shared_world, train_config

import student_trainer.engine.run_folder
import student_trainer.train
from feature_store.errors import ResourceError
from student_trainer.config import OptimConfig, TrainConfig
from student_trainer.data.batch import ViewDataset
from student_trainer.engine.checkpoint import load_checkpoint
from student_trainer.engine.metrics import read_metrics
from student_trainer.engine.run_folder import reserved
from student_trainer.evaluate import EvaluateConfig, Evaluator, evaluate
from student_trainer.train import train

# Python 3.12 and later warn of fork under threads
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")

CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129, signal.SIGUSR1: 138}


def config_of(run: Path) -> TrainConfig:
    """Three epochs of three steps, each step with random numbers of its own."""
    return train_config(
        run, student="test_vit", student_kwargs={"drop_path_rate": 0.3, "depth": 2}, val_tars=shared_world().val_tars,
        epochs=3, optim=OptimConfig(lr=1e-3), device="cpu",
    )  # fmt: skip


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    return config_of(tmp_path / "run")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> TrainConfig:
    """The same run, never stopped."""
    whole = config_of(tmp_path_factory.mktemp("whole") / "run")
    train(whole)
    return whole


def numbers(run: Path) -> list[dict]:
    lines = (line for line in read_metrics(run / "metrics.jsonl") if line["kind"] != "start")
    return [{name: value for name, value in line.items() if name not in TIMING} for line in lines]


def assert_equal(run: TrainConfig, other: TrainConfig) -> None:
    assert numbers(run.run) == numbers(other.run)
    mine, theirs = load_checkpoint(run.run / "last.pt"), load_checkpoint(other.run / "last.pt")
    for part in ("weights", "loss"):
        a, b = getattr(mine, part), getattr(theirs, part)
        assert all(torch.equal(a[name], b[name]) for name in b)


def signalled(monkeypatch, owner: object, name: str, at: int, send: Callable[[], None]) -> None:
    """Send a signal in the at-th call of something, counted from 1."""
    original, calls = getattr(owner, name), []

    def sending(*arguments, **options):
        calls.append(1)
        if len(calls) == at:
            send()
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, sending)


def stopped(config: TrainConfig, capfd) -> tuple[object, str]:
    """Exit code and last line of a run that stops."""
    with pytest.raises(SystemExit) as ended:
        train(config)
    return ended.value.code, capfd.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("number", "step"), [(signal.SIGTERM, 1), (signal.SIGINT, 2), (signal.SIGHUP, 3), (signal.SIGUSR1, 9)]
)
def test_run_finishes_its_step_and_goes_on_to_the_bit_when_signalled(config, whole, capfd, number, step):
    with at_update(step, lambda: os.kill(os.getpid(), number)):
        code, said = stopped(config, capfd)
    assert code == CODES[number]
    epoch = (step - 1) // 3 + 1
    assert (
        said == f"student-trainer: {number.name}: stopped at epoch {epoch} step {step}, saved; continue with --resume"
    )
    assert train(replace(config, resume=True)).steps == 9
    assert_equal(config, whole)


@pytest.mark.parametrize(
    ("owner", "name", "at", "step"),
    [
        (ViewDataset, "__getitem__", 1, 0),  # waiting for the first batch
        (ViewDataset, "__getitem__", 2, 1),
        (Evaluator, "unless_stopped", 1, 3),
        (student_trainer.engine.run_folder, "save_checkpoint", 2, 3),  # at the end of the first epoch, after validation
    ],
)
def test_run_goes_on_to_the_bit_when_signalled_between_steps(config, whole, monkeypatch, capfd, owner, name, at, step):
    with monkeypatch.context() as patch:
        signalled(patch, owner, name, at, lambda: os.kill(os.getpid(), signal.SIGTERM))
        code, said = stopped(config, capfd)
    assert (code, f" step {step}, saved; continue with --resume" in said) == (143, True)
    assert train(replace(config, resume=True)).steps == 9
    assert_equal(config, whole)


def test_run_leaves_nothing_when_signalled_while_it_starts(config, monkeypatch, capfd):
    signalled(monkeypatch, student_trainer.train, "resolve", 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    code, said = stopped(config, capfd)
    assert code == 143
    assert said == "student-trainer: SIGTERM: stopped while starting; start again with --resume"
    assert not config.run.exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_run_goes_on_when_a_signal_is_ignored_as_under_nohup(config):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with at_update(2, lambda: os.kill(os.getpid(), signal.SIGHUP)):
            assert train(replace(config, epochs=1)).steps == 3
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("start_method", ["fork", "forkserver"])
def test_run_saves_and_leaves_no_worker_when_a_scheduler_signals_all_its_processes(config, whole, capfd, start_method):
    def signal_all() -> None:  # from another process, as a scheduler does
        processes = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
        subprocess.run(["kill", "-TERM", *map(str, processes)], check=True)

    config = replace(config, workers=2, start_method=start_method)
    with at_update(2, signal_all):
        code, said = stopped(config, capfd)
    assert (code, " step 2, saved" in said) == (143, True)
    assert not multiprocessing.active_children()
    assert train(replace(config, resume=True, workers=0)).steps == 9
    assert_equal(config, whole)


def test_group_stops_after_one_step_when_one_of_its_processes_is_signalled(config, tmp_path):
    config = replace(config, epochs=6)
    whole = replace(config, run=tmp_path / "whole")
    assert run_group(whole, 2) == [{"steps": 18}] * 2
    processes = start_group(config, 2)
    assert wait_for_lines(config, 3, processes)
    os.kill(processes[1][0].pid, signal.SIGTERM)
    for process, note in processes:
        process.join(120)
        assert note.read_text() == '{"exit": 143}'
    assert run_group(replace(config, resume=True), 2) == [{"steps": 18}] * 2
    assert_equal(config, whole)


def descendants(of: int) -> Iterator[int]:
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            parent = re.search(r"^PPid:\t(\d+)$", status.read_text(), re.MULTILINE)
        except OSError:
            continue
        if parent and int(parent[1]) == of:
            yield int(status.parent.name)
            yield from descendants(int(status.parent.name))


def is_running(pid: int) -> bool:
    try:
        return not re.search(r"^State:\t[ZX]", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except OSError:
        return False


def test_run_leaves_no_process_when_killed(config):
    arguments = [
        "train", "--run", str(config.run), "--student", "test_resnet",
        "--tars", *config.tars, "--store", config.teacher.store, "--scalekd.no-tpp", "--epochs", "10000",
        "--batch-size", "8", "--workers", "2", "--device", "cpu", "--log-every", "1", "--no-progress",
    ]  # fmt: skip
    process = Program("student-trainer", arguments, config.run.parent)
    metrics = config.run / "metrics.jsonl"
    while process.poll() is None and (not metrics.is_file() or metrics.read_bytes().count(b"\n") < 2):
        time.sleep(0.1)
    children = list(descendants(process.pid))
    process.kill()
    assert len(children) >= 3  # fork server, two workers; the resource tracker is that of this process
    deadline = time.monotonic() + 60
    while any(map(is_running, children)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(is_running, children))


def test_run_is_refused_and_the_first_goes_on_when_its_folder_is_being_written(config):
    train(replace(config, epochs=1))
    before = {path.name: path.read_bytes() for path in config.run.iterdir()}
    with reserved(config.run):
        with pytest.raises(
            ResourceError,
            match=rf"--run {config.run} is being written by process {os.getpid()} of .*; wait until it ends",
        ):
            train(replace(config, epochs=1, resume=True))
        assert {path.name: path.read_bytes() for path in config.run.iterdir() if path.name[0] != "."} == before
        tars = shared_world().val_tars
        assert evaluate(EvaluateConfig(run=config.run, tars=tars, workers=0, device="cpu")).accuracy.samples == 10
    assert train(replace(config, epochs=1, resume=True)).steps == 3


def test_run_goes_on_when_its_last_process_was_killed(config):
    train(replace(config, epochs=1))
    for name in (".lock", ".writer"):
        (config.run / name).write_text("process 1 of elsewhere")
    (config.run / "last.pt.123-abcd.partial").write_bytes(b"half")
    assert train(replace(config, epochs=1, resume=True)).steps == 3
    assert {path.suffix for path in config.run.iterdir()} == {".pt", ".json", ".jsonl", ".safetensors"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_program_ends_without_a_traceback_when_signalled_while_it_imports(number):
    code = (
        "import os, student_trainer.__main__ as program, sys; sys.meta_path.insert(0, type('', (), {'find_spec': "
        f"staticmethod(lambda *_: os.kill(os.getpid(), {int(number)}))}})); program.main()"
    )  # at the first import
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (CODES[number], "")
