"""A store refuses, by name, everything it cannot vouch for."""

import dataclasses
import json
import os
import pickle
import shutil
import signal

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_store import BLOCKS, SAMPLES, everything, tiny_manifest, tiny_store, unit_data, view_data

from feature_store import FeatureSource, RowId, Store, open_store
from feature_store.commits.record import write_commit
from feature_store.errors import (
    CommittedError,
    CorruptStoreError,
    InputError,
    MismatchError,
    QuarantinedError,
    UncommittedError,
)
from feature_store.format.manifest import TarInfo
from feature_store.tools.info import summarise


@pytest.fixture
def store(tmp_path):
    tiny_store(tmp_path / "store")
    return open_store(tmp_path / "store")


def all_rows(store):
    return [
        RowId(unit, i, view)
        for unit in store.committed.units
        for view in store.committed_views(unit)
        for i in range(SAMPLES[unit])
        if i not in store.quarantined(unit)
    ]


def test_source_is_a_feature_source(store):
    assert isinstance(store.source(), FeatureSource)


def test_read_gives_rows_in_the_order_asked_for_with_repeats(store):
    rows = [RowId(2, 3, 1), RowId(0, 0, 0), RowId(2, 3, 1), RowId(1, 2, 0)]
    batch = store.source().read(rows)
    expected = [unit_data(store.manifest, r.unit).features["stage4"][""][r.view, r.position] for r in rows]
    logits = [unit_data(store.manifest, r.unit).features["logits"][""][r.view, r.position] for r in rows]
    assert batch.rows.tolist() == [list(row) for row in rows]
    assert np.array_equal(batch.taps["stage4"], expected)
    assert np.array_equal(batch.logits, logits)


def test_iter_unit_gives_every_readable_row_once_in_position_order(tmp_path):
    store = tiny_store(tmp_path / "s", quarantined={0: "broken"})
    batches = [batch.rows.tolist() for batch in store.source().iter_unit(2, 1, batch_size=2)]
    assert batches == [[[2, 1, 1], [2, 2, 1]], [[2, 3, 1]]]
    rows = store.source().unit_rows(2, 1)
    assert (rows.dtype, rows.tolist()) == (np.int64, [[2, 1, 1], [2, 2, 1], [2, 3, 1]])


def test_source_survives_pickling_after_reading(store):
    source = store.source()
    first = source.read([RowId(0, 1, 0)])
    copy = pickle.loads(pickle.dumps(source))  # noqa: S301 - our own object
    assert np.array_equal(copy.read([RowId(0, 1, 0)]).taps["stage4"], first.taps["stage4"])


def test_keys_labels_params_and_crcs_come_back(store):
    data = unit_data(store.manifest, 1)
    assert store.keys(1) == data.keys
    assert np.array_equal(store.labels(1), data.labels)
    assert [store.view_params(1, view) for view in (0, 1)] == data.params
    assert np.array_equal(store.pixel_crcs(1, 1), data.pixel_crc[1])


def test_rows_finds_samples_by_key_across_units(store):
    rows = store.rows(["key/2-1", "key/0-4"], 1)
    assert (rows.dtype, rows.tolist()) == (np.int64, [[2, 1, 1], [0, 4, 1]])
    assert store.rows([], 1).shape == (0, 3)


def test_rows_compares_keys_when_hashes_collide(tmp_path, monkeypatch):
    monkeypatch.setattr("feature_store.read.key_index._hashes", lambda words: np.zeros(len(words), np.uint64))
    store = tiny_store(tmp_path / "s")
    assert store.rows(["key/1-2", "key/2-3"], 0).tolist() == [[1, 2, 0], [2, 3, 0]]
    with pytest.raises(InputError, match="no committed unit holds sample key 'key/9-9'"):
        store.rows(["key/9-9"], 0)


def test_read_refuses_when_row_is_not_committed(tmp_path):
    store = tiny_store(tmp_path / "s", units=(0,))
    with pytest.raises(UncommittedError, match=r"view 0 of unit 1 \(tar-1.tar\) was never committed"):
        store.source().read([RowId(0, 0, 0), RowId(1, 0, 0)])
    with pytest.raises(UncommittedError, match="unit 0 has 5 samples"):
        store.source().read([RowId(0, 5, 0)])
    with pytest.raises(InputError, match=r"unit 7 does not exist: the store has units 0..2"):
        store.source().read([RowId(7, 0, 0)])


