"""The pipeline on tiny tars, with a store that counts and delays what is written."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_jobs import TinyTeacher, cache_config, store_files, write_tars

from feature_store.errors import CommittedError
from feature_store.store import Store, open_store
from teacher_service.cache import pipeline as pipeline_module
from teacher_service.cache.decode import PREFETCH, Task
from teacher_service.cache.encode import UnitEncoder
from teacher_service.cache.pipeline import BATCHES_AHEAD, Pipeline, PipelineReport, UnitDone
from teacher_service.cache.prepare import Job, prepare, remaining_tasks
from teacher_service.cache.stage_timer import STAGES
from teacher_service.config import CacheConfig
from teacher_service.plan.survey import survey


def _prepare(config: CacheConfig) -> Job:
    return prepare(survey(config), config)


@pytest.fixture
def config(tmp_path: Path, tiny_swin: TinyTeacher) -> CacheConfig:
    """Twelve units of three samples in two views, one unit a batch."""
    tars = write_tars(tmp_path, *[3] * 12)
    return cache_config(tars, tiny_swin, tmp_path / "store", views=2, batch_size=6)


@pytest.fixture
def job(config: CacheConfig) -> Job:
    return _prepare(config)


def _run(job: Job, tasks: Any = None, on_commit: Callable[[UnitDone], None] = id, **options: Any) -> PipelineReport:
    return Pipeline(job).run(remaining_tasks(job.store) if tasks is None else tasks, on_commit=on_commit, **options)


def test_pipeline_reports_what_it_committed_in_order(job: Job) -> None:
    done: list[UnitDone] = []

    report = _run(job, on_commit=done.append)

    tasks = [Task(unit, range(2)) for unit in range(12)]
    assert list(report.committed) == [each.task for each in done] == tasks
    assert (report.abandoned, report.images, report.batch_size) == ((), 72, 6)
    assert all((each.images, each.quarantined) == (6, {}) for each in done)
    objects = open_store(job.store.path).committed.record(0, 0).objects
    assert done[0].bytes == sum(proof.bytes for proof in objects.values())
    assert report.times.busy.keys() == set(STAGES)
    assert all(report.times.busy[stage] > 0 for stage in ("decode", "forward", "encode", "write"))


def test_pipeline_writes_the_same_bytes_in_any_order_of_tasks(config: CacheConfig, job: Job, tmp_path: Path) -> None:
    other = replace(config, store=tmp_path / "other")
    _run(job)
    reverse = _prepare(other)
    _run(reverse, reversed(remaining_tasks(reverse.store)))

    assert _objects(job.store.path) == _objects(other.store)


def _objects(store: Path) -> dict[str, bytes]:
    return {path: data for path, data in store_files(store).items() if not path.startswith(".locks")}


def test_pipeline_pulls_no_task_before_it_has_room_for_it(job: Job) -> None:
    """Tasks come from a queue that other processes empty as well."""
    pulled: list[Task] = []
    ahead: list[int] = []

    def queue() -> Iterator[Task]:
        for task in remaining_tasks(job.store):
            pulled.append(task)
            yield task

    _run(job, queue(), on_batch=lambda images, times: ahead.append(len(pulled) - images // 6))

    assert len(ahead) == 12
    assert max(ahead) <= PREFETCH * max(1, job.compute.workers)


class _SlowStore:
    """Writes a unit only when told, and counts what the pipeline keeps meanwhile."""

    def __init__(self, store: Store) -> None:
        self._store, self.turn, self.begun = store, threading.Semaphore(0), threading.Semaphore(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def write_unit(self, unit: int, first_view: int, data: Any) -> None:
        self.begun.release()
        assert self.turn.acquire(timeout=60)
        self._store.write_unit(unit, first_view, data)


def test_pipeline_keeps_few_units_in_memory_when_the_writer_is_slow(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any number of units could be computed while one is written; the queues' bounds decide how many are."""
    made: list[int] = []
    real = UnitEncoder.__init__
    monkeypatch.setattr(UnitEncoder, "__init__", lambda self, *args: (made.append(1), real(self, *args))[1])
    store: Any = _SlowStore(job.store)
    computed = threading.Semaphore(0)
    runner = threading.Thread(
        target=_run, args=(replace(job, store=store),), kwargs={"on_batch": lambda *_: computed.release()}
    )
    runner.start()

    writing, encoded, computing = 1, 1, 1
    bound = writing + encoded + BATCHES_AHEAD + computing  # a unit is a batch here
    for written in range(12):
        assert store.begun.acquire(timeout=60)
        for _ in range(bound - computing if written == 0 else 1 if written <= 12 - (bound - computing) else 0):
            assert computed.acquire(timeout=60)
        assert not computed.acquire(timeout=0.05)  # the pipeline is full, or all is computed
        assert len(made) - written <= bound
        store.turn.release()
    runner.join(60)

    assert len(open_store(job.store.path).committed.units) == 12


