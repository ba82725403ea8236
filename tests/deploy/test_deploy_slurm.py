"""Slurm scripts: their options, and real jobs on the one-node Slurm that deploy/check/slurm.sh starts."""

import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from command_lines import DEPLOY, invocations, unknown_options
from tiny_jobs import TinyTeacher, cache_config, store_files, write_tars
from training_world import make_world

from feature_store.store import open_store
from teacher_service.cache.job import cache
from teacher_service.serve.tokens import create_token
from teacher_service.share.leases import open_leases

FOLDER = DEPLOY / "slurm"
SCRIPTS = sorted(FOLDER.glob("*.sbatch"))
SHELLCHECK = Path(sys.executable).parent / "shellcheck"
on_slurm = pytest.mark.skipif(
    os.environ.get("SCALEKD_TEST_SLURM") != "1", reason="needs a Slurm of its own: run deploy/check/slurm.sh"
)


def test_shellcheck_accepts_the_scripts() -> None:
    checked = [*SCRIPTS, *(DEPLOY / "check").glob("slurm.sh")]
    assert len(checked) == 4
    run = subprocess.run([SHELLCHECK, "-x", "-P", FOLDER, *checked], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


def test_every_option_of_the_scripts_exists() -> None:
    example = (FOLDER / "job.env.example").read_text()
    arrays = dict(re.findall(r"^([A-Z]+)=\((.*)\)$", example, re.MULTILINE))
    for script in SCRIPTS:
        text = script.read_text()
        for name, value in arrays.items():
            text = text.replace(f'"${{{name}[@]}}"', value)
        assert [command for _, command, _ in invocations(text)] == [script.stem]
        assert unknown_options(text) == []


def test_every_setting_is_in_the_example() -> None:
    given = set(re.findall(r"^([A-Z_]+)=", (FOLDER / "job.env.example").read_text(), re.MULTILINE))
    used: set[str] = set()
    for script in SCRIPTS:
        used |= set(re.findall(r"\$\{?([A-Z_]+)", script.read_text()))
    assert {name for name in used if not name.startswith("SLURM_")} == given | {"PATH", "JOB_ENV"}


class Jobs:
    """Jobs submitted from one folder that holds the committed scripts."""

    def __init__(self, folder: Path, **settings: object) -> None:
        self.folder = folder
        for script in SCRIPTS:
            (folder / script.name).write_text(script.read_text())
        lines = [f"{name}={_bash(value)}" for name, value in settings.items()]
        (folder / "job.env").write_text("\n".join([f"VENV={sys.prefix}", "CONTAINER=()", *lines]) + "\n")

    def submit(self, script: str, *arguments: str) -> str:
        """The job's id; without GPUs, on this machine's two cores."""
        common = ["--gres=none", "--cpus-per-task=1", "--mem=0"]
        return _run("sbatch", "--parsable", *common, *arguments, script, cwd=self.folder).strip()

    def log(self) -> str:
        return "\n".join(f"== {path.name}\n{path.read_text()}" for path in sorted(self.folder.glob("*.log")))


def _bash(value: object) -> str:
    return f"({shlex.join(map(str, value))})" if isinstance(value, list) else shlex.quote(str(value))


def _run(*command: str, cwd: Path | None = None) -> str:
    return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True).stdout


def _show(job: str, field: str) -> str:
    found = re.search(rf"\b{field}=(\S+)", _run("scontrol", "show", "job", job))
    assert found is not None
    return found[1]


def _until(condition: Callable[[], bool], jobs: Jobs, what: str, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}\n{_run('squeue')}\n{jobs.log()}"
        time.sleep(0.3)


def _start_now(job: str, jobs: Jobs) -> None:
    """Slurm holds a requeued job for two minutes; not here."""
    _until(lambda: _show(job, "JobState") in ("PENDING", "RUNNING", "COMPLETED"), jobs, f"{job} is queued again")
    time.sleep(5)  # its node refuses a job that starts again before the end of the last one is recorded
    subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], capture_output=True)


@pytest.fixture
def cache_jobs(tmp_path: Path, tiny_swin: TinyTeacher) -> tuple[Jobs, Path, Path]:
    """Jobs of a cache of four units; its store, begun with the first; and a store of all written by one process."""
    (tmp_path / "alone").mkdir()
    tars = write_tars(tmp_path, 6, 5, 6, 4)
    options = {"views": 2, "policy": "a2", "capacity": 6}
    cache(cache_config(tars, tiny_swin, tmp_path / "alone" / "store", **options))
    cache(cache_config(tars[:1], tiny_swin, tmp_path / "store", **options))
    arguments = [*tiny_swin.arguments, "--checkpoint", tiny_swin.checkpoint, "--views", 2, "--policy", "a2",
                 "--capacity", 6, "--workers", 0, "--batch-size", 4, "--tap-codec", "f16"]  # fmt: skip
    jobs = Jobs(tmp_path, STORE=tmp_path / "store", TARS=tmp_path / "images-{000..003}.tar", CACHE=arguments)
    return jobs, tmp_path / "store", tmp_path / "alone" / "store"


