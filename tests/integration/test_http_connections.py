"""What one connection may cost, and how it ends: pipelined requests, floods of headers, half-closed clients."""

import json
import re
import socket
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from served_store import make_store, running
from test_serve_process import ask_raw, raw, rest_of

from feature_store.client import frames

HOST = b"Host: localhost\r\n"
LIVEZ = b"GET /livez HTTP/1.1\r\n" + HOST + b"\r\n"
BODY = json.dumps({"rows": [[0, 0, 0]] * 3}).encode()
BATCH = b"POST /v1/rows:batch HTTP/1.1\r\n%sContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (
    HOST, len(BODY), BODY,
)  # fmt: skip
CHUNKED = (
    b"POST /v1/rows:batch HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
)
CHUNKS = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
REQUESTS = {
    "probes": LIVEZ,
    "paths that are not there": b"GET /nothing HTTP/1.1\r\n" + HOST + b"\r\n",
    "metrics": b"GET /metrics HTTP/1.1\r\n" + HOST + b"\r\n",
    "bodies": BATCH,
    "bodies in chunks": CHUNKED + CHUNKS,
    "bodies in the smallest chunks": CHUNKED + b"".join(b"1\r\n%c\r\n" % byte for byte in BODY) + b"0\r\n\r\n",
    "bodies that nobody reads": b"POST /livez HTTP/1.1\r\n" + HOST + b"Content-Length: 4\r\n\r\nbody",
    "shortest": b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
}


@pytest.fixture(scope="module")
def service(tmp_path_factory, tiny_swin):
    folder = tmp_path_factory.mktemp("connections")
    with running(make_store(folder, tiny_swin), folder) as started:
        started.wait_until_ready()
        yield started
        assert started.stop() == 0
        assert "Traceback" not in started.log.read_text()


def resident_bytes(service) -> int:
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{service.process.pid}/status").read_text())[1]) << 10


def flood(connection: socket.socket, data: bytes) -> None:
    try:
        while True:
            connection.sendall(data)
    except OSError:
        pass


def drain(connection: socket.socket) -> None:
    try:
        while connection.recv(1 << 16):
            pass
    except OSError:
        pass


@pytest.mark.parametrize("reads", [True, False], ids=["read", "unread"])
@pytest.mark.parametrize("name", REQUESTS)
def test_memory_stays_and_others_are_answered_when_connections_pipeline_requests(service, name, reads):
    service.get("/metrics")
    before = resident_bytes(service)
    with ExitStack() as stack:
        connections = [stack.enter_context(raw(service.url)) for _ in range(4)]
        threads = [threading.Thread(target=flood, args=(each, REQUESTS[name] * 1000)) for each in connections]
        threads += [threading.Thread(target=drain, args=(each,)) for each in connections if reads]
        for thread in threads:
            thread.start()
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            assert service.get("/livez").status == 200
            assert resident_bytes(service) - before < 50 << 20
        for connection in connections:
            with suppress(OSError):  # closed by the service
                connection.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()


def statuses(answers: bytes) -> list[bytes]:
    return re.findall(rb"HTTP/1\.1 (\d+)", answers)


@pytest.mark.parametrize("name", REQUESTS)
def test_all_pipelined_requests_are_answered_in_their_order(service, name):
    several = REQUESTS[name] * 20 + LIVEZ.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    one = {"paths that are not there": b"404", "bodies that nobody reads": b"405"}.get(name, b"200")
    if name == "shortest":
        one, several = b"200", LIVEZ * 20 + several[-len(LIVEZ) - 19 :]  # HTTP/1.0 ends with its first answer
    assert statuses(ask_raw(service.url, several)) == [one] * 20 + [b"200"]


def test_requests_are_answered_when_they_come_a_byte_at_a_time(service):
    with raw(service.url) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in LIVEZ + CHUNKED + CHUNKS + BATCH:
            connection.sendall(bytes([byte]))
        connection.shutdown(socket.SHUT_WR)
        assert statuses(rest_of(connection)) == [b"200"] * 3


def ask_half_closed(url, request: bytes) -> bytes:
    with raw(url) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        return rest_of(connection)


