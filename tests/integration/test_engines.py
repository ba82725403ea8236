"""Every engine writes the same bytes, and a worker killed in the middle costs nothing but its unit's time."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_jobs import TinyTeacher, cache_config, noise_samples, store_files, with_options, write_tar, write_tars
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from feature_store import open_store
from feature_store.errors import MismatchError
from teacher_service.cache.decode import Task
from teacher_service.cache.job import cache
from teacher_service.cache.pipeline import Pipeline
from teacher_service.cache.prepare import join, prepare, remaining_tasks
from teacher_service.cache.stage_timer import StageTimes
from teacher_service.cli import main as teacher_main
from teacher_service.config import CacheConfig
from teacher_service.plan.survey import survey
from teacher_service.share import loop
from teacher_service.share.leases import open_leases
from teacher_service.stopping import Stop

UNITS, VIEWS = 24, 2
RAY = {"RAY_enable_worker_prestart": "0", "RAY_USAGE_STATS_ENABLED": "0"}  # no process that the job does not use
CONTEXT = multiprocessing.get_context("forkserver")


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return write_tars(tmp_path_factory.mktemp("tars"), *[9, 7] * (UNITS // 2))


@pytest.fixture(scope="module")
def job(tars: tuple[str, ...], tiny_swin: TinyTeacher) -> Callable[..., CacheConfig]:
    """A job with a codec that learns from a first sample: it must be the same sample whatever engine runs it."""

    def make(store: Path, **options) -> CacheConfig:
        return cache_config(tars, tiny_swin, store, views=VIEWS, policy="a1", tap_codec="int8", **options)

    return make


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, job: Callable[..., CacheConfig]) -> dict[str, bytes]:
    """The files one process writes."""
    config = job(tmp_path_factory.mktemp("whole") / "store")
    process = CONTEXT.Process(target=cache, args=(config,))
    process.start()
    process.join()
    assert process.exitcode == 0
    return store_files(config.store)


def _command(config: CacheConfig, *options: str) -> list[str]:
    """The job as a command line, after ``python -m``."""
    return ["teacher_service", "cache", *config.inputs.tars, "--teacher", config.teacher.name,
            "--model-kwargs", json.dumps(config.teacher.model_kwargs), "--checkpoint", str(config.checkpoint),
            "--store", str(config.store), "--views", str(VIEWS), "--policy", "a1", "--workers", "0",
            "--batch-size", "4", *options]  # fmt: skip


def _start(*arguments: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _committed(config: CacheConfig) -> int:
    return len(list(config.store.glob("commits/*.json")))


def _wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _pids(is_meant: Callable[[str, str], bool]) -> list[int]:
    """Processes of this machine whose command line and environment are those of a worker."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            texts = [(folder / name).read_bytes().replace(b"\0", b" ").decode() for name in ("cmdline", "environ")]
        except OSError:  # it ended, or is another user's
            continue
        if is_meant(*texts):
            found.append(int(folder.name))
    return found


def test_processes_share_the_units_and_write_the_same_bytes_when_started_by_hand(
    tmp_path: Path, job: Callable[..., CacheConfig], whole: dict[str, bytes]
) -> None:
    config = job(tmp_path / "store")
    results = CONTEXT.Queue()
    processes = [CONTEXT.Process(target=_cache_into, args=(config, results)) for _ in range(2)]
    for process in processes:
        process.start()
    written = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()

    assert sum(written) == UNITS  # nothing was done twice
    assert min(written) > 0
    assert store_files(config.store) == whole


def _cache_into(config: CacheConfig, results: multiprocessing.Queue) -> None:
    results.put(cache(config).units_written)


def test_a_process_takes_over_what_a_killed_one_had_in_hand(
    tmp_path: Path, job: Callable[..., CacheConfig], whole: dict[str, bytes]
) -> None:
    config = job(tmp_path / "store")
    results = CONTEXT.Queue()
    doomed, other = (CONTEXT.Process(target=_cache_into, args=(config, results)) for _ in range(2))
    doomed.start()
    while _committed(config) < 2:
        time.sleep(0.002)
    other.start()
    while _committed(config) < 5:
        time.sleep(0.002)
    os.kill(doomed.pid, signal.SIGKILL)
    doomed.join()
    done = _committed(config)

    written = results.get(timeout=60)
    other.join()
    assert done < UNITS
    assert written >= UNITS - done
    assert store_files(config.store) == whole


def test_torchrun_finishes_the_job_when_a_rank_is_killed(
    tmp_path: Path, job: Callable[..., CacheConfig], whole: dict[str, bytes]
) -> None:
    """torchrun's own launcher, which forks its ranks here instead of starting interpreters."""
    config = job(tmp_path / "store")
    process = CONTEXT.Process(target=_torchrun, args=(_command(config)[1:], tmp_path))
    process.start()
    while _committed(config) < 4:
        assert process.is_alive()
        time.sleep(0.005)
    os.kill(int((tmp_path / "rank-1-restart-0").read_text()), signal.SIGKILL)
    assert _committed(config) < UNITS

    process.join(120)
    assert process.exitcode == 0
    assert (tmp_path / "rank-0-restart-1").exists()
    assert store_files(config.store) == whole


def _torchrun(command: list[str], folder: Path) -> None:
    launch = LaunchConfig(1, 1, nproc_per_node=2, max_restarts=1, run_id="job", rdzv_backend="c10d",
                          rdzv_endpoint="localhost:0", start_method="fork")  # fmt: skip
    elastic_launch(launch, _rank)(command, folder)


def _rank(command: list[str], folder: Path) -> None:
    rank, restart = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
    (folder / f"rank-{rank}-restart-{restart}").write_text(str(os.getpid()))
    assert teacher_main(command) == 0


