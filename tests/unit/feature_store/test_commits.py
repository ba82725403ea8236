"""Commit records, what they vouch for, and the index and the orphans beside them."""

import json
from dataclasses import replace

import numpy as np
import pytest
from tiny_store import everything, tiny_manifest, tiny_store, view_data

from feature_store import RowId, open_store
from feature_store.backends.local import LocalObjects
from feature_store.commits import index as commit_index
from feature_store.commits.checksum_table import ChecksumTable, pack_checksums, total_bytes
from feature_store.commits.index import build_index, decode_index, is_whole, write_index
from feature_store.commits.locks import (
    exclusive,
    has_locks,
    is_held,
    lock_name,
    locked,
    locked_units,
    machine_folder,
)
from feature_store.commits.log import CommitLog, load_commits, load_store
from feature_store.commits.orphans import ObjectKind, classify_path, find_orphans, read_records, whole_objects, withdraw
from feature_store.commits.record import (
    CommitRecord,
    ObjectChecksum,
    already_committed,
    decode_record,
    encode_record,
    parse_record_path,
    record_path,
    write_commit,
)
from feature_store.errors import (
    CommittedError,
    CorruptStoreError,
    InputError,
    MismatchError,
    QuarantinedError,
    Remedy,
    ResourceError,
    UncommittedError,
)
from feature_store.format.checksums import crc32c
from feature_store.format.layout import StoreLayout
from feature_store.format.manifest import TarInfo

MANIFEST = replace(tiny_manifest(views=4), tars=tuple(TarInfo(f"tar-{u}.tar", 5, f"{u}" * 64) for u in range(3)))
LAYOUT = StoreLayout(MANIFEST)


def record_of(unit: int, first: int = 0, last: int = 3, **changes) -> CommitRecord:
    """A record whose objects' proofs all differ."""
    tar, views = MANIFEST.tars[unit], range(first, last + 1)
    paths = LAYOUT.object_paths(unit, views)
    record = CommitRecord(
        store=MANIFEST.identity(), unit=unit, first_view=first, last_view=last, tar=tar.name,
        tar_sha256=tar.header_sha256, samples=tar.samples, quarantined={},
        objects={path: ObjectChecksum(at + 10, 2**32 - 1 - at) for at, path in enumerate(paths)},
        software={"numpy": "2"},
    )  # fmt: skip
    return replace(record, **changes)


def same(one: CommitRecord, other: CommitRecord) -> bool:
    """Equal, whichever way their proofs are kept."""
    return replace(one, objects={}) == replace(other, objects={}) and dict(one.objects) == dict(other.objects)


# ---- records


def test_record_has_the_bytes_of_every_store_of_the_format():
    record = record_of(1, 2, 3, quarantined={3: "cut short"}, objects={"label/c/1": ObjectChecksum(44, 7)})
    body = {
        "first_view": 2, "last_view": 3, "objects": {"label/c/1": {"bytes": 44, "crc32c": 7}},
        "quarantined": {"3": "cut short"}, "samples": 5, "software": {"numpy": "2"}, "store": MANIFEST.identity(),
        "tar": "tar-1.tar", "tar_sha256": "1" * 64, "unit": 1,
    }  # fmt: skip
    checksum = crc32c(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())
    signed = json.dumps({**body, "record_crc32c": checksum}, sort_keys=True, separators=(",", ":"))
    assert encode_record(record) == signed.encode()
    assert record.path == "commits/u00001-v2-3.json"
    assert decode_record(record.path, signed.encode()) == record
    assert record.views == range(2, 4)


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("commits/u00012-v0-3.json", (12, 0, 3)),
        ("commits/u123456-v10-11.json", (123456, 10, 11)),
        ("commits/u0012-v0-3.json", None),
        ("commits/u00012-v0-3.json.1-1.partial", None),
        ("commits/u00012-v0.json", None),
        ("commits/index", None),
        ("x/commits/u00012-v0-3.json", None),
    ],
)
def test_record_place_is_what_its_path_names(path, place):
    assert parse_record_path(path) == place
    assert place is None or record_path(*place) == path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.replace(b"tar-1", b"tar-7"), "is damaged: its checksum does not match; remove it"),
        (lambda raw: raw[:-1], "is damaged: .*; remove it, then write its unit again"),
        (lambda raw: b"[]", "is damaged"),
        (lambda raw: b"{}", "is damaged"),
        (lambda raw: b"\xff", "is damaged"),
    ],
)
def test_decode_record_says_what_is_wrong_and_what_to_do(change, message):
    with pytest.raises(CorruptStoreError, match=f"commit record commits/u00001-v0-3.json {message}"):
        decode_record("commits/u00001-v0-3.json", change(encode_record(record_of(1))))


