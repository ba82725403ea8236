"""The Ray engine: actors of a cluster pull tasks from one queue, into which a dead actor's tasks go back.

Actors are asked for at once and start when the cluster has room for them, so an autoscaler sees the demand and late
ones join in. Only the store matters in the end: a driver that dies leaves what any interrupted job leaves.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any, cast

from feature_store.errors import InputError, ResourceError, UserError
from feature_store.inputs.tar import tar_notes
from feature_store.store import open_store
from feature_store.tools.terminal import Console
from teacher_service.cache.decode import Task
from teacher_service.cache.observers import observed
from teacher_service.cache.pipeline import Pipeline, PipelineReport, UnitDone
from teacher_service.cache.prepare import join, missing_parts, prepare, remaining_tasks
from teacher_service.cache.stage_timer import StageTimes
from teacher_service.config import CacheConfig
from teacher_service.plan.report import print_notes
from teacher_service.plan.survey import survey
from teacher_service.share.task_queue import TaskQueue
from teacher_service.stopping import RESUME, Stop, stop_on_signals

POLL_SECONDS = 0.5
DEATHS_IN_A_ROW = 5  # without a commit in between: then it is not the machines


def run(config: CacheConfig, console: Console, stop: Stop) -> tuple[list[Task], PipelineReport]:
    """What a store lacked, and what the actors did of it.

    Args:
        config: The job; tars, store and checkpoint must have the same paths or URLs on every node.
        console: Where to show progress.
        stop: Set to stop early.

    Raises:
        InputError: Ray is not installed; and see ``teacher_service.cache.job.cache``.
        ResourceError: The cluster cannot be reached, or actors die again and again.
    """
    ray = _import_ray()
    with _cluster(ray, config.sharing.ray.address):
        demand = _demand(ray, config, console)
        with _user_errors(ray):
            prepared = ray.remote(_prepare).options(**demand).remote(config, Path.cwd())
            tasks, notes = ray.get(prepared)
        print_notes(notes, console)
        manifest = open_store(config.store).manifest
        with (
            observed(config.reporting, console, manifest, tasks) as observers,
            stop_on_signals(stop),
            _user_errors(ray),
            _Crew(ray, config, demand, tasks) as crew,
        ):
            return tasks, crew.run(observers.committed, stop)


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise InputError("--engine ray needs Ray, which is not installed; pip install 'scalekd-cache[ray]'") from error
    return ray


@contextmanager
def _cluster(ray: Any, address: str | None) -> Iterator[None]:
    """A connection to the cluster, unless the caller has one already."""
    if ray.is_initialized():
        yield
        return
    try:
        ray.init(address, log_to_driver=False, logging_level="warning", configure_logging=True)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ResourceError(f"Ray cluster {address or 'of this machine'}: {reason}; check --ray-address") from error
    try:
        with redirect_stdout(sys.stderr):  # Ray tells of dead workers on stdout, where --json has one object
            yield
    finally:
        ray.shutdown()


@contextmanager
def _user_errors(ray: Any) -> Iterator[None]:
    """Errors of the actors as they were raised there, and Ray's own in our words."""
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        reason = str(error).strip().partition("\n")[0]
        raise ResourceError(f"the Ray cluster gave up: {reason}; {RESUME}") from error


def _demand(ray: Any, config: CacheConfig, console: Console) -> dict[str, float]:
    """What each actor takes of the cluster; says so if no node has that much now."""
    has = ray.cluster_resources()
    asked = config.sharing.ray.gpus_per_actor
    gpus = float(has.get("GPU", 0) > 0) if asked is None else asked
    demand = {"num_cpus": max(1, config.compute.workers), "num_gpus": gpus}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(node.get("CPU", 0) >= demand["num_cpus"] and node.get("GPU", 0) >= gpus for node in nodes):
        console.print(
            f"no node of the cluster has {demand['num_cpus']} CPUs and {gpus:g} GPUs for an actor; waiting for one; "
            "fewer --workers or --gpus-per-actor ask for less",
            soft_wrap=True,
        )
    return demand


def _prepare(config: CacheConfig, folder: Path) -> tuple[list[Task], tuple[str, ...]]:
    """Make or grow the store, on a node that has what an actor has; what it lacks, and the plan's notes."""
    _change_to(folder)
    job = prepare(survey(config), config)
    return remaining_tasks(job.store), tuple(tar_notes(job.tars))


def _change_to(folder: Path) -> None:
    """Relative paths mean the same as where the job was started, where that folder exists."""
    with suppress(OSError):
        os.chdir(folder)


