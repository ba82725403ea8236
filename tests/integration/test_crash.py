"""A cache job that is killed again and again ends with the same bytes as one that is not."""

import json
import multiprocessing
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from tiny_jobs import TinyTeacher, cache_config, store_files, write_tars

from feature_store import open_store
from teacher_service.cache.job import cache
from teacher_service.config import CacheConfig

KILLS = 12
STATES = 3  # of the store that kills should at least hit; how many there are in 12 is chance on a busy machine
UNITS = 28


@pytest.fixture
def config(tmp_path: Path, tiny_swin: TinyTeacher) -> CacheConfig:
    """A job of many small units, so that most moments fall into one unit's writing or another's."""
    return cache_config(write_tars(tmp_path, *[2, 1] * (UNITS // 2)), tiny_swin, tmp_path / "whole" / "store", views=2)


def _start(config: CacheConfig) -> BaseProcess:
    """A real process running the real job, forked from one that has imported torch already."""
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=cache, args=(config,))
    process.start()
    return process


def _run(config: CacheConfig) -> float:
    """Run the job to its end; seconds it took."""
    started = time.perf_counter()
    process = _start(config)
    process.join()
    assert process.exitcode == 0
    return time.perf_counter() - started


def _killed_after(config: CacheConfig, seconds: float) -> bool:
    """Start the job and kill it; whether it was still running then."""
    process = _start(config)
    process.join(seconds)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def _committed_objects(store: Path) -> Iterator[str]:
    """Every file a commit record vouches for, and the records themselves."""
    for record in store.glob("commits/*.json"):
        yield record.relative_to(store).as_posix()
        yield from json.loads(record.read_bytes())["objects"]


def test_cache_ends_with_identical_bytes_when_killed_at_random_moments(config: CacheConfig) -> None:
    _run(config)  # the first process waits for imports
    seconds = _run(replace(config, store=config.store.with_name("timed")))
    whole = store_files(config.store)
    folder = config.store.parents[1]
    rng = random.Random(20)
    kills, moments = 0, []

    while kills < KILLS or (len(set(moments)) < STATES and kills < 5 * KILLS):
        again = replace(config, store=folder / f"killed-{kills}" / "store")
        for _ in range(KILLS):
            if not _killed_after(again, rng.uniform(0, 0.7 * seconds)):
                break
            kills += 1
            committed = set(_committed_objects(again.store))
            moments.append(len(committed))
            assert {name: (again.store / name).read_bytes() for name in committed}.items() <= whole.items()
        _run(again)
        assert store_files(again.store) == whole
        assert [path.name for path in again.store.parent.iterdir()] == ["store"]

    assert len(open_store(config.store).committed.units) == UNITS
    assert len(set(moments)) >= STATES, "the kills did not hit different states of the store"
