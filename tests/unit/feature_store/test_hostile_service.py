"""Clients against a server that lies, trickles, floods and says what nobody asked for: an error in time, never data."""

import gzip
import itertools
import json
import socket
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import asdict

import numpy as np
import pytest
from scripted_transport import Answered, ScriptedTransport, frame_of

from feature_store import connect
from feature_store.client.live import RemoteLiveSource
from feature_store.client.objects import ServedObjects
from feature_store.client.service import RetryPolicy, ServiceClient
from feature_store.client.transport import HttpTransport
from feature_store.errors import InputError, ResourceError, UnknownFieldError, UserError, WireError
from feature_store.format.manifest import SplitInfo, TeacherInfo

TOKEN = "skc_secret"
HASTY = RetryPolicy(deadline=0.4, timeout=0.2, first_pause=0.01, longest_pause=0.05)
ONCE = RetryPolicy(deadline=10, timeout=10, first_pause=100, longest_pause=100)  # a last try in no time could time out


class Hostile:
    """Answers each request by a function of its connection, the number of the request and its head."""

    def __init__(self, answer: Callable[[socket.socket, int, bytes], None]) -> None:
        self.requests: list[bytes] = []
        self.connections = 0
        self._answer, self._open = answer, []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            self._open.append(connection)
            self._threads.append(threading.Thread(target=self._serve, args=(connection,), daemon=True))
            self._threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                while head := self._head(connection):
                    self.requests.append(head)
                    self._answer(connection, len(self.requests), head)
            except OSError:
                return

    def _head(self, connection: socket.socket) -> bytes:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            piece = connection.recv(1)
            if not piece:
                return b""
            head += piece
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                left = int(line.partition(b":")[2])
                while left:
                    left -= len(connection.recv(left))
        return head

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._threads[0].join()
        for connection in self._open:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
        for thread in self._threads:
            thread.join()


@contextmanager
def hostile(answer):
    server = Hostile(answer)
    try:
        yield server
    finally:
        server.close()


def saying(answer: bytes) -> Callable[[socket.socket, int, bytes], None]:
    """The same bytes to every request, then the connection is closed."""

    def say(connection, _number, _head):
        connection.sendall(answer)
        connection.shutdown(socket.SHUT_RDWR)

    return say


def reply(body: bytes, *headers: str, status: str = "200 OK", length: object = None) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def trickle(before: bytes, drop: bytes):
    """Some bytes at once, then a few for ever, faster than a connection without a byte counts as lost."""

    def say(connection, _number, _head):
        connection.sendall(before)
        while True:
            connection.sendall(drop)
            time.sleep(0.02)

    return say


