"""repair deletes orphan objects, restores metadata from the manifest, and leaves everything else alone."""

import json

import pytest
from tiny_store import BLOCKS, everything, tiny_manifest, tiny_store, unit_data

from feature_store import Store, open_store
from feature_store.errors import CorruptStoreError, Remedy
from feature_store.tools.cli import main
from feature_store.tools.repair import repair
from feature_store.tools.verify import verify

SHARD = "taps/stage4/c/1/0/0/0"
RECORD = "commits/u00000-v0-1.json"


@pytest.fixture
def path(tmp_path):
    return tiny_store(tmp_path / "store").path


def contents(path):
    return {f.relative_to(path).as_posix(): f.read_bytes() for f in path.rglob("*") if f.is_file()}


def flip(file):
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 3] ^= 16
    file.write_bytes(raw)


def test_repair_tidies_a_store_without_any_commit(tmp_path):
    store = Store.create(tmp_path / "store", tiny_manifest(), BLOCKS)
    (store.path / SHARD).parent.mkdir(parents=True)
    (store.path / SHARD).write_bytes(b"half")

    assert repair(store.path, apply=True).orphans == [SHARD]
    assert verify(store.path).findings == []


def test_repair_changes_nothing_when_it_is_not_told_to(path):
    (path / RECORD).unlink()
    flip(path / "commits/u00001-v0-1.json")
    (path / "label/zarr.json").unlink()
    before = contents(path)
    plan = repair(path, drop_damaged=True)
    assert contents(path) == before
    assert not plan.done
    assert SHARD in plan.orphans
    assert plan.dropped == ["commits/u00001-v0-1.json"]
    assert plan.metadata == ["label/zarr.json"]
    assert plan.redo == {0: [0, 1], 1: [0, 1]}


def test_repair_deletes_orphans_and_keeps_good_units_and_foreign_files(path):
    gone = open_store(path).committed.record(0, 0).objects
    (path / RECORD).unlink()
    (path / "notes.txt").write_text("mine")
    kept = {name: raw for name, raw in contents(path).items() if name not in gone}
    (path / "taps/stage4/c/0/1/0/0.7-7.partial").write_bytes(b"half")
    (path / "zarr.json.7-7.partial").write_bytes(b"half")
    repair(path, apply=True)
    assert {name: raw for name, raw in contents(path).items() if name != "commits/index"} == kept
    assert verify(path).findings == []
    assert open_store(path).committed.units == [1, 2]


def test_repair_keeps_damaged_units_unless_told_to_drop_them(path):
    flip(path / SHARD)
    kept = repair(path, apply=True)
    assert kept.damaged == [RECORD]
    assert kept.dropped == []
    assert open_store(path).is_committed(0, 0)
    dropped = repair(path, apply=True, drop_damaged=True)
    assert dropped.dropped == [RECORD]
    assert SHARD in dropped.orphans
    assert dropped.redo == {0: [0, 1]}
    store = open_store(path)
    assert store.committed.units == [1, 2]
    store.write_unit(0, 0, unit_data(store.manifest, 0))
    assert verify(path).findings == []


def test_repair_makes_a_store_open_again_when_a_record_was_damaged(path):
    flip(path / RECORD)
    with pytest.raises(CorruptStoreError) as caught:
        open_store(path)
    assert caught.value.remedy is Remedy.REWRITE_UNIT
    assert SHARD not in repair(path, apply=True).orphans  # what a damaged record may vouch for stays
    assert (path / SHARD).exists()
    repair(path, apply=True, drop_damaged=True)
    assert open_store(path).committed.units == [1, 2]
    assert verify(path).findings == []


def test_repair_writes_metadata_and_index_again(path):
    before = everything(open_store(path))
    open_store(path).write_commit_index()
    for name in ("taps/zarr.json", "logits/zarr.json", "commits/index"):
        flip(path / name)
    assert {finding.kind for finding in verify(path).findings} == {"metadata", "index"}
    repair(path, apply=True)
    assert verify(path).findings == []
    assert everything(open_store(path)) == before


def test_repair_does_not_drop_what_only_cannot_be_read_now(path, monkeypatch):
    objects = type(open_store(path).objects)
    get = objects.get

    def failing(self, name):
        if name == SHARD:
            raise OSError(5, "Input/output error")
        return get(self, name)

    monkeypatch.setattr(objects, "get", failing)
    result = repair(path, apply=True, drop_damaged=True)
    assert result.dropped == []
    assert [finding.kind for finding in result.beyond_repair] == ["unreadable"]
    assert open_store(path).is_committed(0, 1)


def test_cli_repair_is_a_dry_run_by_default(path, capsys):
    flip(path / SHARD)
    (path / "label/c/2.7-7.partial").write_bytes(b"")
    assert main(["repair", str(path), "--workers", "1"]) == 0
    out = capsys.readouterr().out.replace("\n", " ")
    for text in (
        "would delete label/c/2.7-7.partial",
        f"damaged, kept: {RECORD}",
        "write again: unit 0",
        "--yes applies it",
    ):
        assert text in out
    assert main(["repair", str(path), "--workers", "1", "--yes", "--drop-damaged", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["dropped"] == [RECORD]
    assert result["redo"] == {"0": [0, 1]}
    assert main(["verify", str(path), "--workers", "1"]) == 0
