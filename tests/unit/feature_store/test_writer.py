"""Writing a unit: several objects in flight, within bounds, and nothing committed after a failure."""

import dataclasses
import threading
from collections import ChainMap, UserDict
from types import MappingProxyType

import numpy as np
import pytest
from tiny_store import BLOCKS, tiny_manifest, tiny_store, unit_data

from feature_store import Store, open_store
from feature_store.backends.local import LocalObjects
from feature_store.errors import InputError
from feature_store.format.codecs.registry import bound_codecs
from feature_store.write import unit as writer


def contents(store):
    return {path: store.objects.get(path).tobytes() for path in store.objects.list()}


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_write_gives_the_same_bytes_with_any_number_of_threads(tmp_path, threads, monkeypatch):
    expected = contents(tiny_store(tmp_path / "a", quarantined={2: "broken"}))
    monkeypatch.setattr(writer, "THREADS", threads)
    assert contents(tiny_store(tmp_path / "b", quarantined={2: "broken"})) == expected


def test_write_gives_the_same_bytes_when_rows_are_encoded_one_by_one(tmp_path, monkeypatch):
    expected = contents(tiny_store(tmp_path / "a", quarantined={1: "broken"}))
    monkeypatch.setattr(writer, "ENCODE_BYTES", 1)
    assert contents(tiny_store(tmp_path / "b", quarantined={1: "broken"})) == expected


def test_write_puts_several_objects_at_once_but_no_more_than_memory_allows(tmp_path, monkeypatch):
    """Every put waits for as many others as may be in flight."""
    for budget, together in ((1, 1), (1 << 30, 4)):
        monkeypatch.setattr(writer, "THREADS", 4)
        monkeypatch.setattr(writer, "WRITE_BYTES", budget)
        store = tiny_store(tmp_path / f"s{together}", units=())
        running, most, lock, put = 0, 0, threading.Lock(), LocalObjects.put
        barrier = threading.Barrier(together)

        def counted(self, path, payload, *, new=False, put=put, lock=lock, barrier=barrier):
            nonlocal running, most
            with lock:
                running += 1
                most = max(most, running)
            if path.startswith("taps/stage4/") or path.startswith("logits/c"):
                barrier.wait(20)
            put(self, path, payload, new=new)
            with lock:
                running -= 1

        monkeypatch.setattr(LocalObjects, "put", counted)
        store.write_unit(0, 0, unit_data(store.manifest, 0))
        monkeypatch.setattr(LocalObjects, "put", put)
        assert most == together


@pytest.mark.parametrize("array", ["taps/stage4/", "taps/stage4.crc32c/", "logits/", "label/", "view/crop/"])
def test_write_commits_nothing_and_can_be_repeated_when_any_object_fails(tmp_path, monkeypatch, array):
    store, put = tiny_store(tmp_path / "s", units=(1,)), LocalObjects.put

    def failing(self, path, payload, *, new=False):
        if path.startswith(array):
            raise OSError(28, "No space left on device")
        put(self, path, payload, new=new)

    monkeypatch.setattr(LocalObjects, "put", failing)
    with pytest.raises(OSError, match="No space left"):
        store.write_unit(0, 0, unit_data(store.manifest, 0))
    assert open_store(store.path).committed.units == [1]
    monkeypatch.setattr(LocalObjects, "put", put)
    again = open_store(store.path)
    again.write_unit(0, 0, unit_data(store.manifest, 0))
    assert contents(again) == contents(tiny_store(tmp_path / "t", units=(1, 0)))


def test_write_takes_rows_that_are_encoded_already(tmp_path):
    from feature_store.format.codecs.registry import bound_codecs, calibrated

    manifest = tiny_manifest()
    manifest = dataclasses.replace(
        manifest, taps={name: dataclasses.replace(tap, codec="int8") for name, tap in manifest.taps.items()}
    )
    data = unit_data(manifest, 0, quarantined={3: "broken"})
    manifest = calibrated(manifest, {"stage4": data.taps["stage4"][0]})
    value = bound_codecs(manifest)["taps/stage4"]
    encoded = [value.encode(view) for view in data.taps["stage4"]]
    parts = {suffix: np.stack([view[suffix] for view in encoded]) for suffix in encoded[0]}
    one, two = (tiny_store(tmp_path / name, manifest, units=()) for name in "ab")
    one.write_unit(0, 0, data)
    two.write_unit(0, 0, dataclasses.replace(data, taps={"stage4": parts}))
    assert contents(one) == contents(two)


def test_write_gives_the_same_bytes_when_encoded_values_are_any_mapping(tmp_path):
    """A mapping that is no dict was taken for raw values, and encoded twice."""
    manifest = tiny_manifest(codec="int8-channel")
    manifest = dataclasses.replace(manifest, logits_codec="f16")
    data = unit_data(manifest, 0)
    codecs = bound_codecs(manifest)
    written = {}
    for kind in (dict, MappingProxyType, UserDict, ChainMap):
        parts = {path: kind(_encoded(codecs[path], values)) for path, values in _values(data).items()}
        encoded = dataclasses.replace(data, taps={"stage4": parts["taps/stage4"]}, logits=parts["logits"])
        store = Store.create(tmp_path / kind.__name__, manifest, BLOCKS)
        store.write_unit(0, 0, encoded)
        written[kind] = contents(store)
    store = Store.create(tmp_path / "raw", manifest, BLOCKS)
    store.write_unit(0, 0, data)
    assert all(objects == contents(store) for objects in written.values())


def test_write_refuses_encoded_values_of_another_dtype(tmp_path):
    manifest = tiny_manifest()
    data = unit_data(manifest, 0)
    store = Store.create(tmp_path / "s", manifest, BLOCKS)
    wrong = dataclasses.replace(data, taps={"stage4": {"": data.taps["stage4"]}})
    with pytest.raises(InputError, match=r"taps.stage4\[''\] of unit 0 is float32, expected float16"):
        store.write_unit(0, 0, wrong)


def _values(data):
    return {"taps/stage4": data.taps["stage4"], "logits": data.logits}


def _encoded(codec, values):
    views, samples = values.shape[:2]
    flat = codec.encode(values.reshape(views * samples, *values.shape[2:]))
    return {suffix: part.reshape(views, samples, *part.shape[1:]) for suffix, part in flat.items()}