def test_decode_record_refuses_when_it_has_anothers_name():
    with pytest.raises(CorruptStoreError, match=r"commits/u00002-v0-3.json is misnamed: it is commits/u00001-v0-3.js"):
        decode_record("commits/u00002-v0-3.json", encode_record(record_of(1)))


def test_decode_record_accepts_the_last_position_as_quarantined_and_none_beyond():
    last, beyond = (record_of(1, quarantined={0: "a", position: "b"}) for position in (4, 5))
    assert decode_record(last.path, encode_record(last)).quarantined == {0: "a", 4: "b"}
    with pytest.raises(CorruptStoreError, match="is not valid: quarantined position 5 of 5 samples; remove it"):
        decode_record(beyond.path, encode_record(beyond))


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"store": "0" * 64}, MismatchError, "store of commits/u00001-v0-3.json .*comes from another store"),
        ({"tar_sha256": "x"}, MismatchError, "tar of commits/u00001-v0-3.json .*comes from another tar"),
        ({"samples": 4}, MismatchError, "comes from another tar"),
        ({"unit": 3}, CorruptStoreError, r"does not have \(3 units, 4 views\); restore zarr.json"),
        ({"last_view": 4}, CorruptStoreError, "is about units or views that the manifest does not have"),
    ],
)
def test_require_of_refuses_records_of_another_store_or_tar(changes, kind, message):
    with pytest.raises(kind, match=message) as caught:
        replace(record_of(1), **changes).require_of(MANIFEST)
    if kind is MismatchError:
        assert "the manifest has" in str(caught.value)
        assert caught.value.remedy is Remedy.REWRITE_UNIT


def test_require_of_accepts_the_last_unit_and_view():
    record_of(2, 3, 3).require_of(MANIFEST)


@pytest.mark.parametrize("quarantined", [{}, {0: "a"}, {4: "a", 1: "b"}, dict.fromkeys(range(5), "all")])
def test_readable_rows_are_those_that_are_not_quarantined_in_position_order(quarantined):
    record = record_of(1, 2, 3, quarantined=quarantined)
    good = [position for position in range(5) if position not in quarantined]
    assert (record.readable.dtype, record.readable.tolist()) == (np.int64, good)
    for view in record.views:
        rows = record.rows(view)
        assert (rows.dtype, rows.shape) == (np.int64, (len(good), 3))
        assert rows.tolist() == [[1, position, view] for position in good]


def test_proof_names_the_record_when_an_object_is_not_listed():
    record = record_of(0)
    assert record.proof("label/c/0") == record.objects["label/c/0"]
    message = "commit record commits/u00000-v0-3.json does not list object label/c/1; remove it"
    with pytest.raises(CorruptStoreError, match=message):
        record.proof("label/c/1")


def test_first_writer_of_a_record_wins(tmp_path):
    objects = LocalObjects(tmp_path)
    first, late = record_of(1), record_of(1, software={"numpy": "3"})
    write_commit(objects, first)
    with pytest.raises(CommittedError) as caught:
        write_commit(objects, late)
    assert str(caught.value) == str(already_committed(1, "tar-1.tar", first.path))
    for part in ("unit 1 (tar-1.tar)", first.path, "nothing was overwritten", "continue with the next unit"):
        assert part in str(caught.value)
    assert objects.get(first.path).tobytes() == encode_record(first)


