"""Rows from the machine's memory: right, or not at all."""

import os

import numpy as np
import pytest
from tiny_store import tiny_store

from feature_store import RowId, open_store
from feature_store.objects.local import LocalObjects

ROWS = [RowId(unit, i, view) for unit, n in enumerate((5, 3, 4)) for view in (0, 1) for i in range(n)]


@pytest.fixture
def store(tmp_path):
    tiny_store(tmp_path / "store")
    return open_store(tmp_path / "store")


@pytest.fixture
def rows():
    return [ROWS[index] for index in np.random.default_rng(0).integers(0, len(ROWS), 40)] + ROWS


def taken(store, rows, start, stop):
    source = store.source()
    readers = source.cached_rows(source.locate(rows))
    memory = {
        name: np.zeros((stop - start, *array.shape[1:]), array.dtype) for name, array in source.buffers(0).items()
    }
    done = {name: readers[name].take(start, stop, array.view(np.uint8)) for name, array in memory.items()}
    return memory, done


@pytest.mark.parametrize(("start", "stop"), [(0, 64), (0, 1), (7, 23), (40, 64), (63, 64)])
def test_rows_are_those_the_store_reads_when_some_lie_side_by_side(store, rows, start, stop):
    memory, done = taken(store, rows, start, stop)
    expected = store.source().buffers(stop - start)
    store.source().fill(rows[start:stop], expected)
    assert all(done.values())
    for name, array in expected.items():
        assert memory[name].tobytes() == array.tobytes()


def test_neighbours_are_read_together(store, monkeypatch):
    asked = []
    read_into = LocalObjects.read_into

    def counting(objects, path, offset, parts, *, wait=True):
        asked.append(len(parts))
        return read_into(objects, path, offset, parts, wait=wait)

    monkeypatch.setattr(LocalObjects, "read_into", counting)
    source = store.source(taps=["stage4"])
    rows = ROWS[:5]
    reader = source.cached_rows(source.locate(rows))["stage4"]
    assert reader.take(0, 5, source.buffers(5)["stage4"].view(np.uint8))
    assert asked == [9]  # five rows and the four checksums between them


def test_nothing_is_taken_when_one_row_is_damaged(store):
    path = store.path / "taps/stage4/c/0/0/0/0"
    raw = bytearray(path.read_bytes())
    raw[0] ^= 1
    path.write_bytes(raw)
    _, done = taken(store, ROWS, 0, 5)
    assert done == {"stage4": False, "logits": True}


def test_nothing_is_taken_when_the_shard_is_gone_or_cut(store):
    source = store.source()
    located = source.locate(ROWS)
    path = store.path / "taps/stage4/c/0/0/0/0"
    memory = np.zeros((5, 48), np.uint8)
    path.write_bytes(path.read_bytes()[:60])
    assert not source.cached_rows(located)["stage4"].take(0, 5, memory)
    path.unlink()
    source.objects.forget("taps/stage4/c/0/0/0/0")
    assert not source.cached_rows(located)["stage4"].take(0, 5, memory)


def test_nothing_is_taken_when_reading_would_wait(store, monkeypatch):
    monkeypatch.setattr("feature_store.objects.local._read_cached", lambda *_: False)
    _, done = taken(store, ROWS, 0, 5)
    assert not any(done.values())


def test_files_are_where_the_rows_are(store):
    source = store.source()
    want = source.buffers(len(ROWS))
    source.fill(ROWS, want)
    for name, reader in source.cached_rows(source.locate(ROWS)).items():
        spans = reader.files(0, len(ROWS))
        got = [os.pread(span.file.descriptor, span.nbytes, span.offset) for span in spans]
        assert b"".join(got) == want[name].tobytes()
        assert reader.files(1, 3) == spans[1:3]


def test_no_files_are_named_when_rows_are_gone_cut_or_not_in_memory(store, monkeypatch):
    source = store.source()
    reader = source.cached_rows(source.locate(ROWS))["stage4"]
    path = store.path / "taps/stage4/c/0/0/0/0"
    whole = path.read_bytes()
    path.write_bytes(whole[:60])
    assert reader.files(0, len(ROWS)) is None
    path.write_bytes(whole)
    assert reader.files(0, len(ROWS)) is not None
    monkeypatch.setattr("feature_store.objects.local._read_cached", lambda *_: False)
    assert reader.files(0, len(ROWS)) is None
    path.unlink()
    source.objects.forget("taps/stage4/c/0/0/0/0")
    assert reader.files(0, len(ROWS)) is None