def test_read_refuses_when_view_is_not_committed(tmp_path):
    store = tiny_store(tmp_path / "s", units=(0,), views=1)
    store.source().read([RowId(0, 0, 0)])
    with pytest.raises(UncommittedError, match=r"view 1 of unit 0 .* committed views of this unit: \[0\]"):
        store.source().read([RowId(0, 0, 1)])


def test_quarantined_names_each_sample_once_when_views_were_written_apart(tmp_path):
    manifest = tiny_manifest()
    store = Store.create(tmp_path / "s", manifest, BLOCKS)
    store.write_unit(0, 0, view_data(manifest, 0, range(1), quarantined={3: "no label"}))
    store.write_unit(0, 1, view_data(manifest, 0, range(1, 2), quarantined={3: "no label", 1: "cut short since"}))

    assert store.quarantined(0) == {1: "cut short since", 3: "no label"}  # neither can be trained on in every view
    assert [entry["position"] for entry in summarise(store)["quarantined"]] == [1, 3]


def test_read_refuses_when_sample_is_quarantined(tmp_path):
    store = tiny_store(tmp_path / "s", quarantined={2: "truncated JPEG"})
    with pytest.raises(QuarantinedError, match="truncated JPEG"):
        store.source().read([RowId(0, 2, 0)])
    assert store.view_params(0, 0)[2] is None


def test_read_refuses_when_tap_is_unknown(store):
    with pytest.raises(InputError, match="no tap 'stage2'; it has: stage4"):
        store.source(["stage2"])


def test_read_raises_when_a_committed_shard_is_missing(store):
    (store.path / "taps/stage4/c/1/0/0/0").unlink()
    with pytest.raises(CorruptStoreError, match=r"taps/stage4/c/1/0/0/0 is damaged: it is committed but missing"):
        store.source().read([RowId(0, 0, 1)])


def test_read_raises_when_a_shard_is_truncated(store):
    shard = store.path / "taps/stage4/c/0/0/0/0"
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(CorruptStoreError, match="its commit record says"):
        store.source().read([RowId(0, 0, 0)])


def test_read_raises_when_a_shard_shrinks_after_it_was_opened(store):
    source = store.source()
    source.read([RowId(0, 0, 0)])
    os.truncate(store.path / "taps/stage4/c/0/0/0/0", 10)
    with pytest.raises(CorruptStoreError, match="it ends at byte"):
        source.read([RowId(0, 3, 0)])


def test_read_raises_when_two_shards_are_swapped(tmp_path):
    """Same size, each valid on its own: only the row checksums beside them know."""
    store = tiny_store(tmp_path / "s")
    one, two = (store.path / f"taps/stage4/c/{view}/0/0/0" for view in (0, 1))
    swap = store.path / "swap"
    one.rename(swap), two.rename(one), swap.rename(two)
    with pytest.raises(CorruptStoreError, match="crc32c of position 3 does not match"):
        open_store(store.path).source().read([RowId(0, 3, 0)])


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_flipped_bit_is_refused_or_harmless_wherever_it_is(tmp_path, data):
    """Every committed object and record: a flip either raises or leaves all values as they were."""
    path = tmp_path / "store"
    if not path.exists():
        tiny_store(path)
    clean = everything(open_store(path))
    files = sorted(f for f in path.rglob("*") if f.is_file() and f.stat().st_size)
    files = [f for f in files if f.name != "zarr.json" or f.parent == path]
    file = data.draw(st.sampled_from(files))
    original = file.read_bytes()
    at, bit = data.draw(st.integers(0, len(original) - 1)), data.draw(st.integers(0, 7))
    file.write_bytes(original[:at] + bytes([original[at] ^ (1 << bit)]) + original[at + 1 :])
    try:
        assert everything(open_store(path)) == clean, file
    except (CorruptStoreError, InputError, MismatchError):
        pass
    finally:
        file.write_bytes(original)


