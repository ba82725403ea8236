"""State the routes share: the open store, readiness, memory, metrics."""

import asyncio
import logging
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fastapi import Request

from feature_store.backends.base import ObjectStore
from feature_store.backends.open import open_objects
from feature_store.commits import index as commit_index
from feature_store.commits.record import FOLDER
from feature_store.commits.root import ROOT
from feature_store.errors import ResourceError, UserError
from feature_store.read.reader import ZarrSource
from feature_store.store import Store, open_store
from feature_store.tools.info import summarise
from teacher_service.serve.config import ServeConfig
from teacher_service.serve.memory import ResponseMemory
from teacher_service.serve.metrics import Metrics
from teacher_service.serve.problems import Problem

if TYPE_CHECKING:
    from teacher_service.serve.live.teacher import LiveTeacher  # imports torch

_LOOK_SECONDS = 0.05
_LOOK_LONGEST = 2.0
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoreSnapshot:
    """A store as it was when it was opened.

    Attributes:
        store: The store.
        source: Its rows.
        state: State of the store: the root's bytes, and the size of every object among the commit records.
    """

    store: Store
    source: ZarrSource
    state: tuple[bytes, Mapping[str, int]]

    @cached_property
    def summary(self) -> dict[str, Any]:
        """Summary of the store's content, cached: with hundred thousands of tars it takes seconds."""
        return summarise(self.store)

    @cached_property
    def commit_index(self) -> bytes:
        """The commit index of the open store; HTTP clients, which cannot list objects, open the store by it."""
        sizes = self.state[1]
        records = [(record, sizes[record.path]) for record in self.store.committed.records if record.path in sizes]
        return commit_index.build_index(self.store.layout, records).encode()


class Service:
    """One process of the service.

    Args:
        config: Configuration of the service.
        live: The live teacher, if there is one; started and closed with the service.

    Attributes:
        metrics: Prometheus metrics.
        memory: Memory of responses.
        draining: Whether it is shutting down.
        failure: Why it could not be loaded.
    """

    def __init__(self, config: ServeConfig, live: "LiveTeacher | None" = None) -> None:
        self.config, self.live = config, live
        limits = config.limits
        self.memory = ResponseMemory(limits.max_bytes_in_flight, keep=limits.max_bytes_in_flight // 4)
        self.metrics = Metrics()
        self.metrics.before_scrape.append(self._measure)
        self.draining = False
        self.failure: UserError | None = None
        self._opened: StoreSnapshot | None = None
        self._loading = threading.Lock()
        self._looking: asyncio.Future[str] | None = None

    @property
    def opened(self) -> StoreSnapshot:
        """The store as it is open now; ask once per request.

        Raises:
            Problem: It is not open yet.
        """
        if self._opened is None:
            raise Problem("not-ready", self.not_ready)
        return self._opened

    @property
    def store(self) -> Store:
        """The open store; see opened."""
        return self.opened.store

    @property
    def not_ready(self) -> str:
        """Why it is not ready; empty if it is."""
        if self.draining:
            return "the service is draining; ask another one"
        if self.failure is not None:
            return "the service could not be loaded; its log says why"
        if self._opened is None:
            return "the store is being opened"
        return self.live.not_ready if self.live is not None else ""

    async def away(self) -> str:
        """Why the store is out of reach; empty if it is not. Concurrent callers share one look."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.ensure_future(asyncio.to_thread(whereabouts, self.store.objects))
        try:
            async with asyncio.timeout(_LOOK_LONGEST):
                return await asyncio.shield(self._looking)
        except TimeoutError:
            return f"the store has not answered for {_LOOK_LONGEST:g} seconds; check its file system"

    def load(self) -> None:
        """Open the store, or open it again if it has changed; requests see the old one until the new one is whole.

        Raises:
            InputError, CorruptStoreError, ResourceError: It cannot be opened.
        """
        with self._loading:
            state = self._state()
            if self._opened is not None and self._opened.state == state:
                return
            store = open_store(self.config.store)
            store.rows([], 0)  # builds the key index now and not in the first request
            self._opened = StoreSnapshot(store, store.source(), state)

    async def run(self, on_failure: Callable[[], None]) -> None:
        """Load, then look for changes until cancelled.

        Args:
            on_failure: Called when store or teacher could not be loaded; failure says why.
        """
        try:
            await asyncio.gather(asyncio.to_thread(self.load), self._load_teacher())
        except UserError as error:
            self.failure = error
            return on_failure()
        while self.config.refresh_seconds:
            await asyncio.sleep(self.config.refresh_seconds)
            await asyncio.to_thread(self._refresh)
        return None

    async def _load_teacher(self) -> None:
        if self.live is None:
            return
        self.live.start()
        while self.live.loading:  # not by a thread that waits: a service stopped during the load would wait for it
            await asyncio.sleep(_LOOK_SECONDS)
        if self.live.not_ready:
            raise self.live.error or ResourceError(self.live.not_ready)

    def _refresh(self) -> None:
        try:
            self.load()
        except (UserError, OSError) as error:  # the store that is open stays in use
            _logger.warning("could not look for new rows: %s", error)

    def _state(self) -> tuple[bytes, Mapping[str, int]]:
        objects = self._opened.store.objects if self._opened is not None else open_objects(self.config.store)
        try:
            root = objects.get(ROOT).tobytes()
        except FileNotFoundError:
            root = b""  # open_store says what is wrong
        return root, objects.sizes(FOLDER) if objects.lists else {}

    def _measure(self) -> None:
        """Bring the gauges up to date."""
        self.metrics.memory.set(self.memory.used)
        if self._opened is not None:
            self.metrics.committed.set(self._opened.store.committed.places)
        if self.live is not None:
            self.metrics.queue.set(self.live.waiting)
            self._measure_gpu()

    def _measure_gpu(self) -> None:
        import torch

        assert self.live is not None
        with suppress(ResourceError, RuntimeError):  # still loading, or lost: that is readiness' business
            device = next(self.live.teacher.parameters()).device
            if device.type == "cuda":
                self.metrics.gpu_allocated.set(torch.cuda.memory_allocated(device))
                self.metrics.gpu_reserved.set(torch.cuda.memory_reserved(device))


def whereabouts(objects: ObjectStore) -> str:
    """Reason why an opened store cannot be reached; empty if it can."""
    try:
        objects.size(ROOT)
    except (OSError, ResourceError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is out of reach"
        return (
            f"the store is not where it was opened ({reason}): it was moved, removed or unmounted, and not damaged; "
            "bring it back"
        )
    return ""


async def service_of(request: Request) -> Service:
    """The service behind a request, for FastAPI's Depends."""
    return request.app.state.service