# ---- proofs


@pytest.mark.parametrize("views", [range(4), range(1, 3)])
def test_packed_proofs_are_the_mapping_they_were_made_of(views):
    proofs = record_of(2, views.start, views.stop - 1).objects
    packed = pack_checksums(LAYOUT, 2, views, proofs)
    assert isinstance(packed, ChecksumTable)
    assert dict(packed) == proofs
    assert len(packed) == len(proofs) == len(LAYOUT.per_unit) + len(views) * len(LAYOUT.per_view)
    assert total_bytes(packed) == total_bytes(proofs) == sum(proof.bytes for proof in proofs.values())


def test_proof_order_has_arrays_without_views_first():
    arrays = LAYOUT.arrays.values()
    assert [*LAYOUT.per_unit, *LAYOUT.per_view] == sorted(arrays, key=lambda spec: spec.per_view)
    paths, shared = LAYOUT.object_paths(1, range(2, 4)), len(LAYOUT.per_unit)
    assert paths[:shared] == ["label/c/1", "key/c/1/0", "key_hash/c/1"]
    assert paths[shared] == "view/crop/c/2/1/0"
    assert paths[-1] == "logits.crc32c/c/3/1"


@pytest.mark.parametrize(
    "path",
    [
        "label/c/1", "label/c/2/0", "label", "view/crop/c/0/2/0", "view/crop/c/3/2/0", "view/crop/c/1/1/0",
        "view/crop/c/1/2", "view/crop/c/x/2/0", "view/crop/c/01/2/0", "view/crop/c/-1/2/0", "other/c/1/2/0",
    ],
)  # fmt: skip
def test_packed_proofs_have_no_objects_of_other_units_views_and_arrays(path):
    packed = pack_checksums(LAYOUT, 2, range(1, 3), record_of(2, 1, 2).objects)
    assert path not in packed
    with pytest.raises(KeyError):
        packed[path]


def test_proofs_stay_as_they_are_when_they_are_not_exactly_a_units():
    proofs = record_of(2).objects
    fewer = {path: proof for path, proof in proofs.items() if path != "label/c/2"}
    for unusual in (fewer, {**proofs, "more": ObjectChecksum(1, 1)}, {**fewer, "other": ObjectChecksum(1, 1)}):
        assert pack_checksums(LAYOUT, 2, range(4), unusual) is unusual


# ---- rows


def test_committed_rows_know_units_views_and_records():
    records = [record_of(2, 1, 2), record_of(0, 2, 3), record_of(0, 0, 1)]
    rows = CommitLog(LAYOUT, records)
    assert [record.path for record in rows.records] == [records[2].path, records[1].path, records[0].path]
    assert all(same(rows.record(r.unit, view), r) for r in records for view in r.views)
    assert (rows.units, rows.complete_units, rows.places) == ([0, 2], 1, 6)
    assert [rows.views(unit) for unit in (-1, 0, 1, 2, 3)] == [set(), {0, 1, 2, 3}, set(), {1, 2}, set()]
    assert rows.missing_views() == {1: [0, 1, 2, 3], 2: [0, 3]}
    assert not rows.is_indexed(0, range(2))
    whole = CommitLog(LAYOUT, [record_of(unit) for unit in range(3)])
    assert whole.missing_views() == {}
    assert (whole.complete_units, whole.places) == (3, 12)


@pytest.mark.parametrize("view", [-1, 0, 4])
def test_record_says_which_views_are_committed_when_one_is_not(view):
    rows = CommitLog(LAYOUT, [record_of(0, 1, 3)])
    message = (
        rf"view {view} of unit 0 \(tar-0.tar\) was never committed; .* this unit: \[1, 2, 3\]; write its missing views"
    )
    with pytest.raises(UncommittedError, match=message):
        rows.record(0, view)
    with pytest.raises(UncommittedError, match="views of this unit: none; write"):
        rows.record(1, 0)
    with pytest.raises(InputError, match="unit 3 does not exist"):
        rows.record(3, 0)