def test_a_job_of_more_views_finishes_units_when_a_job_of_fewer_commits_them_meanwhile(
    tmp_path: Path, tiny_swin: TinyTeacher
) -> None:
    fewer = cache_config(write_tars(tmp_path, 3, 3, 3), tiny_swin, tmp_path / "store")
    first = prepare(survey(fewer), fewer)
    more = with_options(fewer, views=2)
    second = prepare(survey(more), more)
    firsts = remaining_tasks(first.store)[:2]

    def commit_meanwhile(images: int, times: StageTimes) -> None:
        """The first job, without leases, so that it commits units that the second one holds."""
        if firsts:
            Pipeline(first).run(firsts, on_commit=lambda done: None)
            firsts.clear()

    report = loop.compute(
        second, remaining_tasks(second.store), on_commit=lambda done: None, on_batch=commit_meanwhile, stop=Stop()
    )

    assert open_store(fewer.store).committed.missing_views() == {}
    assert report.committed == (Task(2, range(2)), Task(0, range(1, 2)), Task(1, range(1, 2)))
    assert set(report.abandoned) == {Task(0, range(2)), Task(1, range(2))}


def test_a_process_says_once_what_it_waits_for_when_others_hold_the_rest(
    tmp_path: Path, tiny_swin: TinyTeacher
) -> None:
    config = cache_config(write_tars(tmp_path, 3, 3, 3), tiny_swin, tmp_path / "store")
    job, messages, committed = prepare(survey(config), config), [], []
    waiting = threading.Event()

    def compute() -> None:
        loop.compute(
            job,
            remaining_tasks(job.store),
            on_commit=lambda done: committed.append(done.task.unit),
            on_wait=lambda message: (messages.append(message), waiting.set()),
            stop=Stop(),
        )

    thread = threading.Thread(target=compute)
    with open_leases(job.store.objects, 1) as other:
        assert other.take(0)
        assert other.take(2)
        thread.start()
        assert waiting.wait(60)
        assert committed == [1]
        time.sleep(3 * other.poll_seconds)
    thread.join(60)

    assert committed == [1, 0, 2]
    assert messages == [
        "waiting for 2 units (0, 2) that other processes compute; a unit is taken over at once when its process dies"
    ]


def test_ray_actors_write_the_same_bytes_when_one_is_killed(
    tmp_path: Path, job: Callable[..., CacheConfig], whole: dict[str, bytes]
) -> None:
    config = job(tmp_path / "store")
    process = _start(*_command(config, "--engine", "ray", "--num-actors", "2", "--json"), **RAY)

    _wait_for(lambda: _committed(config) >= 4, process)
    actors = _pids(lambda command, _: command.startswith("ray::_Worker"))
    os.kill(actors[0], signal.SIGKILL)
    assert _committed(config) < UNITS

    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    summary = json.loads(output)
    assert summary["units_left"] == 0
    assert summary["units_written"] in (UNITS - 1, UNITS)  # one may be committed whose actor died before it said so
    assert store_files(config.store) == whole


def test_an_error_of_a_ray_actor_reaches_the_user_when_a_sample_is_unreadable(
    tmp_path: Path, tiny_swin: TinyTeacher
) -> None:
    broken = {"__key__": "broken", "png": b"no image", "cls": b"0"}
    tar = write_tar(tmp_path / "bad.tar", [*noise_samples("whole", 3), broken])
    config = cache_config([tar], tiny_swin, tmp_path / "store")
    process = _start(*_command(config, "--engine", "ray", "--num-actors", "1", "--tap-codec", "f16", "--strict"), **RAY)

    _, errors = process.communicate(timeout=120)

    assert process.returncode == 2, errors
    assert "sample 'broken' of " in errors
    assert "Traceback" not in errors


def test_a_process_that_joins_is_refused_when_its_checkpoint_holds_other_weights(
    tmp_path: Path, tars: tuple[str, ...], tiny_swin: TinyTeacher, other_swin: TinyTeacher
) -> None:
    weights = tmp_path / "weights.safetensors"
    config = cache_config(tars, replace(tiny_swin, checkpoint=weights), tmp_path / "store")
    shutil.copy(tiny_swin.checkpoint, weights)
    prepared = prepare(survey(config), config)
    assert join(survey(config), config).teacher.info == prepared.teacher.info
    shutil.copy(other_swin.checkpoint, weights)  # what another node has at the same path
    with pytest.raises(MismatchError, match=r"^teacher.weights_sha256 differs: store has '[0-9a-f]{64}', got '"):
        join(survey(config), config)


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_cache_ends_soon_after_a_signal_when_a_unit_takes_longer(
    tmp_path: Path, tiny_swin: TinyTeacher, number: signal.Signals, exit_code: int
) -> None:
    (tar,) = write_tars(tmp_path, 600)
    config = cache_config([tar], tiny_swin, tmp_path / "store", tap_codec="int8")
    command = _command(config)
    command[command.index("--views") + 1] = "64"  # minutes of work
    command[command.index("--workers") + 1] = "1"
    process = _start(*command)
    _wait_for((config.store / ".locks/lease-u00000").exists, process)
    _wait_for(lambda: any(_children(child) for child in _children(process.pid)), process)  # of the fork server
    time.sleep(1)  # the decode worker is at work, and gets the signal too

    os.killpg(process.pid, number)  # as torchrun, Slurm and a closed terminal do
    _, errors = process.communicate(timeout=30)  # 8 s are given to the unit, then the process ends

    assert process.returncode == exit_code
    assert "stopped with 1 of 1 units left; the same command continues with them" in errors
    assert "Traceback" not in errors
    assert _committed(config) == 0
