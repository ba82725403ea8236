"""verify finds what is wrong, names it, and finds nothing in a sound store."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
from tiny_store import tiny_manifest, tiny_store, unit_data

from feature_store import open_store
from feature_store.commits.locks import exclusive, lock_name
from feature_store.commits.record import ObjectChecksum, decode_record, encode_record
from feature_store.format.checksums import crc32c, object_checksum
from feature_store.read.objects import ObjectReader
from feature_store.tools.cli import main
from feature_store.tools.info import summarise
from feature_store.tools.verify import verify

SHARD = "taps/stage4/c/1/0/0/0"
RECORD = "commits/u00000-v0-1.json"


@pytest.fixture
def path(tmp_path):
    return tiny_store(tmp_path / "store", quarantined={1: "unreadable"}).path


def found(path, **options):
    return [(f.kind, f.path, f.unit) for f in verify(path, **options).findings]


def flip(file, at):
    raw = bytearray(file.read_bytes())
    raw[at] ^= 4
    file.write_bytes(raw)


@pytest.mark.parametrize("codec", ["f16", "int8+zstd"])
def test_verify_finds_nothing_when_the_store_is_sound(tmp_path, codec):
    manifest = tiny_manifest(codec="f16")
    if codec != "f16":
        taps = {"stage4": dataclasses.replace(manifest.taps["stage4"], codec="f32+zstd")}
        manifest = dataclasses.replace(manifest, taps=taps)
    store = tiny_store(tmp_path / "s", manifest, quarantined={0: "x"})
    store.write_commit_index()
    report = verify(store.path)
    assert report.findings == []
    assert report.foreign == []
    assert (report.units, report.records, report.missing_views) == (3, 3, {})
    assert report.objects == summarise(store)["objects"]
    assert report.bytes == summarise(store)["bytes"]


def test_verify_gives_the_same_when_run_in_processes(path):
    flip(path / SHARD, 3)
    (path / "label/c/2").unlink()
    alone, calls = verify(path), []
    together = verify(path, workers=2, progress=lambda done, total: calls.append((done, total)))
    assert together == alone
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_verify_names_the_position_when_a_bit_of_a_row_flipped(path):
    store = open_store(path)
    index = ObjectReader(store.objects, store.layout.capacity).index(
        store.layout.arrays["taps/stage4"], store.committed.record(0, 1), 1
    )
    flip(path / SHARD, index[2, 0])
    (finding,) = verify(path).findings
    assert (finding.kind, finding.path, finding.unit, finding.record) == ("damaged", SHARD, 0, RECORD)
    assert "rows at positions 2 do not match" in finding.message


def test_verify_names_missing_truncated_and_swapped_objects(path):
    (path / "logits/c/0/2/0").unlink()
    os.truncate(path / "view/crop/c/0/1/0", 7)
    one, two = path / "taps/stage4/c/0/0/0/0", path / SHARD
    swap = path / "swap"
    one.rename(swap), two.rename(one), swap.rename(two)
    assert sorted(found(path)) == [
        ("damaged", "taps/stage4/c/0/0/0/0", 0),
        ("damaged", SHARD, 0),
        ("damaged", "view/crop/c/0/1/0", 1),
        ("missing", "logits/c/0/2/0", 2),
    ]
    assert sorted(found(path, quick=True)) == [
        ("damaged", "view/crop/c/0/1/0", 1),
        ("missing", "logits/c/0/2/0", 2),
    ]


def test_verify_lists_what_no_record_vouches_for(path):
    (path / RECORD).unlink()
    (path / "notes.txt").write_text("mine")
    (path / "taps/stage4/c/0/1/0/0.9-9.partial").write_bytes(b"half")
    report = verify(path)
    assert {(f.kind, f.unit) for f in report.findings} == {("orphan", 0), ("orphan", 1)}
    assert report.foreign == ["notes.txt"]
    assert report.missing_views == {0: [0, 1]}


def test_verify_leaves_a_unit_alone_when_its_writer_is_at_work(path):
    (path / RECORD).unlink()
    with exclusive(open_store(path).objects, lock_name(0), "-"):
        assert found(path) == []
    assert found(path)


def test_verify_names_a_damaged_and_a_foreign_record(path, tmp_path):
    flip(path / RECORD, 40)
    other = tiny_store(tmp_path / "other", tiny_manifest(seed=9))
    shutil.copy(other.path / "commits/u00001-v0-1.json", path / "commits/u00001-v0-1.json")
    assert found(path) == [("record", RECORD, 0), ("record", "commits/u00001-v0-1.json", 1)]


def test_verify_finds_a_lie_that_every_checksum_confirms(path):
    """Keys of another sample, written with matching checksums: only key_hash knows."""
    store = open_store(path)
    name = store.layout.arrays["key"].object_path(2)
    raw = store.objects.get(name)
    raw[5] ^= 1
    raw[-4:] = np.array([crc32c(raw[:-4])], "<u4").view(np.uint8)
    (path / name).write_bytes(raw.tobytes())
    file = path / "commits/u00002-v0-1.json"
    old = decode_record("commits/u00002-v0-1.json", file.read_bytes())
    objects = {**old.objects, name: ObjectChecksum(len(raw), object_checksum(raw))}
    file.write_bytes(encode_record(dataclasses.replace(old, objects=objects)))
    (finding,) = verify(path).findings
    assert (finding.kind, finding.path) == ("keys", name)
    assert "key_hash of positions 0 is another key's" in finding.message


def test_verify_finds_a_key_that_occurs_twice(tmp_path):
    store = tiny_store(tmp_path / "s", units=(0, 1))
    data = unit_data(store.manifest, 2)
    store.write_unit(2, 0, dataclasses.replace(data, keys=[*data.keys[:3], "key/1-2"]))
    (finding,) = verify(store.path).findings
    assert (finding.kind, finding.unit) == ("keys", 2)
    assert "'key/1-2' is in unit 1 too" in finding.message


def test_verify_names_a_record_that_leaves_an_object_out(path):
    file = path / RECORD
    old = decode_record(RECORD, file.read_bytes())
    objects = {name: proof for name, proof in old.objects.items() if name != SHARD}
    file.write_bytes(encode_record(dataclasses.replace(old, objects=objects)))
    assert set(found(path)) == {("record", SHARD, 0), ("orphan", SHARD, 0)}


@pytest.mark.parametrize("node", ["taps/stage4", "taps", "view/crop", "label"])
def test_verify_names_metadata_that_is_not_the_manifests(path, node):
    file = path / node / "zarr.json"
    metadata = json.loads(file.read_text())
    file.write_text(json.dumps({**metadata, "zarr_format": 2}))
    assert found(path) == [("metadata", f"{node}/zarr.json", None)]
    file.unlink()
    assert found(path) == [("metadata", f"{node}/zarr.json", None)]


def test_verify_finds_nothing_when_another_release_of_zarr_wrote_the_groups(path):
    """Before 3.1.6 a group says that it has no consolidated metadata."""
    for file in path.rglob("zarr.json"):
        node = json.loads(file.read_text())
        if node["node_type"] == "group":
            if node.pop("consolidated_metadata", "") == "":
                node["consolidated_metadata"] = None
            file.write_text(json.dumps(node))
    assert verify(path).findings == []


def test_verify_names_later_blocks_that_are_not_the_manifests(path):
    flip(path / "teacher/blocks/norm.weight/c/0", 2)
    assert found(path) == [("blocks", "teacher/blocks", None)]
    (path / "teacher/blocks/norm.weight/c/0").unlink()
    assert found(path) == [("blocks", "teacher/blocks", None)]


def test_verify_names_a_damaged_index_as_harmless(path):
    open_store(path).write_commit_index()
    flip(path / "commits/index", 900)
    (finding,) = verify(path).findings
    assert finding.kind == "index"
    assert "harmless" in finding.message


def test_verify_names_an_index_that_disagrees_with_a_record(path):
    open_store(path).write_commit_index()
    file = path / RECORD
    old = decode_record(RECORD, file.read_bytes())
    digit = old.objects[SHARD].crc32c
    other = digit ^ 1 if len(str(digit ^ 1)) == len(str(digit)) else digit ^ 2
    changed = encode_record(
        dataclasses.replace(old, objects={**old.objects, SHARD: ObjectChecksum(old.objects[SHARD].bytes, other)})
    )
    padded = changed.ljust(file.stat().st_size) if len(changed) <= file.stat().st_size else changed
    file.write_bytes(padded)
    kinds = {kind for kind, _, _ in found(path)}
    assert kinds == ({"index", "damaged"} if len(padded) == len(encode_record(old)) else {"damaged"})


def test_verify_reports_when_a_disk_cannot_be_read(path, monkeypatch):
    store = open_store(path)
    broken = type(store.objects).get

    def get(self, name):
        if name == SHARD:
            raise OSError(5, "Input/output error")
        return broken(self, name)

    monkeypatch.setattr(type(store.objects), "get", get)
    assert ("unreadable", SHARD, 0) in found(path)


def test_cli_verify_exits_1_and_lists_units_when_something_is_wrong(path, capsys):
    assert main(["verify", str(path), "--workers", "1"]) == 0
    assert "sound" in capsys.readouterr().out
    (path / SHARD).unlink()
    assert main(["verify", str(path), "--workers", "1", "--json"]) == 1
    out, err = capsys.readouterr()
    assert [finding["unit"] for finding in json.loads(out)["findings"]] == [0]
    assert "1 findings" in err
    assert main(["verify", str(path), "--workers", "1"]) == 1
    assert f"unit 0 missing: {SHARD}" in capsys.readouterr().out.replace("\n", "")