def test_require_refuses_rows_beyond_the_tar_and_quarantined_ones():
    rows = CommitLog(LAYOUT, [record_of(0, quarantined={2: "no label"})])
    for position in (0, 1, 3, 4):
        rows.require(RowId(0, position, 3))
    for position in (-1, 5):
        with pytest.raises(UncommittedError, match=r"does not exist: unit 0 has 5 samples \(tar-0.tar\)"):
            rows.require(RowId(0, position, 0))
    with pytest.raises(QuarantinedError, match=r"its sample was quarantined \(no label\); leave it out"):
        rows.require(RowId(0, 2, 0))


def test_add_refuses_when_any_view_is_taken_and_names_both_records():
    rows = CommitLog(LAYOUT, [record_of(0, 0, 1)])
    message = r"commits/u00000-v0-1.json and commits/u00000-v1-3.json cover the same view; remove one of them"
    with pytest.raises(CorruptStoreError, match=message):
        rows.add(record_of(0, 1, 3))
    with pytest.raises(MismatchError):
        rows.add(record_of(1, store="0" * 64))
    assert rows.places == 2


def test_replace_takes_the_place_of_records_of_its_views_and_of_no_others():
    rows = CommitLog(LAYOUT, [record_of(0, 0, 1), record_of(0, 2, 2), record_of(1)])
    rows.replace(record_of(0, 1, 1, quarantined={4: "x"}))
    assert rows.views(0) == {1, 2}
    assert rows.record(0, 1).quarantined == {4: "x"}
    assert rows.record(0, 2).path == "commits/u00000-v2-2.json"
    assert same(rows.record(1, 0), record_of(1))
    rows.replace(record_of(2, 0, 0))
    assert rows.units == [0, 1, 2]


# ---- the index

RECORDS = [
    record_of(0, quarantined={1: "a", 4: "b"}),
    record_of(1, 0, 0, software={"numpy": "3"}),
    record_of(1, 2, 3, quarantined={0: "c"}),
]


def indexed(records=RECORDS, layout=LAYOUT):
    packed = CommitLog(layout, records).records
    return build_index(layout, [(record, 100 + at) for at, record in enumerate(packed)])


def test_index_gives_back_the_records_it_was_made_of():
    index = decode_index(indexed().encode(), LAYOUT)
    assert len(index) == 3
    assert all(same(index.record(line), record) for line, record in enumerate(RECORDS))
    assert index.paths() == [record.path for record in RECORDS]
    assert index.columns["bytes"].tolist() == [100, 101, 102]
    assert index.software == [{"numpy": "2"}, {"numpy": "3"}]
    assert index.objects == sum(len(record.objects) for record in RECORDS)
    assert [index.covers(1, views) for views in (range(2, 4), range(2, 3), range(1, 4), range(1))] == [
        True, False, False, True,
    ]  # fmt: skip
    assert not index.covers(2, range(4))


def test_index_of_no_records_is_one():
    index = decode_index(indexed([]).encode(), LAYOUT)
    assert (len(index), index.paths(), index.objects) == (0, [], 0)
    assert not index.covers(0, range(4))


def test_index_serves_a_store_that_has_grown_and_none_whose_tars_differ(caplog):
    """It says how many tars it is about; unit 2 has no record in it."""
    raw = indexed().encode()
    more = replace(MANIFEST, tars=(*MANIFEST.tars, TarInfo("more.tar", 5, "f" * 64)))
    assert len(decode_index(raw, StoreLayout(more))) == 3
    other = replace(MANIFEST, tars=(*MANIFEST.tars[:2], TarInfo("other.tar", 5, "f" * 64)))
    assert len(decode_index(raw, StoreLayout(other))) == 3
    assert caplog.text == ""
    renamed = replace(MANIFEST, tars=(MANIFEST.tars[0], replace(MANIFEST.tars[1], name="x.tar"), MANIFEST.tars[2]))
    assert decode_index(raw, StoreLayout(renamed)) is None
    assert "commits/index is ignored, the records are read instead: it is another store's, or about tars" in caplog.text


