"""Requests that are answered before their body was read: over real sockets, with a teacher that computes when told."""

import http.client
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import anyio.to_thread
import numpy as np
import pytest
from served_store import make_store, make_tokens
from servers import UvicornThread

from feature_store.client import frames
from feature_store.client.service import RetryPolicy
from feature_store.client.service import ServiceClient as Calls
from feature_store.errors import InputError, ResourceError
from feature_store.teacher.model import load_teacher
from teacher_service.serve.app import create_app
from teacher_service.serve.config import Limits, ServeConfig
from teacher_service.serve.live.batcher import DeviceFaultError
from teacher_service.serve.live.teacher import Batching, LiveTeacher
from teacher_service.serve.protocol import serving_options
from teacher_service.serve.routes.parameters import COMPUTE
from teacher_service.serve.service import Service
from teacher_service.serve.tokens import TokenFile


class HeldTeacher:
    """A teacher that computes nothing while held, but for the pass by which a live teacher starts."""

    def __init__(self, teacher) -> None:
        self._teacher, self.entered, self.gate = teacher, threading.Semaphore(0), threading.Event()
        self.gate.set()
        self.rows = 0

    def __getattr__(self, name):
        return getattr(self._teacher, name)

    def __call__(self, pixels, taps=None):
        self.entered.release()
        assert self.gate.wait(60)
        self.rows += len(pixels)
        return self._teacher(pixels, taps)


class Serving(UvicornThread):
    """A service with a held teacher."""

    def __init__(self, app, teacher: HeldTeacher, live: LiveTeacher, limits: Limits, keep_alive: int) -> None:
        super().__init__(app, timeout_keep_alive=keep_alive, **serving_options(limits))
        self.app, self.teacher, self.live = app, teacher, live

    @contextmanager
    def full(self, rows: int = 4) -> Iterator[None]:
        """The teacher at work and so many rows of the queue's four taken; all are answered in the end."""
        while self.teacher.entered.acquire(blocking=False):
            pass
        self.teacher.gate.clear()
        with ThreadPoolExecutor(2) as pool:
            try:
                first = pool.submit(post, self, views(1))
                assert self.teacher.entered.acquire(timeout=20)
                waiting = pool.submit(post, self, views(rows))
                until(lambda: self.live.waiting == rows)
                yield
            finally:
                self.teacher.gate.set()
            assert first.result(20)[0] == waiting.result(20)[0] == 200

    def close(self) -> None:
        self.teacher.gate.set()
        super().close()
        self.live.close(10)


def views(count: int) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), np.uint8)
    return b"".join(frames.encode({"pixels": pixels}).chunks())


def post(serving: Serving, body: bytes) -> tuple[int, str | None]:
    connection = http.client.HTTPConnection("127.0.0.1", serving.port, timeout=60)
    connection.request("POST", COMPUTE, body, {"Content-Type": frames.MEDIA_TYPE})
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status, answer.getheader("Retry-After")


def head(length: int | None = None, *more: str) -> bytes:
    """Headers of a frame that is this long; None sends it in chunks."""
    size = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    lines = [f"POST {COMPUTE} HTTP/1.1", "Host: localhost", f"Content-Type: {frames.MEDIA_TYPE}", size, *more]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def answer_of(connection: socket.socket) -> tuple[bytes, bytes]:
    """Head and body of one answer with a Content-Length; nothing beyond it is taken."""
    got = b""
    while b"\r\n\r\n" not in got:
        piece = connection.recv(1)
        assert piece, got
        got += piece
    (length,) = [int(line.split(b":")[1]) for line in got.lower().split(b"\r\n") if line.startswith(b"content-length")]
    body = b""
    while len(body) < length:
        body += connection.recv(length - len(body))
    return got, body