@pytest.mark.parametrize(
    "answer",
    [
        trickle(b"", b"H"),
        trickle(b"HTTP/1.1 200 OK\r\nX: ", b"a"),
        trickle(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        trickle(reply(b"", length=10_000), b" "),
        trickle(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
        trickle(reply(b"", status="503 Busy", length=10_000), b" "),
    ],
    ids=["status", "header", "continue", "body", "chunks", "refusal"],
)
@pytest.mark.parametrize("ask", ["json", "frame", "object"])
def test_call_ends_when_an_answer_trickles_for_ever(answer, ask):
    with hostile(answer) as server:
        service = ServiceClient.at(server.url, TOKEN, HASTY)
        asks = {
            "json": lambda: service.json("/v1/manifest"),
            "frame": lambda: service.frame("GET", "/v1/blocks"),
            "object": lambda: ServedObjects(service).get("zarr.json"),
        }
        errors = []

        def call():
            try:
                asks[ask]()
            except UserError as error:
                errors.append(error)

        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        thread.join(10)
        assert not thread.is_alive()
        assert isinstance(errors[0], ResourceError | WireError)


def test_long_answer_is_read_to_its_end_when_it_takes_longer_than_a_stall_may():
    """Slow is not stalled: a link of a megabyte a second takes its time for a large answer."""
    body = bytes(1 << 20)

    def slowly(connection, _number, _head):
        connection.sendall(reply(b"", length=len(body)))
        for start in range(0, len(body), 1 << 17):
            connection.sendall(body[start : start + (1 << 17)])
            time.sleep(0.1)

    with hostile(slowly) as server:
        assert len(ServedObjects(ServiceClient.at(server.url, None, HASTY)).get("x")) == len(body)
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    "length", ["-1", "+5", "1" * 5000, str(1 << 62), str(1 << 40), "0x10", "5, 5", "", "٣"], ids=lambda text: text[:9]
)
def test_answer_is_refused_when_its_length_is_no_length_of_it(length):
    answer = f"HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\nhello".encode()
    with hostile(saying(answer)) as server:
        service = ServiceClient.at(server.url, TOKEN, HASTY)
        for ask in (
            lambda: service.frame("GET", "/v1/blocks"),
            lambda: ServedObjects(service).get("x"),
            lambda: ServedObjects(service).size("x"),
        ):
            with pytest.raises((WireError, ResourceError)):
                ask()


@pytest.mark.parametrize("length", [3, 5, 1000])
def test_range_is_refused_when_another_one_comes(length):
    """Bytes of another length than asked, or of another place: neither may be taken for those asked for."""
    answers = [
        reply(b"x" * length, f"Content-Range: bytes 10-{10 + length - 1}/5000", status="206 Partial"),
        reply(b"x" * 4, "Content-Range: bytes 20-23/5000", status="206 Partial"),
    ]
    for answer in answers:
        with hostile(saying(answer)) as server, pytest.raises(WireError):
            ServedObjects(ServiceClient.at(server.url, TOKEN, ONCE)).get_range("x", 10, 4)


def test_range_is_shorter_when_the_object_ends():
    answer = reply(b"xy", "Content-Range: bytes 10-11/12", status="206 Partial")
    with hostile(saying(answer)) as server:
        assert bytes(ServedObjects(ServiceClient.at(server.url, TOKEN, HASTY)).get_range("x", 10, 4)) == b"xy"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirect_is_refused_and_the_token_stays(status):
    with hostile(saying(reply(b"{}"))) as other:
        there = saying(reply(b"", f"Location: {other.url}/v1/manifest", status=f"{status} Elsewhere"))
        with hostile(there) as server:
            with pytest.raises(InputError, match=str(status)):
                ServiceClient.at(server.url, TOKEN, HASTY).json("/v1/manifest")
            with pytest.raises(InputError, match=str(status)):
                ServedObjects(ServiceClient.at(server.url, TOKEN, HASTY)).get("zarr.json")
        assert other.requests == []


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 5000 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" * 5000,
        b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" * 50,
        b"HTTP/9.9 200 OK\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"\x00" * 1000,
        b"HTTP/1.1 999999 What\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"f" * 5000 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nhello",
        reply(gzip.compress(b'{"identity": "x"}', mtime=0), "Content-Encoding: gzip"),
        reply(b"[" * 100_000),
        reply(b'{"a": ' + b"9" * 10_000 + b"}"),
        reply(b"\xff\xfe{}"),
        reply(b"", status="429 Busy", length=0).replace(b"\r\n\r\n", b"\r\nRetry-After: " + b"9" * 5000 + b"\r\n\r\n"),
        reply(b"", "Retry-After: Mon, 01 Jan 99999999999999999999 00:00:00 GMT", status="429 Busy"),
        reply(b"", "Retry-After: Mon, 01 Jan 2020 00:00:00 +99999999999999999999", status="503 Busy"),
        reply(b'{"type": 5, "detail": {"a": [1]}}', status="404 Not Found"),
        reply(b'{"type": ["x"], "detail": NaN}', status="500 Oh"),
        reply(b"null"),
        reply(b"[]"),
        reply(b'{"identity": NaN, "max_rows": NaN, "max_response_bytes": Infinity}'),
        reply(b'{"identity": "x", "max_rows": "many", "max_response_bytes": -1}'),
    ],
)  # fmt: skip
def test_connecting_ends_in_a_users_error_whatever_answers(answer):
    with hostile(saying(answer)) as server, pytest.raises(UserError) as caught:
        connect(server.url, TOKEN, retry=HASTY)
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize("rows", [0, -1, True, None, "9", 1.5, float("nan")])
def test_client_refuses_a_service_whose_limits_are_no_numbers(rows):
    described = json.dumps({"identity": "x", "max_rows": rows, "max_response_bytes": rows}).encode()
    with hostile(saying(reply(described))) as server, pytest.raises(InputError, match="max_rows"):
        connect(server.url, retry=HASTY)


def test_answer_nobody_asked_for_is_never_taken_when_a_connection_is_used_again():
    """Every answer is followed by a second one that nobody asked for, in one piece and in two, at once and later."""
    pauses, said, taken = itertools.cycle([0.0, 0.02, 0.02]), threading.Semaphore(0), []

    def twice(connection, number, _head):
        good, poison = reply(b"good %d" % number), reply(b"poison" + b"!" * (number % 7 * 3000))
        cut = len(good) if number % 2 else len(good) + 5
        both = good + poison
        connection.sendall(both[:cut])
        time.sleep(next(pauses))
        with suppress(OSError):  # the client has hung up, and rightly
            connection.sendall(both[cut:])
        said.release()

    with hostile(twice) as server:
        transport = HttpTransport(server.url)
        for number in range(1, 40):
            with transport.send("GET", "/", {}, b"", 5.0) as answer:
                taken.append((number, answer.read(100)))
            said.acquire()
    assert taken == [(number, b"good %d" % number) for number in range(1, 40)]