def test_build_index_leaves_records_with_unusual_objects_out():
    unusual = record_of(2, objects={"label/c/2": ObjectChecksum(1, 1)}, quarantined={0: "z"}, software={"numpy": "9"})
    index = indexed([unusual, *RECORDS])
    assert [same(index.record(line), record) for line, record in enumerate(RECORDS)] == [True] * 3
    assert len(index) == 3
    assert index.software == [{"numpy": "2"}, {"numpy": "3"}]


@pytest.mark.parametrize("raw", [b"", b"abcd", b"\0\0\0\0", b"xyz"])
def test_an_index_is_not_whole_when_it_has_no_content(raw):
    assert not is_whole(raw)
    assert decode_index(raw, LAYOUT) is None


def test_an_index_is_whole_when_its_crc_is_right_whatever_it_holds():
    assert is_whole(b"x" + crc32c(b"x").to_bytes(4, "little"))
    assert not is_whole(b"y" + crc32c(b"x").to_bytes(4, "little"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unit": np.array([0, 1, 1], "<i4")}, "column unit is int32 [3], expected <u4"),
        ({"sizes": np.zeros((1, 2), "<u8")}, "column sizes is uint64 [1, 2], expected <u8"),
        ({"bytes": np.zeros(2, "<u4")}, "its columns differ in length"),
        ({"last_view": np.array([3, 0, 4], "<u4")}, "column last_view has 4, expected less than 4"),
        ({"software": np.array([0, 2, 0], "<u4")}, "column software has 2, expected less than 2"),
        ({"first_view": np.array([0, 1, 2], "<u4")}, "a record whose last view comes before its first"),
        ({"sizes": np.zeros(200, "<u8")}, "column sizes has 200 entries, expected"),
        ({"checksums": np.zeros(3, "<u4")}, "column checksums has 3 entries, expected"),
    ],
)
def test_decode_index_says_why_it_is_ignored(changes, message, caplog):
    index = indexed()
    object.__setattr__(index, "columns", {**index.columns, **{k: v for k, v in changes.items() if k in index.columns}})
    object.__setattr__(index, "proofs", {**index.proofs, **{k: v for k, v in changes.items() if k in index.proofs}})
    assert decode_index(index.encode(), LAYOUT) is None
    assert message in caplog.text


def test_decode_index_accepts_the_last_position_as_quarantined_and_none_beyond(caplog):
    """Of the tar of its line: unit 1 is at lines 1 and 2."""
    short = StoreLayout(replace(MANIFEST, tars=(replace(MANIFEST.tars[0], samples=2), *MANIFEST.tars[1:])))
    records = [replace(record_of(0), samples=2), record_of(1, quarantined={4: "x"})]
    assert decode_index(indexed(records, short).encode(), short).record(1).quarantined == {4: "x"}
    records = [replace(record_of(0), samples=2, quarantined={2: "x"}), record_of(1)]
    assert decode_index(indexed(records, short).encode(), short) is None
    assert "it has a quarantined position 2 beyond its tar" in caplog.text


def test_write_index_covers_the_records_that_are_there(tmp_path):
    objects = LocalObjects(tmp_path)
    for record in RECORDS[:2]:
        write_commit(objects, record)
    packed = CommitLog(LAYOUT, RECORDS).records
    assert write_index(objects, LAYOUT, packed) == 2
    index = decode_index(objects.get(commit_index.PATH).tobytes(), LAYOUT)
    assert index.paths() == [record.path for record in RECORDS[:2]]
    assert index.columns["bytes"].tolist() == [len(encode_record(record)) for record in RECORDS[:2]]


# ---- loading


@pytest.fixture
def objects(tmp_path):
    objects = LocalObjects(tmp_path)
    for record in RECORDS:
        write_commit(objects, record)
    return objects


def reads(objects, monkeypatch):
    """Paths of the records that are read from now on."""
    seen, get = [], type(objects).get
    monkeypatch.setattr(type(objects), "get", lambda self, path: seen.append(path) or get(self, path))
    return seen


