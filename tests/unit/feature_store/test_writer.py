"""Writing a unit: several objects in flight, within bounds, and nothing committed after a failure."""

import dataclasses
import threading
from collections import ChainMap, UserDict
from types import MappingProxyType

import numpy as np
import pytest
from tiny_store import BLOCKS, encoded, tiny_manifest, tiny_store, unit_data

from feature_store import Store, open_store
from feature_store.backends.local import LocalObjects
from feature_store.errors import InputError
from feature_store.format.codecs.bound import calibrated
from feature_store.write import unit as writer


def contents(store):
    return {path: store.objects.get(path).tobytes() for path in store.objects.list()}


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_write_gives_the_same_bytes_with_any_number_of_threads(tmp_path, threads, monkeypatch):
    expected = contents(tiny_store(tmp_path / "a", quarantined={2: "broken"}))
    monkeypatch.setattr(writer, "THREADS", threads)
    assert contents(tiny_store(tmp_path / "b", quarantined={2: "broken"})) == expected


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


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"stage4": {"": np.zeros((2, 5, 3, 6), np.int8)}},
         r"taps/stage4 of unit 0 has shape \(2, 5, 3, 6\), expected \(2, 5, 4, 6\)"),
        ({"stage4": {"": np.zeros((10, 4, 6), np.int8)}}, r"taps/stage4 of unit 0 has shape \(10, 4, 6\), expected"),
        ({"stage4": {"scale": np.zeros((1, 5, 4), np.float16)}}, r"taps/stage4.scale of unit 0 has shape \(1, 5, 4\)"),
        ({"stage4": {"": np.zeros((2, 5, 4, 6), np.float32)}}, "taps/stage4 of unit 0 is float32, expected int8"),
        ({"stage4": {"scale": np.zeros((2, 5, 4), np.float64)}}, "taps/stage4.scale of unit 0 is float64, expected"),
        ({"logits": {"": np.zeros((2, 5, 4), np.float16)}}, r"logits of unit 0 has shape \(2, 5, 4\), expected"),
    ],
)  # fmt: skip
def test_write_refuses_features_by_array_when_shape_or_dtype_is_wrong(tmp_path, features, message):
    store, data = int8_store(tmp_path / "s")
    changed = {name: {**parts, **features.get(name, {})} for name, parts in data.features.items()}
    with pytest.raises(InputError, match=message):
        store.write_unit(0, 0, dataclasses.replace(data, features=changed))
    assert_nothing_written(store)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": np.zeros(4, np.int64)}, r"labels of unit 0 has shape \(4,\), expected \(5,\)"),
        ({"pixel_crc": np.zeros((1, 5), np.uint32)}, r"pixel_crc of unit 0 has shape \(1, 5\), expected \(2, 5\)"),
        ({"params": []}, "views 0..-1 do not fit the store's 2"),
        ({"params": [[None] * 5] * 3}, "views 0..2 do not fit the store's 2"),
    ],
)
def test_write_refuses_labels_checksums_and_views_that_do_not_fit(tmp_path, changes, message):
    store, data = int8_store(tmp_path / "s")
    with pytest.raises(InputError, match=message):
        store.write_unit(0, 0, dataclasses.replace(data, **changes))
    assert_nothing_written(store)


@pytest.mark.parametrize(("name", "suffix", "path"), [
    ("stage4", "", "taps/stage4"), ("stage4", "scale", "taps/stage4.scale"), ("logits", "", "logits"),
])  # fmt: skip
def test_write_refuses_features_by_array_when_a_part_is_missing(tmp_path, name, suffix, path):
    store, data = int8_store(tmp_path / "s")
    fewer = {key: part for key, part in data.features[name].items() if key != suffix}
    with pytest.raises(InputError, match=rf"{path} of unit 0 has shape None, expected \(2, 5, "):
        store.write_unit(0, 0, dataclasses.replace(data, features={**data.features, name: fewer}))
    assert_nothing_written(store)


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (lambda features: {"stage4": features["stage4"]}, "features stage4,"),
        (lambda features: {"logits": features["logits"]}, "features logits,"),
        (lambda features: {**features, "stage3": features["stage4"]}, "features stage4, logits, stage3,"),
        (lambda features: {}, "features none,"),
    ],
)
def test_write_refuses_features_by_name_when_one_is_missing_or_unknown(tmp_path, change, got):
    store, data = int8_store(tmp_path / "s")
    with pytest.raises(InputError, match=f"unit 0 has {got} the store holds stage4, logits; give exactly those"):
        store.write_unit(0, 0, dataclasses.replace(data, features=change(data.features)))
    assert_nothing_written(store)


@pytest.mark.parametrize("kind", [MappingProxyType, UserDict, ChainMap])
def test_write_gives_the_same_bytes_when_features_are_any_mapping(tmp_path, kind):
    manifest = tiny_manifest(codec="int8-channel")
    manifest = dataclasses.replace(manifest, logits_codec="f16")
    data = unit_data(manifest, 0)
    mappings = kind({name: kind(parts) for name, parts in data.features.items()})
    one, two = (Store.create(tmp_path / name, manifest, BLOCKS) for name in "ab")
    one.write_unit(0, 0, data)
    two.write_unit(0, 0, dataclasses.replace(data, features=mappings))
    assert contents(one) == contents(two)


def test_write_ignores_what_quarantined_rows_hold(tmp_path):
    stores = [Store.create(tmp_path / name, tiny_manifest(), BLOCKS) for name in "ab"]
    for store, value in zip(stores, (0, np.nan), strict=True):
        data = unit_data(store.manifest, 0, quarantined={3: "broken"})
        for parts in data.features.values():
            parts[""][:, 3] = value
        store.write_unit(0, 0, data)
    assert contents(stores[0]) == contents(stores[1])


def test_write_takes_features_that_are_not_contiguous(tmp_path):
    stores = [Store.create(tmp_path / name, tiny_manifest(), BLOCKS) for name in "ab"]
    data = unit_data(stores[0].manifest, 0)
    turned = {name: {"": np.asfortranarray(parts[""])} for name, parts in data.features.items()}
    assert not any(parts[""].flags.c_contiguous for parts in turned.values())
    stores[0].write_unit(0, 0, data)
    stores[1].write_unit(0, 0, dataclasses.replace(data, features=turned))
    assert contents(stores[0]) == contents(stores[1])


def int8_store(path):
    """An empty store with an int8 tap, and data that fits unit 0."""
    raw = unit_data(tiny_manifest(codec="f32"), 0)
    values = {name: parts[""] for name, parts in raw.features.items()}
    manifest = tiny_manifest()
    taps = {"stage4": dataclasses.replace(manifest.taps["stage4"], codec="int8")}
    manifest = calibrated(dataclasses.replace(manifest, taps=taps), {"stage4": values["stage4"][0]})
    return Store.create(path, manifest, BLOCKS), dataclasses.replace(raw, features=encoded(manifest, **values))


def assert_nothing_written(store):
    assert not any(store.layout.address(path) for path in store.objects.list())
    assert open_store(store.path).committed.records == []