class _Worker:
    """An actor: one pipeline over the tasks it is handed."""

    def __init__(self, config: CacheConfig, folder: Path) -> None:
        _change_to(folder)
        self._config, self._stop = config, Stop()
        self._pipeline: Pipeline | None = None

    def compute(self, name: str, handout: Any) -> PipelineReport:
        """Compute tasks until none is left.

        Raises:
            UserError: See ``teacher_service.cache.job.cache``.
        """
        import ray

        if self._pipeline is None:
            self._pipeline = Pipeline(join(survey(self._config), self._config))

        def tasks() -> Iterator[Task]:
            while (task := cast(Task | None, ray.get(handout.next.remote(name)))) is not None:
                yield task

        return self._pipeline.run(
            tasks(), on_commit=lambda done: ray.get(handout.committed.remote(name, done)), stop=self._stop
        )

    def stop(self) -> None:
        """Finish or abandon what is under way."""
        self._stop.set()


class _Crew:
    """The actors of a job and their queue, seen from the driver; use as a context manager, leaving it ends them."""

    def __init__(self, ray: Any, config: CacheConfig, demand: dict[str, float], tasks: list[Task]) -> None:
        self._ray, self._tasks, self._objects = ray, tasks, open_store(config.store).objects
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=True
        )
        # Beside the driver: an autoscaler may take away a node whose actors ask for nothing.
        self._handout = ray.remote(TaskQueue).options(num_cpus=0, scheduling_strategy=here).remote(tasks)
        # Ray starts a dead actor anew, where there is room; what it is to do then is for this process to say.
        worker = ray.remote(_Worker).options(**demand, max_restarts=-1, max_task_retries=0, max_concurrency=2)
        count = min(len(tasks), config.sharing.ray.num_actors or _room(ray, demand))
        self._workers = {f"actor-{i}": worker.remote(config, Path.cwd()) for i in range(count)}
        self._running: dict[Any, str] = {}
        self._deaths_in_a_row = 0
        self._batch_size = config.compute.batch_size
        self._committed: list[UnitDone] = []
        self._times: dict[str, StageTimes] = {}

    def __enter__(self) -> "_Crew":
        return self

    def __exit__(self, *_: object) -> None:
        for actor in (*self._workers.values(), self._handout):
            self._ray.kill(actor)

    def run(self, on_commit: Callable[[UnitDone], None], stop: Stop) -> PipelineReport:
        """Keep the actors busy until nothing is left, or told to stop."""
        started, stopped = time.perf_counter(), False
        while any(self._ray.get(self._handout.counts.remote())):
            if stop.is_set() and not stopped:
                self._stop()
                stopped = True
            if not stopped:
                self._start_idle()
            ended, _ = self._ray.wait([*self._running], timeout=POLL_SECONDS)
            for reference in ended:
                self._end(reference, requeue=not stopped)
            self._tell(on_commit)
        self._tell(on_commit)
        done = {each.task for each in self._committed}
        return PipelineReport(
            committed=tuple(done),
            abandoned=tuple(task for task in self._tasks if task not in done),
            images=sum(each.images for each in self._committed),
            seconds=time.perf_counter() - started,
            times=StageTimes.together(self._times.values()),
            batch_size=self._batch_size,
        )

    def _start_idle(self) -> None:
        if not self._ray.get(self._handout.counts.remote())[0]:
            return
        for name in sorted(self._workers.keys() - set(self._running.values())):
            self._running[self._workers[name].compute.remote(name, self._handout)] = name

    def _end(self, reference: Any, *, requeue: bool) -> None:
        """A worker found the queue empty, failed for the user to see, or died."""
        name = self._running.pop(reference)
        try:
            self._batch_size = min(self._batch_size, self._ray.get(reference).batch_size)
        except self._ray.exceptions.RayActorError as error:
            self._deaths_in_a_row += 1
            if self._deaths_in_a_row > DEATHS_IN_A_ROW:
                reason = str(error).strip().partition("\n")[0]
                raise ResourceError(f"actors die again and again, the last one: {reason}; {RESUME}") from error
        held = self._ray.get(self._handout.dismiss.remote(name))  # it died or was stopped, or another job was first
        if requeue:
            self._ray.get(self._handout.queue.remote(missing_parts(self._objects, held)))

    def _tell(self, on_commit: Callable[[UnitDone], None]) -> None:
        for name, done in self._ray.get(self._handout.news.remote()):
            self._deaths_in_a_row = 0
            self._committed.append(done)
            self._times[name] = done.times
            on_commit(done)

    def _stop(self) -> None:
        self._ray.get(self._handout.close.remote())
        for worker in self._workers.values():
            worker.stop.remote()


def _room(ray: Any, demand: dict[str, float]) -> int:
    """Actors the cluster has room for now; one at least, for a cluster that grows."""
    has = ray.cluster_resources()
    shares = [has.get("CPU", 0) / demand["num_cpus"]]
    shares += [has.get("GPU", 0) / demand["num_gpus"]] if demand["num_gpus"] else []
    return max(1, int(min(shares)))