def test_answer_nobody_asked_for_is_never_taken_when_a_long_one_came_before():
    """A read of a long body sleeps until much of it is there; a few bytes more must still be noticed."""
    said = threading.Semaphore(0)

    def twice(connection, number, _head):
        connection.sendall(reply(b"%d" % number * 1_000_000))
        time.sleep(0.05)
        with suppress(OSError):
            connection.sendall(reply(b"poison"))
        said.release()

    with hostile(twice) as server:
        transport = HttpTransport(server.url)
        for number in range(1, 5):
            memory = memoryview(bytearray(1_000_000))
            with transport.send("GET", "/", {}, b"", 30.0) as answer:
                done = 0
                while got := answer.readinto(memory[done:]):
                    done += got
            assert bytes(memory) == b"%d" % number * 1_000_000
            said.acquire()
        assert server.connections == 4


def test_connection_is_given_up_when_bytes_that_came_with_an_answer_are_not_of_it():
    with hostile(lambda connection, _number, _head: connection.sendall(reply(b"good") + b"HTTP/")) as server:
        transport = HttpTransport(server.url)
        with transport.send("GET", "/", {}, b"", 5.0) as answer:
            assert answer.read(100) == b"good"
        assert not transport._idle().connections


def test_connection_is_not_used_again_when_a_thread_ends_in_the_middle_of_its_answer():
    def half(connection, number, _head):
        connection.sendall(reply(b"%05d" % number + b"x" * 100_000))

    with hostile(half) as server:
        transport = HttpTransport(server.url)

        def dies():
            with suppress(KeyboardInterrupt), transport.send("GET", "/", {}, b"", 5.0) as answer:
                answer.read(10)
                raise KeyboardInterrupt

        thread = threading.Thread(target=dies)
        thread.start()
        thread.join()
        with transport.send("GET", "/", {}, b"", 5.0) as answer:
            assert answer.read(5) == b"00002"
        assert server.connections == 2


def test_frame_is_refused_when_the_connection_ends_within_it():
    body = frame_of({"a": np.arange(1000, dtype=np.int64)})
    cut = saying(reply(body[:-100], length=len(body)))
    with hostile(cut) as server, pytest.raises((WireError, ResourceError)):
        ServiceClient.at(server.url, None, HASTY).frame("GET", "/v1/blocks")


TEACHER = {
    "teacher": asdict(TeacherInfo("test_vit", {}, "0" * 64, (8, 8), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), 3, "float32")),
    "split": asdict(SplitInfo("vit", 1, 4, (2, 2), 4, (2, 2), 0, "none")),
    "taps": {"stage4": [4, 2]},
    "max_batch": 8,
    "identity": "5f0c",
}


def live(described, **arrays) -> RemoteLiveSource:
    """A source whose service describes its teacher so, and answers with these arrays."""
    answers = [
        Answered(body=json.dumps(described).encode()),
        Answered(body=frame_of(arrays, teacher="0" * 64, identity="5f0c")),
    ]
    return RemoteLiveSource(ServiceClient(ScriptedTransport(lambda _: answers.pop(0)), retry=HASTY))


@pytest.mark.parametrize(
    "lie",
    [
        [], {}, "teacher", {**TEACHER, "taps": None}, {**TEACHER, "taps": {"stage4": "many"}}, {**TEACHER, "taps": [1]},
        {**TEACHER, "max_batch": 0}, {**TEACHER, "max_batch": None}, {**TEACHER, "max_batch": 1e999},
        {**TEACHER, "teacher": {"name": "x"}},
    ],
    ids=str,
)  # fmt: skip
def test_service_that_describes_no_teacher_is_refused(lie):
    with pytest.raises(InputError, match="http://service does not describe a teacher"):
        live(lie)


def test_live_source_names_a_field_of_a_newer_service():
    with pytest.raises(UnknownFieldError, match="newer release: field 'more' is unknown to this build"):
        live({**TEACHER, "split": {**TEACHER["split"], "more": 1}})


def test_live_answers_are_refused_unless_they_are_of_the_views_asked_for():
    pixels, tap, logits = np.zeros((2, 8, 8, 3), np.uint8), np.ones((2, 4, 2), np.float32), np.ones((2, 3), np.float32)
    assert live(TEACHER, stage4=tap, logits=logits).compute(pixels, ["stage4"])["stage4"].tolist() == tap.tolist()
    for wrong in ({"logits": logits}, {"stage4": tap[:1], "logits": logits}, {"stage4": tap, "logits": logits[:1]}):
        with pytest.raises(WireError, match="answered without"):
            live(TEACHER, **wrong).compute(pixels, ["stage4"])
