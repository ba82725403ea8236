"""A transport that hands requests to the service's application in this process: no socket."""

import io
import threading
from contextlib import contextmanager

from fastapi import FastAPI
from fastapi.testclient import TestClient

from feature_store.teacher.model import Teacher
from teacher_service.serve.app import create_app
from teacher_service.serve.config import ServeConfig
from teacher_service.serve.live.teacher import Batching, LiveTeacher
from teacher_service.serve.service import Service


class _Answer:
    def __init__(self, response) -> None:
        self.status, self._headers, self._body = response.status_code, response.headers, io.BytesIO(response.content)

    def getheader(self, name: str, default: str) -> str:
        return self._headers.get(name, default)

    def readinto(self, memory: memoryview) -> int:
        return self._body.readinto(memory[: 1 << 16])

    def read(self, amount: int) -> bytes:
        return self._body.read(amount)


class AppTransport:
    """See feature_store.client.transport.Transport; ``asked`` keeps what was sent."""

    url = "http://localhost:8000"

    def __init__(self, app: FastAPI) -> None:
        self.serve(app)
        self._lock = threading.Lock()  # TestClient is for one thread
        self.asked: list[tuple[str, str, int]] = []

    def serve(self, app: FastAPI) -> None:
        """Put another application behind the same URL."""
        self._client = TestClient(app, base_url=self.url)

    @contextmanager
    def send(self, method, target, headers, body, timeout):
        whole = body if isinstance(body, bytes) else b"".join(body)
        with self._lock:
            response = self._client.request(method, target, headers=dict(headers), content=whole or None)
        self.asked.append((method, target, response.status_code))
        yield _Answer(response)


def service_app(store, teacher: Teacher | None = None, **options) -> FastAPI:
    """The application over a store, loaded; with a live teacher if one is given."""
    live = None
    if teacher is not None:
        live = LiveTeacher(lambda: teacher, Batching(max_rows=8, max_wait=0.0, queue_rows=64)).start(wait=True)
    service = Service(ServeConfig(store=str(store), **options), live)
    service.load()
    return create_app(service)