def test_load_commits_reads_only_records_that_the_index_does_not_cover(objects, monkeypatch):
    write_index(objects, LAYOUT, CommitLog(LAYOUT, RECORDS[:2]).records)
    seen = reads(objects, monkeypatch)
    committed, problems = load_commits(objects, LAYOUT)
    assert problems == []
    assert seen == [commit_index.PATH, RECORDS[2].path]
    assert [same(*pair) for pair in zip(committed.records, RECORDS, strict=True)] == [True] * 3
    assert [committed.is_indexed(r.unit, r.views) for r in RECORDS] == [True, True, False]
    del seen[:]
    load_commits(objects, LAYOUT, use_index=False)
    assert sorted(seen) == sorted(record.path for record in RECORDS)


def test_load_commits_does_not_believe_the_index_about_records_that_are_gone_or_of_another_length(objects):
    write_index(objects, LAYOUT, CommitLog(LAYOUT, RECORDS).records)
    objects.delete(RECORDS[0].path)
    other = record_of(1, 0, 0, software={"a longer name": "1"})
    objects.put(other.path, encode_record(other))
    committed, problems = load_commits(objects, LAYOUT)
    assert problems == []
    assert [record.path for record in committed.records] == [RECORDS[1].path, RECORDS[2].path]
    assert committed.record(1, 0).software == {"a longer name": "1"}


def test_load_commits_names_records_that_cannot_be_believed_and_believes_the_rest(objects):
    objects.put(RECORDS[0].path, b"{}")
    objects.put("commits/notes.json", b"mine")
    objects.put("commits/notes.txt", b"mine")
    second = record_of(1, 3, 3)
    write_commit(objects, second)
    committed, problems = load_commits(objects, LAYOUT)
    assert [(problem.path, problem.unit) for problem in problems] == [
        ("commits/notes.json", None), (RECORDS[0].path, 0), (second.path, 1),
    ]  # fmt: skip
    assert "cover the same view" in str(problems[2].error)
    assert [record.path for record in committed.records] == [RECORDS[1].path, RECORDS[2].path]


def test_load_commits_passes_over_records_that_are_gone_since_they_were_listed(objects, monkeypatch):
    get = type(objects).get

    def gone(self, path):
        if path == RECORDS[1].path:
            raise FileNotFoundError(path)
        return get(self, path)

    monkeypatch.setattr(type(objects), "get", gone)
    committed, problems = load_commits(objects, LAYOUT)
    assert problems == []
    assert [record.path for record in committed.records] == [RECORDS[0].path, RECORDS[2].path]


def test_load_commits_reads_all_records_when_the_index_has_one_twice(objects):
    twice = [(record, 0) for record in CommitLog(LAYOUT, RECORDS[:1]).records] * 2
    sizes = objects.sizes("commits/")
    index = build_index(LAYOUT, [(record, sizes[record.path]) for record, _ in twice])
    objects.put(commit_index.PATH, index.encode())
    committed, problems = load_commits(objects, LAYOUT)
    assert problems == []
    assert [record.path for record in committed.records] == [record.path for record in RECORDS]


def test_load_commits_takes_the_index_alone_when_records_cannot_be_listed(objects, monkeypatch):
    monkeypatch.setattr(LocalObjects, "lists", False)
    with pytest.raises(
        InputError, match=r"cannot be listed and has no commit index .* in commits/index; call Store.write_commit_index"
    ):
        load_commits(objects, LAYOUT)
    write_index(objects, LAYOUT, CommitLog(LAYOUT, RECORDS[:2]).records)
    seen = reads(objects, monkeypatch)
    committed, problems = load_commits(objects, LAYOUT)
    assert (problems, seen) == ([], [commit_index.PATH])
    assert [record.path for record in committed.records] == [record.path for record in RECORDS[:2]]


