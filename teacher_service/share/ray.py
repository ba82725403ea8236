"""Launcher for Ray: actors that run the loop of a cache job.

Actors are requested at once and start when the cluster has room, so an autoscaler sees the demand and late ones join
in. They share units by leases in the store. A driver that dies leaves what any interrupted job leaves.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feature_store.errors import InputError, ResourceError, UserError
from feature_store.inputs.tar import tar_notes
from feature_store.store import open_store
from feature_store.tools.terminal import Console, say
from teacher_service.cache.decode import Task
from teacher_service.cache.observers import observed
from teacher_service.cache.pipeline import PipelineReport, UnitDone
from teacher_service.cache.prepare import join, prepare, remaining_tasks
from teacher_service.cache.stage_timer import StageTimes
from teacher_service.config import CacheConfig
from teacher_service.plan.report import print_notes
from teacher_service.plan.survey import survey
from teacher_service.share.loop import compute
from teacher_service.stopping import RESUME, Stop, stop_on_signals

if TYPE_CHECKING:
    from ray.util.queue import Queue

POLL_SECONDS = 0.5
DEATHS_IN_A_ROW = 5  # without a commit in between: more are the job's fault, not the nodes'


def run(config: CacheConfig, console: Console, stop: Stop) -> tuple[list[Task], PipelineReport]:
    """Prepare a job and run its loop in actors.

    Args:
        config: The job; tars, store and checkpoint must have the same paths or URLs on every node.
        console: Where to show progress.
        stop: Set to stop early.

    Returns:
        What the store lacked, and what the actors did of it.

    Raises:
        InputError: Ray is not installed; and see ``teacher_service.cache.job.cache``.
        ResourceError: The cluster cannot be reached, or actors die repeatedly.
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
        import ray.util.queue
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
        # A cluster that this starts lives as long as the job; its dashboard would be a dozen processes.
        ray.init(address, include_dashboard=False, log_to_driver=False, logging_level="warning", configure_logging=True)
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
    """Raise an actor's UserError here; turn Ray's own errors into a ResourceError."""
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        reason = str(error).strip().partition("\n")[0]
        raise ResourceError(f"the Ray cluster failed: {reason}; {RESUME}") from error


def _demand(ray: Any, config: CacheConfig, console: Console) -> dict[str, float]:
    """Resources of one actor; prints a line if no node has them now."""
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
    """Make or grow the store, on a node with an actor's resources; what it lacks, and the plan's notes."""
    _change_to(folder)
    job = prepare(survey(config), config)
    return remaining_tasks(job.store), tuple(tar_notes(job.tars))


def _change_to(folder: Path) -> None:
    """Relative paths mean the same as where the job was started, where that folder exists."""
    with suppress(OSError):
        os.chdir(folder)


class _Worker:
    """An actor: the loop of a cache job, and where to report its commits."""

    def __init__(self, config: CacheConfig, folder: Path, events: "Queue") -> None:
        _change_to(folder)
        self._config, self._events, self._stop = config, events, Stop()

    def compute(self, name: str) -> int:
        """Run the loop to its end; returns the batch size at the end.

        Raises:
            UserError: See ``teacher_service.cache.job.cache``.
        """
        self._events.put((name, None))
        job = join(survey(self._config), self._config)
        report = compute(
            job,
            remaining_tasks(job.store),
            on_commit=lambda done: self._events.put((name, done)),
            on_wait=partial(say, error=True),
            lease_seconds=self._config.sharing.lease_seconds,
            stop=self._stop,
        )
        return report.batch_size

    def stop(self) -> None:
        """Finish or abandon what is under way."""
        self._stop.set()


class _Crew:
    """The actors of a job, seen from the driver; use as a context manager, leaving it ends them."""

    def __init__(self, ray: Any, config: CacheConfig, demand: dict[str, float], tasks: list[Task]) -> None:
        self._ray, self._tasks = ray, tasks
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=True
        )
        # Beside the driver: an autoscaler may remove a node whose actors ask for nothing.
        self._events = ray.util.queue.Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
        # Ray restarts a dead actor where there is room; this process then calls it again.
        worker = ray.remote(_Worker).options(**demand, max_restarts=-1, max_task_retries=0, max_concurrency=2)
        count = min(len(tasks), config.sharing.ray.num_actors or _room(ray, demand))
        self._workers = {f"actor-{i}": worker.remote(config, Path.cwd(), self._events) for i in range(count)}
        self._running: dict[Any, str] = {}
        self._started: set[str] = set()
        self._deaths_in_a_row = 0
        self._batch_size = config.compute.batch_size
        self._committed: list[UnitDone] = []
        self._times: dict[str, StageTimes] = {}

    def __enter__(self) -> "_Crew":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers.values():
            self._ray.kill(worker)
        self._events.shutdown()

    def run(self, on_commit: Callable[[UnitDone], None], stop: Stop) -> PipelineReport:
        """Run every actor's loop; ends when one finds nothing left and the others that have started end too."""
        began, ends = time.perf_counter(), False
        for name in self._workers:
            self._call(name)
        while awaited := self._at_work() if ends else list(self._running):
            if stop.is_set() and not ends:
                for worker in self._workers.values():
                    worker.stop.remote()
                ends = True
            ended, _ = self._ray.wait(awaited, timeout=POLL_SECONDS)
            for reference in ended:
                ends = self._end(reference, again=not ends) or ends
            self._receive(on_commit)
        self._receive(on_commit)
        done = {each.task for each in self._committed}
        return PipelineReport(
            committed=tuple(done),
            abandoned=tuple(task for task in self._tasks if task not in done),
            images=sum(each.images for each in self._committed),
            seconds=time.perf_counter() - began,
            times=StageTimes.together(self._times.values()),
            batch_size=self._batch_size,
        )

    def _at_work(self) -> list[Any]:
        """Calls of actors that have started; the others may never find room."""
        return [reference for reference, name in self._running.items() if name in self._started]

    def _call(self, name: str) -> None:
        self._running[self._workers[name].compute.remote(name)] = name

    def _end(self, reference: Any, *, again: bool) -> bool:
        """Whether an actor's loop came to its end; one that died is called again."""
        name = self._running.pop(reference)
        try:
            self._batch_size = min(self._batch_size, self._ray.get(reference))
        except self._ray.exceptions.RayActorError as error:
            self._deaths_in_a_row += 1
            if self._deaths_in_a_row > DEATHS_IN_A_ROW:
                reason = str(error).strip().partition("\n")[0]
                raise ResourceError(
                    f"{self._deaths_in_a_row} actors died without a commit in between, the last one: {reason}; {RESUME}"
                ) from error
            self._started.discard(name)
            if again:
                self._call(name)
            return False
        return True

    def _receive(self, on_commit: Callable[[UnitDone], None]) -> None:
        for name, done in self._events.get_nowait_batch(self._events.size()):
            self._started.add(name)
            if done is not None:
                self._deaths_in_a_row = 0
                self._committed.append(done)
                self._times[name] = done.times
                on_commit(done)


def _room(ray: Any, demand: dict[str, float]) -> int:
    """Actors the cluster has room for now; one at least, for a cluster that grows."""
    has = ray.cluster_resources()
    shares = [has.get("CPU", 0) / demand["num_cpus"]]
    shares += [has.get("GPU", 0) / demand["num_gpus"]] if demand["num_gpus"] else []
    return max(1, int(min(shares)))
