"""Reports of progress to a terminal, a JSON lines file, Prometheus."""

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from feature_store.errors import ResourceError
from feature_store.format.manifest import Manifest
from feature_store.tools.options import environment_number
from feature_store.tools.terminal import Console
from teacher_service.cache.decode import Task
from teacher_service.cache.pipeline import UnitDone
from teacher_service.cache.progress import Progress
from teacher_service.cache.stage_timer import StageTimes
from teacher_service.config import Reporting


class Observer(Protocol):
    """Receives a job's progress; from any thread."""

    def computed(self, images: int, times: StageTimes) -> None:
        """View images computed so far, and stage times."""

    def committed(self, done: UnitDone) -> None:
        """A unit's views are safe."""


class Observers:
    """Several observers as one."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = observers

    def computed(self, images: int, times: StageTimes) -> None:
        """See Observer."""
        for each in self._observers:
            each.computed(images, times)

    def committed(self, done: UnitDone) -> None:
        """See Observer."""
        for each in self._observers:
            each.committed(done)


@contextmanager
def observed(config: Reporting, console: Console, manifest: Manifest, tasks: Sequence[Task]) -> Iterator[Observers]:
    """The observers a job's configuration asks for, while the context lasts.

    Of several processes of one machine (torchrun) the first draws on the terminal; each has its own metrics port,
    counted up from the one given.

    Raises:
        ResourceError: The log cannot be written or the port is taken.
    """
    rank = environment_number("LOCAL_RANK", 0)
    observers: list[Observer] = []
    with ExitStack() as stack:
        if config.log_jsonl is not None:
            observers.append(JsonLines(config.log_jsonl, manifest, tasks))
        if config.metrics_port is not None:
            port = config.metrics_port and config.metrics_port + rank
            metrics = stack.enter_context(Metrics(config.metrics_host, port, manifest, tasks))
            console.print(f"metrics: {metrics.url}", soft_wrap=True)
            observers.append(metrics)
        shown = console if not rank else Console(quiet=True)
        yield Observers([*observers, stack.enter_context(Progress(shown, manifest, tasks))])


def append_event(path: Path, event: str, **values: Any) -> None:
    """Add a line to a JSON lines file, whole even if other processes add theirs.

    Raises:
        ResourceError: It cannot be written.
    """
    line = json.dumps({"event": event, "time": time.time(), "process": os.getpid(), **values}) + "\n"
    try:
        with path.open("a") as file:
            file.write(line)
    except OSError as error:
        raise ResourceError(f"--log-jsonl {path} cannot be written: {error}; choose another file") from error


class JsonLines:
    """Adds a line for the start and for each unit; ``append_event`` adds the end."""

    def __init__(self, path: Path, manifest: Manifest, tasks: Sequence[Task]) -> None:
        self._path, self._manifest = path, manifest
        self._images, self._started = 0, time.perf_counter()
        append_event(path, "start", units=len(manifest.tars), tasks=len(tasks), images=_images(manifest, tasks))

    def computed(self, images: int, times: StageTimes) -> None:
        """See Observer."""
        self._images = images

    def committed(self, done: UnitDone) -> None:
        """See Observer."""
        append_event(
            self._path,
            "unit",
            unit=done.task.unit,
            tar=self._manifest.tars[done.task.unit].name,
            views=list(done.task.views),
            images=done.images,
            bytes=done.bytes,
            quarantined=done.quarantined,
            images_per_second=self._images / (time.perf_counter() - self._started),
            stages={stage: done.times.share(stage) for stage in done.times.available},
            bottleneck=done.times.bottleneck,
        )


class Metrics:
    """A Prometheus endpoint; use as a context manager.

    Args:
        host: Address to listen on.
        port: Port; 0 for any that is free.
        manifest: The store's.
        tasks: The run's tasks.

    Raises:
        ResourceError: The port is taken.
    """

    def __init__(self, host: str, port: int, manifest: Manifest, tasks: Sequence[Task]) -> None:
        registry = CollectorRegistry()
        name = "teacher_service_"
        self._images = Gauge(f"{name}images", "View images given to the teacher by this process", registry=registry)
        self._tasks = Counter(f"{name}tasks_committed", "Tasks (views of a unit) committed", registry=registry)
        self._bytes = Counter(f"{name}bytes_written", "Bytes of committed objects", registry=registry)
        self._bad = Counter(f"{name}samples_quarantined", "Samples that cannot be used", registry=registry)
        self._busy = Gauge(f"{name}stage_busy_share", "Share of its time a stage worked", ["stage"], registry=registry)
        Gauge(f"{name}tasks_planned", "Tasks of the job when it began", registry=registry).set(len(tasks))
        planned = Gauge(f"{name}images_planned", "View images of the job when it began", registry=registry)
        planned.set(_images(manifest, tasks))
        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except OSError as error:
            raise ResourceError(
                f"--metrics-port {port} on {host} cannot be used: {error}; choose another port, or 0 for any"
            ) from error
        self.url = f"http://{host}:{self._server.server_port}/metrics"

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def computed(self, images: int, times: StageTimes) -> None:
        """See Observer."""
        self._images.set(images)
        for stage in times.available:
            self._busy.labels(stage).set(times.share(stage))

    def committed(self, done: UnitDone) -> None:
        """See Observer."""
        self._tasks.inc()
        self._bytes.inc(done.bytes)
        self._bad.inc(len(done.quarantined))


def _images(manifest: Manifest, tasks: Sequence[Task]) -> int:
    return sum(manifest.tars[task.unit].samples * len(task.views) for task in tasks)