def test_load_store_reads_the_manifest_again_when_it_has_grown_meanwhile(tmp_path, monkeypatch):
    store = tiny_store(tmp_path / "s", units=())
    store.write_unit(0, 0, view_data(store.manifest, 0, range(2)))
    small = store.objects.get("zarr.json").copy()
    grown = replace(store.manifest, num_views=3)
    store.grow(grown).write_unit(0, 2, view_data(grown, 0, range(2, 3)))
    seen, get = [], LocalObjects.get

    def first_the_old_one(self, path):
        seen.append(path)
        return small if path == "zarr.json" and seen.count(path) == 1 else get(self, path)

    monkeypatch.setattr(LocalObjects, "get", first_the_old_one)
    layout, committed, problems = load_store(LocalObjects(store.path))
    assert (layout.manifest.num_views, problems) == (3, [])
    assert committed.views(0) == {0, 1, 2}


# ---- orphans


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("label/c/2", ObjectKind("object", 2)),
        ("key/c/2/0", ObjectKind("object", 2)),
        ("view/crop/c/3/1/0", ObjectKind("object", 1)),
        ("taps/stage4/c/0/12/0/0", ObjectKind("object", 12)),
        ("taps/stage4.crc32c/c/0/12", ObjectKind("object", 12)),
        ("taps/stage4/c/0/12/0/0.77-1.partial", ObjectKind("partial", 12)),
        ("commits/u00004-v0-1.json.77-1.partial", ObjectKind("partial", 4)),
        ("zarr.json.77-1.partial", ObjectKind("partial")),
        ("commits/u00004-v0-1.json", ObjectKind("record", 4)),
        ("commits/index", ObjectKind("fixed")),
        ("zarr.json", ObjectKind("fixed")),
        ("taps/stage4/zarr.json", ObjectKind("fixed")),
        ("teacher/blocks/norm.weight/c/0", ObjectKind("fixed")),
        (".locks/u00001", ObjectKind("fixed")),
        ("notes.txt", ObjectKind("foreign")),
        ("label/c/x", ObjectKind("foreign")),
        ("label/c/02", ObjectKind("foreign")),
        ("label/c/2/0", ObjectKind("foreign")),
        ("taps/stage4/c/0/12/0/1", ObjectKind("foreign")),
        ("taps/stage4/c/3", ObjectKind("foreign")),
        ("taps/other/c/0/1/0/0", ObjectKind("foreign")),
        ("commits/notes.txt", ObjectKind("foreign")),
    ],
)
def test_classify_path_knows_what_a_path_is(path, place):
    assert classify_path(LAYOUT, path) == place


def test_find_orphans_spares_what_is_vouched_for_and_what_a_damaged_record_may_vouch_for():
    paths = [
        "label/c/0", "label/c/1", "label/c/2", "view/crop/c/0/0/0", "view/crop/c/2/0/0", "zarr.json",
        "zarr.json.1-1.partial", "label/c/0.1-1.partial", "notes.txt", record_of(0, 0, 1).path,
    ]  # fmt: skip
    found = find_orphans(LAYOUT, paths, [record_of(0, 0, 1)], [2, None])
    assert found == {
        0: ["view/crop/c/2/0/0", "label/c/0.1-1.partial"], 1: ["label/c/1"], None: ["zarr.json.1-1.partial"],
    }  # fmt: skip
    assert find_orphans(LAYOUT, paths[:2], [record_of(0), record_of(1)]) == {}
    assert find_orphans(LAYOUT, paths[:1], [record_of(1)]) == {0: ["label/c/0"]}


def test_whole_objects_are_neither_unfinished_nor_locks(tmp_path):
    objects = LocalObjects(tmp_path)
    for path in ("label/c/0", "label/c/0.1-1.partial", ".locks/u00000"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"x")
    assert whole_objects(objects) == ["label/c/0"]


def test_read_records_gives_those_of_one_unit(objects):
    objects.put("commits/u00001-notes", b"mine")
    objects.put("commits/u00001-v1-1.json.1-1.partial", b"half")
    assert [record.path for record in read_records(objects, 1)] == [record.path for record in RECORDS[1:]]
    assert read_records(objects, 2) == []
    objects.put(RECORDS[0].path, b"{}")
    with pytest.raises(CorruptStoreError):
        read_records(objects, 0)