def test_open_refuses_when_a_commit_record_comes_from_another_store(tmp_path):
    store, other = tiny_store(tmp_path / "a"), tiny_store(tmp_path / "b", tiny_manifest(seed=4))
    for name in ("commits", "taps"):
        shutil.rmtree(store.path / name)
        shutil.copytree(other.path / name, store.path / name)
    with pytest.raises(MismatchError, match="this record comes from another store"):
        open_store(store.path)


def test_open_refuses_when_two_records_vouch_for_one_view(store):
    record = dataclasses.replace(store.committed.records[0], last_view=0)
    write_commit(store.objects, record)
    with pytest.raises(CorruptStoreError, match="cover the same view"):
        open_store(store.path)


def test_open_refuses_when_path_is_no_store(tmp_path):
    with pytest.raises(InputError, match="is not a store"):
        open_store(tmp_path)
    (tmp_path / "zarr.json").write_text("{}")
    with pytest.raises(InputError, match="holds no manifest"):
        open_store(tmp_path)


def test_open_refuses_when_format_version_is_unknown(store):
    metadata = json.loads((store.path / "zarr.json").read_text())
    metadata["attributes"]["manifest"]["format_version"] = 99
    (store.path / "zarr.json").write_text(json.dumps(metadata))
    with pytest.raises(InputError, match="format_version 99, this build reads 1"):
        open_store(store.path)


def test_open_refuses_when_the_manifest_was_edited(store):
    metadata = json.loads((store.path / "zarr.json").read_text())
    metadata["attributes"]["manifest"]["teacher"]["mean"][0] = 0.4
    (store.path / "zarr.json").write_text(json.dumps(metadata))
    with pytest.raises(CorruptStoreError, match=r"manifest .* is damaged"):
        open_store(store.path)


def test_create_refuses_when_path_exists(store):
    with pytest.raises(InputError, match="already exists"):
        Store.create(store.path, store.manifest, {})


def test_write_refuses_when_shapes_differ_from_the_manifest(tmp_path):
    store = tiny_store(tmp_path / "s", units=())
    with pytest.raises(InputError, match="3 samples, the manifest says 5"):
        store.write_unit(0, 0, unit_data(store.manifest, 1))
    assert open_store(store.path).committed.records == []


def test_write_keeps_the_store_consistent_when_the_disk_is_full(tmp_path):
    """A real write error from the kernel: the file size limit of a child process."""
    store = tiny_store(tmp_path / "s", units=(0,))
    pid = os.fork()
    if pid == 0:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        try:
            store.write_unit(1, 0, unit_data(store.manifest, 1))
        except OSError:
            os._exit(3)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
    after = open_store(store.path)
    assert after.committed.units == [0]
    after.remove_orphans()
    assert everything(after) == everything(store)


def test_remove_orphans_deletes_only_what_no_record_vouches_for(tmp_path):
    store = tiny_store(tmp_path / "s", units=(0, 1))
    before = everything(store)
    (store.path / "commits/u00001-v0-1.json").unlink()
    (store.path / "taps/stage4/c/0/2/0").mkdir(parents=True)
    (store.path / "taps/stage4/c/0/2/0/0.123.partial").write_bytes(b"half")
    reopened = open_store(store.path)
    removed = reopened.remove_orphans()
    assert "taps/stage4/c/0/2/0/0.123.partial" in removed
    assert "taps/stage4/c/0/1/0/0" in removed
    assert not any(path.endswith("zarr.json") for path in removed)
    reopened.write_unit(1, 0, unit_data(store.manifest, 1))
    assert everything(open_store(store.path)) == before


def test_write_refuses_when_the_unit_is_committed_already(store):
    before = everything(store)
    with pytest.raises(CommittedError, match=r"unit 1 \(tar-1.tar\) is committed already"):
        store.write_unit(1, 0, unit_data(store.manifest, 2 - 1, quarantined={0: "another writer thinks so"}))
    assert everything(open_store(store.path)) == before


def test_rewriting_a_unit_gives_the_same_bytes_when_its_record_was_removed(tmp_path):
    one, two = tiny_store(tmp_path / "one"), tiny_store(tmp_path / "two", units=(2, 0, 1))
    (two.path / "commits/u00000-v0-1.json").unlink()
    two.write_unit(0, 0, unit_data(two.manifest, 0))
    contents = [{f.relative_to(s.path): f.read_bytes() for f in s.path.rglob("*") if f.is_file()} for s in (one, two)]
    assert contents[0] == contents[1]