@on_slurm
def test_an_array_with_a_requeued_task_ends_with_the_store_of_one_process(
    cache_jobs: tuple[Jobs, Path, Path],
) -> None:
    jobs, store, alone = cache_jobs
    with open_leases(open_store(store).objects, 120) as leases:
        assert leases.take(3)  # nobody ends before this is released
        array = jobs.submit("cache.sbatch", "--array=0-1")
        _until(lambda: jobs.log().count("waiting for") == 2, jobs, "both tasks wait")
        _run("scontrol", "requeue", f"{array}_1")  # what preemption does
        _until(lambda: _show(f"{array}_1", "Restarts") == "1", jobs, "requeued")
        _start_now(f"{array}_1", jobs)
        _until(lambda: jobs.log().count("waiting for") == 3, jobs, "the requeued task joins again")
    for task in (f"{array}_0", f"{array}_1"):
        _until(lambda task=task: _show(task, "JobState") == "COMPLETED", jobs, f"{task} completes")
        assert _show(task, "ExitCode") == "0:0"
    assert store_files(store) == store_files(alone)


@on_slurm
def test_a_task_at_its_time_limit_is_queued_again_and_a_cancelled_one_is_not(
    cache_jobs: tuple[Jobs, Path, Path],
) -> None:
    jobs, store, alone = cache_jobs
    with open_leases(open_store(store).objects, 120) as leases:
        assert leases.take(3)
        cancelled = jobs.submit("cache.sbatch", "--array=0")
        _until(lambda: "waiting for" in jobs.log(), jobs, "the first task waits")
        _run("scancel", cancelled)
        _until(lambda: _show(f"{cancelled}_0", "JobState") == "CANCELLED", jobs, "cancelled")
        # Slurm checks time limits once a minute: the signal comes in the job's first minute.
        limited = jobs.submit("cache.sbatch", "--array=0", "--time=2", "--signal=B:USR1@100")
        _until(lambda: _show(f"{limited}_0", "Restarts") == "1", jobs, "queued again at its limit", 180)
    assert jobs.log().count("SIGTERM: finishing or abandoning") == 2
    _start_now(f"{limited}_0", jobs)
    _until(lambda: _show(f"{limited}_0", "JobState") == "COMPLETED", jobs, "completes")
    assert _show(f"{cancelled}_0", "JobState") == "CANCELLED"
    assert store_files(store) == store_files(alone)


@on_slurm
def test_a_training_run_of_two_processes_goes_on_when_it_was_queued_again(tmp_path: Path) -> None:
    world = make_world(tmp_path / "world")
    train = ["--student", "test_resnet", "--epochs", 40, "--batch-size", 8, "--workers", 0, "--device", "cpu",
             "--no-report", "--no-progress"]  # fmt: skip
    jobs = Jobs(tmp_path, STORE=world.store, TARS=tmp_path / "world" / "train-{0..1}.tar", RUN=tmp_path / "run",
                TRAIN=train, PROCESSES_PER_NODE=2)  # fmt: skip
    job = jobs.submit("train.sbatch", "--nodes=1", "--cpus-per-task=2")
    metrics = tmp_path / "run" / "metrics.jsonl"
    _until(lambda: metrics.is_file() and metrics.read_text().count('"epoch"') > 3, jobs, "some epochs")
    _run("scancel", "--batch", "--signal=USR1", job)  # what --signal sends before the limit
    _until(lambda: _show(job, "Restarts") == "1", jobs, "queued again")
    assert "continue with --resume" in jobs.log()
    _start_now(job, jobs)
    _until(lambda: _show(job, "JobState") == "COMPLETED", jobs, "completes", 240)
    assert _show(job, "ExitCode") == "0:0"
    assert (tmp_path / "run" / "best.safetensors").is_file() or (tmp_path / "run" / "last.pt").is_file()


@on_slurm
def test_a_served_store_is_ready_at_the_address_in_the_file_and_drains_when_cancelled(
    cache_jobs: tuple[Jobs, Path, Path], tmp_path: Path
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    create_token(tmp_path / "tokens.jsonl", "trainers", ("read",))
    jobs = Jobs(
        tmp_path, STORE=cache_jobs[2], TOKENS=tmp_path / "tokens.jsonl", PORT=port, SERVE=["--drain-seconds", 5]
    )
    job = jobs.submit("serve.sbatch")
    _until(lambda: (tmp_path / "serve.url").is_file() and '"url"' in jobs.log(), jobs, "serves")
    assert (tmp_path / "serve.url").read_text() == f"http://{_run('hostname', '-f').strip()}:{port}\n"

    def is_ready() -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as response:
                return response.status == 200
        except OSError:
            return False

    _until(is_ready, jobs, "is ready")
    _run("scancel", job)
    _until(lambda: _show(job, "JobState") == "CANCELLED", jobs, "ends")
    assert not is_ready()