def is_closed(connection: socket.socket) -> bool:
    """Whether the other side has closed it, within the socket's timeout."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


@pytest.fixture(scope="module")
def store(tmp_path_factory, tiny_swin):
    return make_store(tmp_path_factory.mktemp("overload"), tiny_swin)


@pytest.fixture(scope="module")
def start(store, tiny_swin):
    """A service whose queue takes four rows beside the two being computed."""
    made = []
    teacher = load_teacher(tiny_swin.name, checkpoint=tiny_swin.checkpoint, model_kwargs=tiny_swin.model_kwargs)

    def start(*, keep_alive: int = 5, tokens=None, **limits) -> Serving:
        held, config = HeldTeacher(teacher), ServeConfig(store=str(store), limits=Limits(**limits))
        live = LiveTeacher(lambda: held, Batching(max_rows=1, max_wait=0.0, queue_rows=4)).start(wait=True)
        service = Service(config, live)
        service.load()
        made.append(Serving(create_app(service, tokens), held, live, config.limits, keep_alive))
        return made[-1]

    yield start
    for each in made:
        each.close()


@pytest.fixture(scope="module")
def serving(start):
    return start()


def test_request_is_refused_from_its_headers_alone_when_the_queue_is_full(serving):
    with serving.full(), serving.raw() as connection:
        connection.sendall(head(len(views(1))))
        found, problem = answer_of(connection)
        assert found.startswith(b"HTTP/1.1 429")
        assert b"retry-after: 1" in found.lower()
        assert b"problem:overloaded" in problem


def test_request_is_refused_from_its_headers_alone_when_its_rows_do_not_fit(serving):
    with serving.full(2), serving.raw() as connection:
        connection.sendall(head(len(views(3))))
        assert b"2 rows wait already, and 3 more exceed the queue of 4" in answer_of(connection)[1]
        connection.sendall(views(3))
        connection.sendall(head(len(views(2))) + views(2))  # fits, on the same connection
        serving.teacher.gate.set()
        assert answer_of(connection)[0].startswith(b"HTTP/1.1 200")


def test_request_that_never_fits_is_told_so_when_the_queue_is_empty(serving):
    assert post(serving, views(5)) == (422, None)


def test_refusal_needs_no_thread_when_the_queue_is_full(serving, monkeypatch):
    with serving.full(), serving.raw() as connection:
        monkeypatch.setattr(anyio.to_thread, "run_sync", None)
        connection.sendall(head(len(views(1))))
        assert answer_of(connection)[0].startswith(b"HTTP/1.1 429")
        monkeypatch.undo()


def test_stranger_is_not_told_that_the_queue_is_full(start, tmp_path):
    make_tokens(tmp_path / "tokens.jsonl")
    serving = start(tokens=TokenFile(tmp_path / "tokens.jsonl"))
    with serving.raw() as connection:
        serving.live.batcher.close(10)
        connection.sendall(head(100))
        assert answer_of(connection)[0].startswith(b"HTTP/1.1 401")


def test_refusal_is_counted_under_its_route_when_the_queue_is_full(serving):
    with serving.full():
        assert post(serving, views(1)) == (429, "1")
    assert f'scalekd_http_requests_total{{method="POST",route="{COMPUTE}",status="429"}}' in metrics(serving)


def test_body_need_not_be_sent_when_the_client_waits_for_a_word(serving):
    with serving.full(), serving.raw() as connection:
        connection.sendall(head(len(views(1)), "Expect: 100-continue"))
        found, _ = answer_of(connection)
        assert found.startswith(b"HTTP/1.1 429")  # and no 100 before it
        assert b"connection: close" in found.lower()  # what comes next may be this body, or another request
        assert is_closed(connection)
    with serving.raw() as connection:
        connection.sendall(head(len(views(1)), "Expect: 100-continue"))
        assert connection.recv(100).startswith(b"HTTP/1.1 100")
        connection.sendall(views(1))
        assert answer_of(connection)[0].startswith(b"HTTP/1.1 200")


def test_connection_is_used_again_when_a_refused_body_was_sent_after_all(serving):
    with serving.full(), serving.raw() as connection:
        for _ in range(3):
            connection.sendall(head(len(views(1))) + views(1))
            assert answer_of(connection)[0].startswith(b"HTTP/1.1 429")


def test_connection_is_closed_when_it_idles_after_a_refused_body(start):
    serving = start(keep_alive=1)
    with serving.full(), serving.raw() as connection:
        connection.sendall(head(len(views(1))))
        answer_of(connection)
        connection.sendall(views(1))
        connection.settimeout(10)
        assert is_closed(connection)


@pytest.mark.parametrize("length", [None, 1 << 20])
def test_connection_is_closed_when_a_refused_body_does_not_end(start, length):
    serving = start(max_body_bytes=100_000)
    with serving.full(), serving.raw() as connection:
        connection.sendall(head(length))
        assert answer_of(connection)[0].split()[1] in (b"429", b"413")
        with suppress(ConnectionError):
            for _ in range(1000):
                connection.sendall(b"2000\r\n" + bytes(0x2000) + b"\r\n")
            pytest.fail("eight megabytes were taken")


def test_connection_is_closed_when_a_refused_body_does_not_come(start):
    serving = start(body_seconds=1)
    with serving.full(), serving.raw() as connection:
        connection.sendall(head(len(views(1))) + views(1)[:-1])
        answer_of(connection)
        connection.settimeout(10)
        assert is_closed(connection)


def test_bodies_are_refused_when_those_on_their_way_take_what_there_is(start):
    serving = start(max_body_bytes=1000, max_response_bytes=1500, max_bytes_in_flight=1500)
    with serving.raw() as first, serving.raw() as second, serving.raw() as chunked:
        first.sendall(head(900) + b"x")
        until(lambda: in_work(serving) == 2)
        second.sendall(head(900))
        found, problem = answer_of(second)
        assert found.startswith(b"HTTP/1.1 429")
        assert b"900 bytes" in problem
        chunked.sendall(head(None))
        assert answer_of(chunked)[0].startswith(b"HTTP/1.1 429")
        first.sendall(bytes(899))
        assert answer_of(first)[0].startswith(b"HTTP/1.1 422")
        second.sendall(bytes(900) + head(900) + bytes(900))
        assert answer_of(second)[0].startswith(b"HTTP/1.1 422")


def in_work(serving: Serving) -> int:
    """Requests in work, with the one that asks."""
    text = metrics(serving)
    return int(
        float(next(line for line in text.splitlines() if line.startswith("scalekd_http_requests_in_work ")).split()[1])
    )


def until(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.01)


def metrics(serving: Serving) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", serving.port, timeout=20)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    return text


def test_client_reads_why_when_its_body_is_larger_than_is_taken(start):
    serving = start(max_body_bytes=100_000)
    calls = Calls.at(serving.url, retry=RetryPolicy(deadline=5, first_pause=0.1))
    with pytest.raises(InputError, match="more than 100,000 bytes"):
        calls.frame("POST", COMPUTE, bytes(64 << 20), media_type=frames.MEDIA_TYPE)


def test_client_is_told_that_the_service_is_busy_when_its_body_is_large(start):
    serving = start()
    calls = Calls.at(serving.url, retry=RetryPolicy(deadline=0.5))
    with serving.full(), pytest.raises(ResourceError, match="4 rows wait already"):
        calls.frame("POST", COMPUTE, bytes(32 << 20), media_type=frames.MEDIA_TYPE)


def test_rows_of_a_client_that_left_are_not_computed_when_they_wait(serving):
    before = serving.teacher.rows
    with serving.full(2):
        with serving.raw() as connection:
            connection.sendall(head(len(views(2))) + views(2))
            until(lambda: serving.live.waiting == 4)
        until(lambda: in_work(serving) == 3)  # the two that are answered, and the one that counts
    assert serving.teacher.rows - before == 3


def test_client_that_leaves_before_its_body_came_is_no_fault_of_the_service(serving, caplog):
    with serving.raw() as connection:
        connection.sendall(head(len(views(1))))
        until(lambda: in_work(serving) == 2)
    until(lambda: in_work(serving) == 1)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_lost_device_ends_readiness_and_is_a_503_when_the_teacher_reports_it(start):
    serving = start()

    def lost(batch):
        raise DeviceFaultError("cuda:0 is lost; restart the service")

    serving.live.batcher._model = lost
    for _ in range(2):  # the batch it happened to, and whoever comes after it
        assert post(serving, views(1)) == (503, "30")
    with serving.raw() as connection:
        connection.sendall(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        found, problem = answer_of(connection)
    assert found.startswith(b"HTTP/1.1 503")
    assert b"cuda:0 is lost" in problem


def test_one_batch_fails_and_the_next_is_answered_when_the_teacher_raises(start, caplog):
    serving = start()
    model = serving.live.batcher._model
    serving.live.batcher._model = None  # not to be called: a TypeError
    assert post(serving, views(1)) == (500, None)
    serving.live.batcher._model = model
    assert post(serving, views(1)) == (200, None)
    assert "request" in caplog.text


def test_everything_that_waits_is_answered_when_the_service_stops_with_a_full_queue(start):
    serving = start()
    with ThreadPoolExecutor(1) as pool, serving.full(3):
        last = pool.submit(post, serving, views(1))
        until(lambda: serving.live.waiting == 4)
        serving.server.should_exit = True
        until(lambda: not serving.server.servers or not serving.server.servers[0].is_serving())
        assert serving.thread.is_alive()
        serving.teacher.gate.set()
        assert last.result(20) == (200, None)
    serving.thread.join(20)
    assert not serving.thread.is_alive()