def test_remove_orphans_goes_on_after_a_unit_with_a_damaged_record(tmp_path):
    store = tiny_store(tmp_path / "s", units=(0,))
    store.objects.put("commits/u00001-v0-1.json", b"{}")
    stray = ["label/c/1", "label/c/2", "zarr.json.1-1.partial", "label/c/0.1-1.partial"]
    for path in stray:
        (store.path / path).write_bytes(b"half")
    assert store.remove_orphans() == sorted(stray[1:])
    assert [(store.path / path).exists() for path in stray] == [True, False, False, False]


def test_withdraw_removes_a_units_records_index_and_objects_and_nothing_else(tmp_path):
    store, without = (tiny_store(tmp_path / name, units=units) for name, units in (("s", (0, 1, 2)), ("w", (0, 2))))
    store.write_commit_index()
    order, delete = [], LocalObjects.delete
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalObjects, "delete", lambda self, path: order.append(path) or delete(self, path))
        withdraw(store.objects, 1)
    assert order[:2] == ["commits/index", "commits/u00001-v0-1.json"]  # before what they vouch for
    files = [{f.relative_to(s.path) for f in s.path.rglob("*") if f.is_file()} for s in (store, without)]
    assert files[0] == files[1]
    assert everything(open_store(store.path)) == everything(without)
    withdraw(store.objects, 1)  # what a withdrawal interrupted left is no error


def test_withdraw_refuses_when_the_unit_is_being_written_and_removes_nothing(tmp_path):
    store = tiny_store(tmp_path / "s", units=(1,))
    with exclusive(store.objects, lock_name(1), "-"), pytest.raises(ResourceError, match="is writing unit 1 of .*wait"):
        withdraw(store.objects, 1)
    assert open_store(store.path).committed.units == [1]


# ---- locks


def test_lock_names_are_those_other_processes_look_for():
    assert (lock_name(None), lock_name(7), lock_name(123456)) == ("grow", "u00007", "u123456")
    paths = [".locks/u00007", ".locks/grow", ".locks/store", ".locks/u", ".locks/ux", "x/.locks/u00001", "u00002"]
    assert locked_units([*paths, ".locks/u123456"]) == [7, 123456]


def test_lock_is_held_while_it_is_and_leaves_no_file(tmp_path):
    objects = LocalObjects(tmp_path)
    for unit in (None, 3):
        assert not is_held(objects, unit)
        with exclusive(objects, lock_name(unit), "-"):
            assert is_held(objects, unit)
            assert not is_held(objects, 4)
            refused = pytest.raises(ResourceError, match=r"^unit is busy$")
            with refused, exclusive(objects, lock_name(unit), "unit is busy"):
                pass
            assert is_held(objects, unit)
        assert not is_held(objects, unit)
    assert list((tmp_path / ".locks").iterdir()) == []
    assert has_locks(objects)


def test_lock_is_released_when_its_holder_fails(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path / "a" / "one", "-"):
        raise KeyError
    with locked(tmp_path / "a" / "one", "-"):
        assert (tmp_path / "a" / "one").exists()


def test_machine_folder_is_this_users_and_one_per_url():
    folders = [machine_folder(url) for url in ("s3://a/b", "s3://a/c", "s3://a/b")]
    assert folders[0] == folders[2] != folders[1]
    assert folders[0].parent.name.startswith("scalekd-locks-")
    assert len(folders[0].name) == 32


def test_lock_of_a_machine_is_refused_when_another_user_made_its_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    machine_folder("s3://a/b").parent.symlink_to(tmp_path / "elsewhere")
    with (
        pytest.raises(ResourceError, match="is a link or belongs to another user; set TMPDIR"),
        locked(machine_folder("s3://a/b") / "u00000", "-"),
    ):
        pass
    assert list((tmp_path / "elsewhere").iterdir()) == []