def test_pipeline_leaves_out_a_unit_when_another_process_commits_it_first(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, done = Store.write_unit, []

    def write_or_lose(self: Store, unit: int, first_view: int, data: Any) -> None:
        if unit == 4:
            raise CommittedError("too late")
        write(self, unit, first_view, data)

    monkeypatch.setattr(Store, "write_unit", write_or_lose)

    report = _run(job, on_commit=done.append)

    assert report.abandoned == (Task(4, range(2)),)
    assert len(report.committed) == len(done) == 11


@pytest.mark.parametrize(("seconds", "finished"), [(60.0, True), (0.0, False)])
def test_pipeline_finishes_the_unit_under_way_only_if_that_is_quick_when_stopped(
    job: Job, monkeypatch: pytest.MonkeyPatch, seconds: float, finished: bool
) -> None:
    monkeypatch.setattr(pipeline_module, "FINISH_SECONDS", seconds)
    stop, pulled = threading.Event(), []
    small = replace(job, compute=replace(job.compute, batch_size=2))  # three batches a unit

    def stop_in_third_unit(images: int, times: object) -> None:
        if images == 2 * 6 + 2:
            stop.set()

    tasks = (pulled.append(task) or task for task in remaining_tasks(job.store))
    report = _run(small, tasks, on_batch=stop_in_third_unit, stop=stop)

    assert [task.unit for task in report.committed] == ([0, 1, 2] if finished else [0, 1])
    assert len(pulled) == 3
    assert set(report.committed) | set(report.abandoned) == set(pulled)
    _run(job)
    assert len(open_store(job.store.path).committed.units) == 12


def test_pipeline_does_nothing_when_stopped_before_it_began(job: Job) -> None:
    stop = threading.Event()
    stop.set()

    report = _run(job, stop=stop)

    assert (report.committed, report.abandoned, report.images) == ((), (), 0)


def test_two_pipelines_share_a_store_when_they_take_tasks_from_one_queue(
    config: CacheConfig, job: Job, tmp_path: Path
) -> None:
    whole = replace(config, store=tmp_path / "whole")
    alone = _prepare(whole)
    _run(alone)
    alone.store.write_commit_index()
    queue, lock = iter(remaining_tasks(job.store)), threading.Lock()

    def take() -> Iterator[Task]:
        while True:
            with lock:
                task = next(queue, None)
            if task is None:
                return
            yield task

    reports: list[PipelineReport] = []
    stores = [open_store(job.store.path) for _ in range(2)]
    workers = [
        threading.Thread(target=lambda store=store: reports.append(_run(replace(job, store=store), take())))
        for store in stores
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    open_store(job.store.path).write_commit_index()

    together = PipelineReport.together(reports)
    assert sorted(task.unit for task in together.committed) == list(range(12))
    assert together.images == 72
    assert _objects(job.store.path) == _objects(whole.store)
