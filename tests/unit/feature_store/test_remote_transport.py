"""Connections: kept open, given up when broken, and each process's own."""

import gc
import http.client
import multiprocessing
import os
import pickle
import socket
import threading

import pytest
from servers import WebServer

from feature_store.client.transport import LOST, HttpTransport


@pytest.fixture
def server(tmp_path):
    (tmp_path / "file").write_bytes(b"0123456789")
    with WebServer(tmp_path) as server:
        yield server


def get(transport: HttpTransport, target: str = "/file") -> tuple[int, bytes]:
    with transport.send("GET", target, {}, b"", 5.0) as answer:
        return answer.status, answer.read(100)


@pytest.fixture
def seen(server, monkeypatch) -> list:
    """Every connection the server took."""
    taken = []
    original = server.server.process_request
    monkeypatch.setattr(server.server, "process_request", lambda *of: (taken.append(of[1]), original(*of))[1])
    return taken


def test_connection_is_used_again_when_its_answer_was_read(server, seen):
    transport = HttpTransport(server.url)
    assert [get(transport) for _ in range(3)] == [(200, b"0123456789")] * 3
    assert get(transport, "/missing")[0] == 404
    assert len(seen) == 1


def test_connection_is_closed_when_its_answer_was_left_unread(server, seen):
    transport = HttpTransport(server.url)
    with transport.send("GET", "/file", {}, b"", 5.0) as answer:
        assert answer.read(3) == b"012"
    assert get(transport) == (200, b"0123456789")
    assert len(seen) == 2


def test_body_lands_in_the_memory_given_when_read_into(server):
    memory = bytearray(10)
    with HttpTransport(server.url).send("GET", "/file", {}, b"", 5.0) as answer:
        assert answer.readinto(memoryview(memory)[:4]) == 4
        assert answer.readinto(memoryview(memory)[4:]) == 6
        assert answer.readinto(memoryview(bytearray(1))) == 0
    assert memory == b"0123456789"


def test_path_of_the_url_comes_first_when_the_service_is_below_one(server):
    transport = HttpTransport(server.url + "/base/")
    get(transport)
    assert server.requests[-1][1] == "/base/file"
    assert transport.url == server.url + "/base"


def test_lost_connection_is_one_of_the_named_errors_when_nobody_listens(server):
    transport = HttpTransport(server.url)
    server.server.shutdown()
    server.server.server_close()
    with pytest.raises(LOST):
        get(transport)


def test_threads_have_their_own_connections_when_they_ask_at_once(server, seen):
    transport, answers = HttpTransport(server.url), []
    barrier = threading.Barrier(4)

    def ask() -> None:
        with transport.send("GET", "/file", {}, b"", 5.0) as answer:
            barrier.wait(5)
            answers.append(answer.read(100))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert answers == [b"0123456789"] * 4
    assert len(seen) == 4
    get(transport)
    assert len(seen) == 4


def test_forked_process_opens_its_own_connection_when_the_parent_has_one(server, seen):
    transport = HttpTransport(server.url)
    get(transport)
    reading, writing = multiprocessing.Pipe(duplex=False)
    child = os.fork()
    if child == 0:  # what it inherited must not be used: the parent's answers would go astray
        writing.send(get(transport))
        os._exit(0)
    os.waitpid(child, 0)
    assert reading.recv() == (200, b"0123456789")
    assert get(transport) == (200, b"0123456789")
    assert len(seen) == 2


def test_transport_works_when_pickled(server):
    transport = HttpTransport(server.url)
    get(transport)
    again = pickle.loads(pickle.dumps(transport))  # noqa: S301 - made here
    assert get(again) == (200, b"0123456789")


def test_connections_are_closed_when_their_owner_is_garbage_in_a_cycle(server):
    owner = {"transport": HttpTransport(server.url)}
    owner["itself"] = owner
    get(owner["transport"])
    idle = owner["transport"]._idle().connections[0]
    del owner
    gc.collect()  # an open socket would warn, which is an error here
    assert idle.sock is None


@pytest.mark.parametrize("unasked", [b"", b"HTTP/1.1 408 \r\nContent-Length: 0\r\nConnection: close\r\n\r\n"])
def test_connection_is_not_used_again_when_the_server_closed_it_or_wrote_unasked(unasked):
    transport = HttpTransport("http://127.0.0.1:1")
    theirs, ours = socket.socketpair()
    with theirs, ours:
        kept = http.client.HTTPConnection("127.0.0.1")
        kept.sock = ours
        transport._idle().connections.append(kept)
        assert transport._connection(transport._idle(), 5.0) is kept
        transport._idle().connections.append(kept)
        theirs.sendall(unasked) if unasked else theirs.close()
        fresh = transport._connection(transport._idle(), 5.0)
        assert fresh is not kept
        assert fresh.sock is None
        assert kept.sock is None
