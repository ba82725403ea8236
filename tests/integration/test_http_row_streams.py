"""Long responses over real sockets, on both event loops uvicorn may run on."""

import json
import logging
import socket
import ssl
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from served_store import Answer, make_store, make_wide_store
from servers import UvicornThread, make_certificate

from feature_store import connect
from feature_store.client import frames
from feature_store.errors import CorruptStoreError
from feature_store.format.addressing import RowId
from feature_store.read.page_cache import PageCacheReader
from feature_store.store import open_store
from teacher_service.serve.app import create_app
from teacher_service.serve.config import Limits, ServeConfig
from teacher_service.serve.middleware.access_log import LOGGER
from teacher_service.serve.protocol import serving_options
from teacher_service.serve.service import Service

ROWS = [RowId(0, 3, 1), RowId(0, 0, 0), RowId(0, 2, 0), RowId(0, 3, 0)] * 60  # 12 MB: more than the kernel takes
SHARD = "taps/stage4/c/0/0/0/0"


class Serving(UvicornThread):
    """A store's service."""

    def __init__(self, path, loop: str = "asyncio", **options) -> None:
        self.path = path
        self.service = Service(ServeConfig(store=str(path)))
        self.service.load()
        super().__init__(create_app(self.service), loop=loop, **serving_options(Limits()), **options)

    def idle(self) -> bool:
        """Whether no answer takes memory any more, soon."""
        return within(20, lambda: self.service.memory.used == 0)


def within(seconds: float, condition) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


@pytest.fixture(scope="module")
def path(tmp_path_factory, tiny_swin):
    folder = tmp_path_factory.mktemp("rows")
    return make_wide_store(folder, make_store(folder, tiny_swin))


@pytest.fixture(params=["asyncio", "uvloop"])
def serving(path, request):
    found = Serving(path, request.param)
    yield found
    found.close()


def request_for(rows=ROWS, *, verify: bool = False) -> bytes:
    body = json.dumps({"rows": rows, "decode": False, "verify": verify}).encode()
    head = b"POST /v1/rows:batch HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


def answer_on(connection: socket.socket) -> Answer:
    """The next answer; nothing that follows it is taken."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += connection.recv(1)
    status, *lines = head.decode("ascii").splitlines()
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
    body = bytearray()
    while len(body) < int(headers["content-length"]):
        body += connection.recv(int(headers["content-length"]) - len(body))
    return Answer(int(status.split()[1]), headers, bytes(body))


def whole_answer(serving: Serving) -> bytes:
    """One that is read as a whole; the store's files are open after it."""
    with serving.raw() as connection:
        connection.sendall(request_for(verify=True))
        return answer_on(connection).body


def open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_streamed_answer_has_the_bytes_of_the_one_read_whole(serving):
    whole = whole_answer(serving)
    with serving.raw() as connection:
        for _ in range(2):  # the connection is kept
            connection.sendall(request_for())
            assert answer_on(connection).body == whole
    assert serving.idle()


def test_slow_reader_gets_all_and_keeps_nobody_waiting(serving):
    whole, before = whole_answer(serving), open_descriptors()
    with serving.raw(4096) as slow:
        slow.sendall(request_for() * 2)  # the second one before the first is answered
        with serving.raw() as other:
            other.sendall(request_for(ROWS[:3]))
            assert answer_on(other).status == 200
        assert [answer_on(slow).body == whole for _ in range(2)] == [True, True]
    assert serving.idle()
    assert within(20, lambda: open_descriptors() <= before)


def test_reader_that_leaves_in_the_middle_costs_nothing_that_stays(serving):
    assert whole_answer(serving)
    before = open_descriptors()
    for _ in range(5):
        with serving.raw(4096) as leaver:
            leaver.sendall(request_for())
            assert leaver.recv(1) == b"H"
    assert serving.idle()
    assert within(20, lambda: not serving.server.server_state.tasks)
    assert within(20, lambda: open_descriptors() <= before)


def test_source_reads_the_rows_of_the_store(serving):
    batch, want = connect(serving.url).source().read(ROWS), open_store(serving.path).source().read(ROWS)
    assert np.array_equal(batch.taps["stage4"], want.taps["stage4"])


def test_source_names_the_damage_that_cut_its_answer_short(tmp_path, tiny_swin):
    serving = Serving(make_wide_store(tmp_path, make_store(tmp_path, tiny_swin)))
    try:
        source = connect(serving.url).source()
        shard = serving.path / SHARD
        sound = shard.read_bytes()
        shard.write_bytes(bytes([sound[0] ^ 1, *sound[1:]]))
        with pytest.raises(CorruptStoreError, match="stage4"):
            source.read(ROWS)
        shard.write_bytes(sound)
        assert len(source.read(ROWS).rows) == len(ROWS)
    finally:
        serving.close()


def test_answers_keep_apart_when_many_ask_at_once_and_some_leave(serving, monkeypatch):
    """Whether rows come from the page cache or from reading ahead."""
    local = open_store(serving.path).source()
    expected = {row: local.read([row]).taps["stage4"][0].tobytes() for row in set(ROWS)}
    chance = np.random.default_rng(0)
    take = PageCacheReader.take
    monkeypatch.setattr(PageCacheReader, "take", lambda *asked: chance.random() < 0.9 and take(*asked))

    def ask(seed: int) -> int:
        rng, answered = np.random.default_rng(seed), 0
        for _ in range(8):
            rows = [ROWS[at] for at in rng.integers(0, len(ROWS), 60)]
            with serving.raw() as connection:
                connection.sendall(request_for(rows, verify=bool(rng.integers(2))))
                if rng.random() < 0.3:
                    assert connection.recv(1 << 16)
                    continue
                arrays, _ = frames.decode(answer_on(connection).body)
            assert [row.tobytes() for row in arrays["stage4"]] == [expected[row] for row in rows]
            answered += 1
        return answered

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(ask, range(8))) > 20
    assert serving.idle()


def test_encrypted_answer_has_the_bytes_of_the_plain_one(path, tmp_path, serving):
    certificate, key = make_certificate(tmp_path)
    encrypted = Serving(path, ssl_certfile=certificate, ssl_keyfile=key)
    try:
        context = ssl.create_default_context(cafile=certificate)
        with encrypted.raw() as plain, context.wrap_socket(plain, server_hostname="127.0.0.1") as connection:
            connection.sendall(request_for())
            assert answer_on(connection).body == whole_answer(serving)
    finally:
        encrypted.close()


def test_access_log_counts_the_bytes_of_a_long_answer(serving, caplog):
    logging.getLogger(LOGGER).propagate = True
    with caplog.at_level(logging.INFO, LOGGER), serving.raw() as connection:
        connection.sendall(request_for())
        answer = answer_on(connection)
        assert within(20, lambda: caplog.records)
    assert json.loads(caplog.messages[-1])["bytes"] == len(answer.body)
    assert json.loads(caplog.messages[-1])["complete"]