@pytest.mark.parametrize("request_bytes", [BATCH, CHUNKED + CHUNKS, BATCH.replace(b"HTTP/1.1", b"HTTP/1.0")])
def test_half_closed_client_gets_its_rows(service, request_bytes):
    head, _, frame = ask_half_closed(service.url, request_bytes).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert frames.decode(frame)[0]["rows"].tolist() == [[0, 0, 0]] * 3


def test_half_closed_client_gets_every_answer_when_it_pipelined_requests(service):
    assert statuses(ask_half_closed(service.url, LIVEZ * 3000)) == [b"200"] * 3000
    assert ask_half_closed(service.url, LIVEZ + LIVEZ[:20]).count(b"HTTP/1.1 200") == 1  # and is not waited for
    assert ask_half_closed(service.url, BATCH[:-5]) == b""


BAD = {
    "no request": b"GARBAGE\r\n\r\n", "no version": b"GET / \r\nHost\r\n\r\n", "two lengths": (
        b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n"
    ), "a length and chunks": CHUNKED.replace(b"Transfer", b"Content-Length: 5\r\nTransfer") + CHUNKS,
    "a space in a name": b"GET / HTTP/1.1\r\n" + HOST + b"X : y\r\n\r\n", "a chunk of no size": CHUNKED + b"x\r\n",
    "no ASCII": b"GET /\xff\xfe HTTP/1.1\r\n" + HOST + b"\r\n", "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_http_is_answered_by_a_problem(service, name):
    head, _, body = ask_raw(service.url, BAD[name]).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    headers = head.lower()
    assert b"content-type: application/problem+json" in headers
    problem = json.loads(body)
    assert (problem["type"], problem["status"]) == ("urn:scalekd-cache:problem:malformed", 400)
    assert b"x-request-id: " + problem["request_id"].encode() in headers


@pytest.mark.parametrize("first", [LIVEZ, BATCH, CHUNKED + CHUNKS])
def test_answer_stays_whole_when_bad_http_follows_its_request(service, first):
    answers = ask_raw(service.url, first + b"GARBAGE\r\n\r\n")
    assert statuses(answers)[0] == b"200"
    length = int(re.search(rb"content-length: (\d+)", answers)[1])
    rest = answers.partition(b"\r\n\r\n")[2][length:]
    assert rest == b"" or rest.startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize(
    "flood",
    [b"GET /livez HTTP/1.1\r\n" + HOST + b"a:\r\n" * 15_000, b"GET /livez HTTP/1.1\r\n" + HOST + b"a: " + b"b" * 80_000,
     b"GET /" + b"a" * 80_000, CHUNKED + b"1\r\na\r\n0\r\n" + b"X: y\r\n" * 40_000,
     CHUNKED + b"1\r\na\r\n0\r\nX: " + b"y" * 80_000, CHUNKED + b"1;" + b"x" * 80_000],
    ids=["headers", "a header", "a path", "trailers", "a trailer", "a chunk's extension"],
)  # fmt: skip
def test_flood_of_headers_is_refused(service, flood):
    answer = b""
    with raw(service.url) as connection, suppress(ConnectionError):  # what is not read may take the answer along
        connection.sendall(flood)
        answer = connection.recv(1 << 16)
        drain(connection)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 431")


def test_trailers_are_no_headers(service):
    trailer = CHUNKS.replace(b"0\r\n\r\n", b"0\r\nHost: evil.example\r\n\r\n")
    assert statuses(ask_half_closed(service.url, CHUNKED + trailer)) == [b"200"]


@pytest.mark.parametrize("protocol", [b"h2c", b"websocket"])
@pytest.mark.parametrize("split", [False, True])
def test_request_is_answered_without_the_upgrade_that_it_asks_for(service, protocol, split):
    upgrade = (
        b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: " + protocol + b"\r\nHTTP2-Settings: AAMAAABkAAQAoAAA\r\n"
    )
    requests = BATCH.replace(HOST, HOST + upgrade) + LIVEZ
    with raw(service.url) as connection:
        if split:  # and then it is no more than that
            requests = LIVEZ.replace(HOST, HOST + upgrade)
            at = requests.index(b"grade: ")
            connection.sendall(requests[:at])
            time.sleep(0.2)
            requests = requests[at:]
        connection.sendall(requests)
        connection.shutdown(socket.SHUT_WR)
        assert statuses(rest_of(connection)) == ([b"200"] if split else [b"200"] * 2)
