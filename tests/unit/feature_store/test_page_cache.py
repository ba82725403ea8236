"""Rows from the page cache: right, or not at all."""

from dataclasses import replace

import numpy as np
import pytest
from tiny_store import tiny_manifest, tiny_store

from feature_store import open_store
from feature_store.backends.local import IOV_MAX
from feature_store.read import page_cache

ROWS = np.array([(unit, i, view) for unit, n in enumerate((5, 3, 4)) for view in (0, 1) for i in range(n)])


@pytest.fixture
def store(tmp_path):
    tiny_store(tmp_path / "store")
    return open_store(tmp_path / "store")


@pytest.fixture
def rows():
    return np.concatenate([ROWS[np.random.default_rng(0).integers(0, len(ROWS), 40)], ROWS])


def would_wait(*_):
    raise BlockingIOError


def opened(source):
    """It has read everything once."""
    source.fill(ROWS, source.buffers(len(ROWS)))
    return source


def taken(source, rows, start, stop):
    readers = source.page_cache(source.locate(rows[start:stop]))
    memory = {name: np.zeros_like(array) for name, array in source.buffers(stop - start).items()}
    return memory, {name: take_all(readers[name], array) for name, array in memory.items()}


def take_all(reader, array):
    """Whether all runs could be taken into an array [n, ...]."""
    flat = array.reshape(len(array), -1).view(np.uint8)
    return all(reader.take(run, memoryview(flat[reader.rows(run)]).cast("B")) for run in range(len(reader)))


@pytest.mark.parametrize(("start", "stop"), [(0, 64), (0, 1), (7, 23), (40, 64), (63, 64)])
def test_rows_are_those_the_store_reads_when_some_lie_side_by_side(store, rows, start, stop):
    memory, done = taken(opened(store.source()), rows, start, stop)
    expected = store.source().buffers(stop - start)
    store.source().fill(rows[start:stop], expected)
    assert all(done.values())
    for name, array in expected.items():
        assert memory[name].tobytes() == array.tobytes()


def test_neighbours_are_taken_when_they_are_more_than_one_system_call_takes(tmp_path):
    """Logits of six bytes: far fewer fill a system call's buffers than its bytes."""
    samples = IOV_MAX + 7
    manifest = tiny_manifest(policy="rrc_flip", views=1)
    manifest = replace(manifest, tars=(replace(manifest.tars[0], samples=samples),), capacity=samples)
    source = tiny_store(tmp_path / "s", manifest, units=(0,)).source()
    rows = np.array([(0, i, 0) for i in range(samples)])
    source.fill(rows, source.buffers(samples))
    _, done = taken(source, rows, 0, samples)
    assert all(done.values())


def test_neighbours_are_one_run(store):
    source = opened(store.source(taps=["stage4"]))
    rows = ROWS[[0, 1, 2, 3, 4, 1, 5, 10, 11]]
    spec, located = store.layout.arrays["taps/stage4"], source.locate(rows)["stage4"]
    runs = page_cache.PageCacheReader(store.objects, spec, located)
    assert [runs.rows(at) for at in range(len(runs))] == [slice(0, 5), slice(5, 6), slice(6, 7), slice(7, 9)]
    runs = page_cache.PageCacheReader(store.objects, spec, located.part(1, 5), most=2 * (spec.row_bytes + 4))
    assert [runs.rows(at) for at in range(len(runs))] == [slice(0, 2), slice(2, 4)]


def test_nothing_is_taken_when_one_row_is_damaged(store):
    source = opened(store.source())
    path = store.path / "taps/stage4/c/0/0/0/0"
    raw = bytearray(path.read_bytes())
    raw[0] ^= 1
    path.write_bytes(raw)
    _, done = taken(source, ROWS, 0, 5)
    assert done == {"stage4": False, "logits": True}


def test_nothing_is_taken_when_the_shard_is_cut(store):
    source = opened(store.source())
    reader = source.page_cache(source.locate(ROWS[:5]))["stage4"]
    path = store.path / "taps/stage4/c/0/0/0/0"
    memory = source.buffers(5)["stage4"]
    assert take_all(reader, memory)
    path.write_bytes(path.read_bytes()[:60])
    assert not take_all(reader, memory)


def test_nothing_is_taken_when_reading_would_wait(store, monkeypatch):
    source = opened(store.source())
    monkeypatch.setattr(page_cache.os, "preadv", would_wait)
    assert not any(taken(source, ROWS, 0, 5)[1].values())


def test_nothing_is_taken_when_no_file_is_open(store):
    source = store.source()
    located = source.locate(ROWS)
    for path in set(located["stage4"].paths):
        source.objects.forget(path)
    reader = source.page_cache(located)["stage4"]
    assert not take_all(reader, source.buffers(len(ROWS))["stage4"])
