"""Prometheus metrics of the service."""

import os
from collections.abc import Callable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from teacher_service.serve.live.batcher import BatchRecord

CONTENT_TYPE = CONTENT_TYPE_LATEST
MULTIPROCESS_DIR = "PROMETHEUS_MULTIPROC_DIR"
"""Set before anything is counted where several workers count together; prometheus_client reads it too."""

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Metrics:
    """Counters of one service; all its workers' together where they share a folder."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "scalekd_http_requests", "Answers.", ("route", "method", "status"), registry=registry
        )  # fmt: skip
        self.seconds = Histogram(
            "scalekd_http_request_seconds", "From the request's headers to the answer's last byte.", ("route",),
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.sent = Counter("scalekd_http_response_bytes", "Bytes of answers' bodies.", ("route",), registry=registry)
        self.received = Counter(
            "scalekd_http_request_bytes", "Bytes of requests' bodies.", ("route",), registry=registry
        )  # fmt: skip
        self.rows = Counter("scalekd_rows", "Cached rows served.", registry=registry)
        self.batch_rows = Histogram(
            "scalekd_batch_rows", "Views per forward pass.", buckets=_ROWS, registry=registry
        )  # fmt: skip
        self.batch_wait = Histogram(
            "scalekd_batch_wait_seconds", "Time a batch's first views waited.", buckets=_SECONDS, registry=registry
        )
        self.batch_seconds = Histogram(
            "scalekd_batch_compute_seconds", "Time in the teacher.", buckets=_SECONDS, registry=registry
        )
        self.in_work = self._gauge("scalekd_http_requests_in_work", "Requests being answered now.")
        self.memory = self._gauge("scalekd_response_memory_bytes", "Bytes of answers on their way.")
        self.queue = self._gauge("scalekd_queue_rows", "Views that wait for the teacher.")
        self.committed = self._gauge("scalekd_committed_views", "Units times views that may be read.", "mostrecent")
        self.gpu_allocated = self._gauge("scalekd_gpu_memory_allocated_bytes", "Tensors on the teacher's GPU.")
        self.gpu_reserved = self._gauge("scalekd_gpu_memory_reserved_bytes", "Memory torch holds on that GPU.")
        self.before_scrape: list[Callable[[], None]] = []

    def observe_batch(self, record: BatchRecord) -> None:
        """Count one forward pass."""
        self.batch_rows.observe(record.rows)
        self.batch_wait.observe(record.waited)
        self.batch_seconds.observe(record.seconds)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._current())

    def totals(self) -> dict[str, float]:
        """Values by sample name, summed over labels."""
        totals: dict[str, float] = {}
        for family in self._current().collect():
            for sample in family.samples:
                totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
        return totals

    def _current(self) -> CollectorRegistry:
        """The registry after a refresh; of all workers where they share a folder."""
        for refresh in self.before_scrape:
            refresh()
        if MULTIPROCESS_DIR not in os.environ:
            return self.registry
        together = CollectorRegistry()
        MultiProcessCollector(together)
        return together

    def _gauge(self, name: str, text: str, mode: str = "livesum") -> Gauge:
        return Gauge(name, text, multiprocess_mode=mode, registry=self.registry)  # pyright: ignore[reportArgumentType]
