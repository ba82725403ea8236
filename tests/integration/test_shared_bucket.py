"""Machines that share a cache job in a bucket: each unit is computed once, a dead machine's units by another."""

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from forked_programs import Program
from servers import s3_server
from tiny_jobs import TinyTeacher, cache_config, store_files, write_tars

from feature_store.backends.open import open_objects
from teacher_service.cache.job import cache

UNITS = 12
LEASE_SECONDS = 3


@pytest.fixture
def url() -> Iterator[str]:
    with s3_server() as make:
        yield f"{make()}/store"


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return write_tars(tmp_path_factory.mktemp("tars"), *[21, 15] * (UNITS // 2))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tars: tuple[str, ...], tiny_swin: TinyTeacher) -> dict[str, bytes]:
    """The objects one process writes."""
    store = tmp_path_factory.mktemp("whole") / "store"
    cache(cache_config(tars, tiny_swin, store, tap_codec="int8"))
    return store_files(store)


@pytest.fixture
def start(
    tmp_path: Path, tars: tuple[str, ...], tiny_swin: TinyTeacher, url: str
) -> Iterator[Callable[[str], Program]]:
    """Starts the job on a machine: a process with a temporary folder of its own, so that it sees no other's locks."""
    machines = []

    def start(machine: str) -> Program:
        (tmp_path / machine).mkdir()
        command = ["cache", *tars, *tiny_swin.arguments, "--checkpoint", str(tiny_swin.checkpoint), "--store", url,
                   "--workers", "0", "--batch-size", "4", "--lease-seconds", str(LEASE_SECONDS), "--json"]  # fmt: skip
        machines.append(Program("teacher-service", command, tmp_path, environment={"TMPDIR": str(tmp_path / machine)}))
        return machines[-1]

    yield start
    for process in machines:
        process.kill()
        process.communicate()


def _objects(url: str) -> dict[str, bytes]:
    """Every object but leases."""
    objects = open_objects(url)
    return {path: objects.get(path).tobytes() for path in objects.list() if not path.startswith(".locks/")}


def _committed(url: str) -> int:
    return len(open_objects(url).list("commits/u"))


def _units_written(process: Program) -> int:
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return json.loads(output)["units_written"]


def _signal_at_work(process: Program, url: str, number: signal.Signals) -> list[str]:
    """Signal a process that has committed units and holds others; the leases it holds."""
    while _committed(url) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(number)
    time.sleep(0.5)  # a request under way may still reach the bucket
    assert _committed(url) < UNITS
    return open_objects(url).list(".locks/lease-u")


def test_machines_share_the_units_of_a_bucket_when_they_start_at_once(
    url: str, start: Callable[[str], Program], whole: dict[str, bytes]
) -> None:
    first, second = start("first"), start("second")
    written = [_units_written(first), _units_written(second)]
    assert sum(written) == UNITS  # none was computed twice; one that starts late may find none left
    assert _objects(url) == whole
    assert open_objects(url).list(".locks/") == []


def test_a_killed_machines_units_are_computed_by_another(
    url: str, start: Callable[[str], Program], whole: dict[str, bytes]
) -> None:
    doomed = start("doomed")
    assert _signal_at_work(doomed, url, signal.SIGKILL)
    done = _committed(url)
    assert _units_written(start("other")) == UNITS - done
    assert _objects(url) == whole


def _holders(url: str) -> set[int]:
    """Processes of the leases that there are now."""
    objects, found = open_objects(url), set[int]()
    for path in objects.list(".locks/lease-u"):
        with suppress(FileNotFoundError):  # released meanwhile
            found.add(int(json.loads(objects.get(path).tobytes())["holder"].split(":")[1]))
    return found


def test_three_machines_with_one_command_finish_when_the_one_at_work_is_killed(
    url: str, start: Callable[[str], Program], whole: dict[str, bytes]
) -> None:
    machines = {process.pid: process for process in map(start, ("first", "second", "third"))}
    while _committed(url) < 2 or not (holders := _holders(url)):
        assert all(process.poll() is None for process in machines.values())
        time.sleep(0.01)
    killed = min(holders)
    machines.pop(killed).kill()
    time.sleep(0.5)  # a request under way may still reach the bucket
    done = _committed(url)
    assert done < UNITS
    written = [_units_written(process) for process in machines.values()]
    assert UNITS - done <= sum(written) <= UNITS
    assert _objects(url) == whole
    assert _holders(url) <= {killed}  # which may have committed a unit that it had no time to release


def test_a_suspended_machine_that_comes_back_does_no_harm(
    url: str, start: Callable[[str], Program], whole: dict[str, bytes]
) -> None:
    suspended = start("suspended")
    assert _signal_at_work(suspended, url, signal.SIGSTOP)
    done = _committed(url)
    assert _units_written(start("other")) == UNITS - done
    assert _objects(url) == whole
    suspended.send_signal(signal.SIGCONT)
    assert _units_written(suspended) <= done
    assert _objects(url) == whole