def test_views_can_be_committed_in_two_records(tmp_path):
    whole = tiny_store(tmp_path / "whole")
    parts = tiny_store(tmp_path / "parts", units=())
    for unit in range(3):
        data = unit_data(parts.manifest, unit)
        for view in (0, 1):
            part = dataclasses.replace(
                data,
                params=data.params[view : view + 1],
                pixel_crc=data.pixel_crc[view : view + 1],
                features={name: {"": parts[""][view : view + 1]} for name, parts in data.features.items()},
            )
            parts.write_unit(unit, view, part)
    assert everything(open_store(parts.path)) == everything(whole)


def test_info_counts_what_commit_records_prove(tmp_path):
    store = tiny_store(tmp_path / "s", units=(0, 2), quarantined={1: "zero bytes"})
    info = summarise(store)
    assert (info["units"], info["committed_units"], info["committed_rows"]) == (3, 2, 2 * (4 + 3))
    on_disk = sum(
        f.stat().st_size
        for f in store.path.rglob("*")
        if f.is_file() and "/c/" in f.as_posix() and "teacher" not in f.parts
    )
    assert info["bytes"] == on_disk
    assert info["quarantined"][0] == {
        "unit": 0, "tar": "tar-0.tar", "position": 1, "key": "key/0-1", "reason": "zero bytes",
    }  # fmt: skip
    assert json.loads(json.dumps(info)) == info


@pytest.mark.parametrize("array", ["label", "view/crop", "taps/stage4", "logits"])
def test_proofs_tell_two_units_objects_apart(store, array):
    """A crc32c over bytes that end with their own crc32c would be the same for all of them."""
    tail = "/0" * (len(store.layout.arrays[array].row_shape))
    views = (0, 1) if store.layout.arrays[array].per_view else ()
    table = [f"{array}.crc32c"] if store.layout.arrays[array].sharded else []
    for name in table or [array]:
        tail = "" if table else tail
        paths = [f"{name}/c/{view}/0{tail}" for view in views] or [f"{name}/c/0{tail}", f"{name}/c/1{tail}"]
        records = store.committed.records
        proofs = [next(r.objects[path] for r in records if path in r.objects) for path in paths]
        assert proofs[0].crc32c != proofs[1].crc32c


@pytest.mark.parametrize("array", ["view/crop", "view/pixel_crc", "label", "key"])
def test_reading_refuses_when_two_whole_objects_are_swapped(tmp_path, array):
    """Each is valid on its own, of the same length: only the commit records know which is whose."""
    manifest = dataclasses.replace(tiny_manifest(), tars=tuple(TarInfo(f"{u}.tar", 5, "0" * 64) for u in range(2)))
    store = Store.create(tmp_path / "s", manifest, {})
    for unit in (0, 1):
        store.write_unit(unit, 0, view_data(manifest, unit, range(2), salt=unit))
    names = [store.layout.arrays[array].object_path(unit, 0 if "view" in array else None) for unit in (0, 1)]
    one, two = ((store.path / name).read_bytes() for name in names)
    if one == two:
        pytest.fail("the test needs two different objects")
    (store.path / names[0]).write_bytes(two)
    (store.path / names[1]).write_bytes(one)
    with pytest.raises(CorruptStoreError, match="its crc32c is not the one in"):
        everything(open_store(store.path))


def test_reading_refuses_when_a_shard_is_swapped_together_with_its_table(store):
    for name in ("taps/stage4/c/{}/0/0/0", "taps/stage4.crc32c/c/{}/0"):
        files = [store.path / name.format(view) for view in (0, 1)]
        contents = [file.read_bytes() for file in files]
        for file, content in zip(files, reversed(contents), strict=True):
            file.write_bytes(content)
    with pytest.raises(CorruptStoreError, match=r"stage4.crc32c/c/0/0 is damaged: its crc32c is not the one in"):
        open_store(store.path).source().read([RowId(0, 0, 0)])
