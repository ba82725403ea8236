"""Long answers: read while they are sent, whole or visibly cut short."""

import asyncio
from contextlib import closing

import numpy as np
import pytest
from served_store import in_process, make_store

from feature_store.client import frames
from feature_store.format.addressing import RowId
from feature_store.store import open_store
from teacher_service.serve import responses

ROWS = [RowId(1, 1, 1), RowId(0, 0, 0), RowId(0, 2, 0), RowId(0, 3, 0), RowId(1, 1, 1)]
SHARD = "taps/stage4/c/0/0/0/0"


@pytest.fixture(autouse=True)
def _two_rows_are_long(monkeypatch, store):
    monkeypatch.setattr(frames, "CHUNK_BYTES", 2 * store.source().row_bytes())


@pytest.fixture(scope="module")
def store(tmp_path_factory, tiny_swin):
    return open_store(make_store(tmp_path_factory.mktemp("rows"), tiny_swin))


def batch(ask, rows=ROWS, **more):
    return ask("/v1/rows:batch", "POST", json_body={"rows": rows, **more})


def arrays_of(store, rows=ROWS):
    memory = store.source().buffers(len(rows))
    store.source().fill(np.array(rows), memory)
    return memory


@pytest.mark.parametrize("tap_codec", ["f16", "int8", "int4+zstd"])
@pytest.mark.parametrize("cached", [True, False])
def test_long_answer_is_byte_for_byte_the_one_read_whole(serve, tmp_path, tiny_swin, monkeypatch, tap_codec, cached):
    store = open_store(make_store(tmp_path, tiny_swin, tap_codec=tap_codec))
    ask = serve(store.path)
    if not cached:
        monkeypatch.setattr("feature_store.read.page_cache.PageCacheReader.take", lambda *_: False)
    long = batch(ask, decode=False)
    monkeypatch.setattr(frames, "CHUNK_BYTES", 1 << 20)
    whole = batch(ask, decode=False)
    assert long.headers["content-length"] == str(len(long.body))
    assert long.body == whole.body
    for name, array in arrays_of(store).items():
        assert long.frame()[0][name].tobytes() == array.tobytes()
    assert ask.memory_comes_back()


def test_rest_is_read_in_threads_when_the_machine_has_only_some_of_it_in_memory(serve, store, monkeypatch):
    from feature_store.read.page_cache import PageCacheReader

    take, taken = PageCacheReader.take, []

    def some(rows, run, *memory):
        taken.append(run)
        return len(taken) < 4 and take(rows, run, *memory)

    monkeypatch.setattr(PageCacheReader, "take", some)
    ask = serve(store.path)
    arrays, _ = batch(ask).frame()
    assert len(taken) > 5  # three runs, two tries of the fourth, and those of the regular read
    for name, array in arrays_of(store).items():
        assert arrays[name].tobytes() == array.tobytes()


def test_unknown_rows_of_a_long_batch_are_refused_before_the_answer_begins(serve, store):
    ask = serve(store.path)
    assert batch(ask, [*ROWS, RowId(0, 1, 0)]).problem == "quarantined"
    assert batch(ask, [*ROWS, RowId(2, 0, 0)]).problem == "uncommitted"
    assert batch(ask, [*ROWS, RowId(9, 0, 0)]).problem == "uncommitted"
    assert ask.memory_comes_back()


def test_damaged_row_cuts_a_long_answer_short_and_one_with_verify_says_why(serve, tmp_path, tiny_swin, caplog):
    path = make_store(tmp_path, tiny_swin)
    ask, shard = serve(path), path / SHARD
    sound = shard.read_bytes()
    shard.write_bytes(bytes([sound[0] ^ 1, *sound[1:]]))
    cut = batch(ask)
    assert cut.status == 200
    assert len(cut.body) < int(cut.headers["content-length"])
    assert "cut short" in caplog.text
    assert batch(ask).status == 200  # nothing is remembered from request to request
    assert batch(ask, verify=True).problem == "corrupt-store"
    assert ask("/v1/units/0/views/0?verify=true").problem == "corrupt-store"
    assert ask("/v1/rows/u0-000?verify=true").problem == "corrupt-store"
    assert ask.memory_comes_back()

    shard.write_bytes(sound)
    for verify in (False, True):
        assert batch(ask, verify=verify).frame()[0]["rows"].tolist() == [list(row) for row in ROWS]


def test_former_field_is_refused_by_a_problem_that_names_the_new_one(serve, store):
    refused = batch(serve(store.path), check=False)
    assert refused.problem == "invalid-request"
    assert "send verify" in refused.json()["detail"]


def test_client_is_told_of_the_damage_when_its_long_answer_was_cut_short(tmp_path, tiny_swin):
    from app_transport import AppTransport

    from feature_store import connect
    from feature_store.errors import CorruptStoreError

    path = make_store(tmp_path, tiny_swin)
    with closing(in_process(path)) as ask:
        client = connect("http://127.0.0.1", transport=AppTransport(ask.app))
        shard = path / SHARD
        shard.write_bytes(bytes([shard.read_bytes()[0] ^ 1, *shard.read_bytes()[1:]]))
        with pytest.raises(CorruptStoreError, match="stage4"):
            client.source().read(ROWS)
        assert client.service.transport.asked[-2:] == [
            ("POST", "/v1/rows:batch", 200), ("POST", "/v1/rows:batch", 500)
        ]  # fmt: skip


def test_reading_ends_when_the_reader_is_gone():
    read, closed = [], []

    async def pieces():
        for number in range(1000):
            read.append(number)
            yield memoryview(b"xy")
            await asyncio.sleep(0)

    async def run():
        async def receive():
            await asyncio.sleep(0)
            return {"type": "http.disconnect"}

        async def send(message):
            pass

        response = responses.StreamedResponse(pieces(), 2000, close=lambda: closed.append(True))
        await response({"type": "http", "method": "GET"}, receive, send)

    asyncio.run(run())
    assert 0 < len(read) < 10
    assert closed == [True]


def test_nothing_is_closed_before_a_reader_in_a_thread_has_ended_when_sending_fails():
    import threading

    begun, go_on, events = threading.Event(), threading.Event(), []

    def slow() -> memoryview:
        begun.set()
        go_on.wait(5)
        events.append("read")
        return memoryview(b"b")

    async def send(message):
        if message.get("body"):
            await asyncio.to_thread(begun.wait, 5)
            asyncio.get_running_loop().call_later(0.05, go_on.set)
            raise OSError("gone")

    async def receive():
        await asyncio.Event().wait()

    response = responses.StreamedResponse(
        responses.read_ahead([lambda: memoryview(b"a"), slow]), 2, close=lambda: events.append("closed")
    )
    asyncio.run(response({"type": "http", "method": "GET"}, receive, send))
    assert events == ["read", "closed"]


def test_memory_of_a_long_answer_is_bounded_by_its_pieces(serve, store, monkeypatch):
    from teacher_service.serve.config import Limits

    row = store.source().row_bytes()
    most = 40 * row
    ask = serve(store.path, limits=Limits(max_response_bytes=most, max_bytes_in_flight=most))
    monkeypatch.setattr(ask.service.opened.source, "stride_bytes", row)
    taken = []
    reserve = ask.service.memory.reserve
    monkeypatch.setattr(ask.service.memory, "reserve", lambda nbytes: taken.append(nbytes) or reserve(nbytes))
    rows = [RowId(0, 0, 0)] * 40
    assert np.array_equal(batch(ask, rows).frame()[0]["rows"], np.array(rows))
    assert taken == [3 * row]
