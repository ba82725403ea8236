"""Stores whose hashes and checksums agree, but which say nonsense: refused by name, never a crash or a hang."""

import copy
import io
import json
import os
import shutil
import socket
import threading
from contextlib import suppress
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from signed_store import sign, write_index
from tiny_store import everything, tiny_manifest, tiny_store

from feature_store import open_store
from feature_store.backends.local import LocalObjects
from feature_store.errors import CorruptStoreError, InputError, UnknownFieldError, UserError
from feature_store.tools.cli import main
from feature_store.tools.info import summarise
from feature_store.tools.repair import repair
from feature_store.tools.verify import verify

GOLDEN = Path(__file__).parents[2] / "golden" / "store_v1"
RECORD = "commits/u00000-v0-1.json"
EXAMPLES = 1000 if os.environ.get("FAULT_CAMPAIGN") == "long" else 30


@pytest.fixture
def path(tmp_path):
    return Path(shutil.copytree(GOLDEN, tmp_path / "s"))


def statistics(name, value):
    return lambda m: m["taps"]["stage4"]["statistics"].__setitem__(name, value)


def inside(*names, **values):
    def change(data):
        for name in names:
            data = data[name]
        data.update(values)

    return change


MANIFESTS = {
    "NaN": (statistics("std", [float("nan")] * 8), r"taps\.stage4\.statistics\.std\[0\]"),
    "zero": (statistics("std", [0.0] * 8), "std in the statistics of taps/stage4 has 0.0 at channel 0"),
    "negative": (statistics("std", [1.0] * 7 + [-1.0]), "-1.0 at channel 7"),
    "infinite as float32": (statistics("mean", [1e39] * 8), "mean in the statistics of taps/stage4 has inf"),
    "too small for float32": (statistics("std", [1e-60] * 8), "std in the statistics"),
    "wrong width": (statistics("std", [1.0] * 3), "has 3 numbers, expected 8"),
    "text": (statistics("std", ["a"] * 8), r"statistics\.std\[0\]"),
    "no statistics": (inside("taps", "stage4", statistics=None), "has 0 numbers"),
    "negative capacity": (inside(capacity=-5), "'capacity' is -5"),
    "fractional capacity": (inside(capacity=3.5), r"'capacity' is 3\.5"),
    "capacity as float": (inside(capacity=5.0), r"'capacity' is 5\.0"),
    "huge capacity": (inside(capacity=10**30), "'capacity' is 1000"),
    "capacity below a tar": (inside(capacity=2), "the capacity is 2"),
    "capacity as boolean": (inside(capacity=True), "'capacity' is True"),
    "views as text": (inside(num_views="2"), "'num_views' is '2'"),
    "negative views": (inside(num_views=-1), "'num_views' is -1"),
    "huge views": (inside(num_views=10**9), "num_views 1000000000"),
    "negative key width": (inside(key_width=-1), "'key_width' is -1"),
    "negative seed": (inside(seed=-1), "'seed' is -1"),
    "negative tokens": (inside("taps", "stage4", tokens=-16), r"'taps\.stage4\.tokens' is -16"),
    "4 TiB rows": (
        inside("taps", "stage4", tokens=2**20, channels=2**20),
        "a row of taps/stage4 has 1,099,511,627,776",
    ),
    "negative classes": (inside("teacher", num_classes=-1), r"'teacher\.num_classes' is -1"),
    "unknown codec": (inside("taps", "stage4", codec="int9"), "unknown codec 'int9'"),
    "codec of another shape": (inside(logits_codec="int8"), "is a codec of taps"),
    "tap outside of the store": (lambda m: m["taps"].update({"../../x": m["taps"]["stage4"]}), r"\.\./\.\./x"),
    "tap named like the logits": (lambda m: m["taps"].update(logits=m["taps"]["stage4"]), "a tap named 'logits'"),
    "tars as numbers": (inside(tars=[1, 2]), r"'tars\[0\]' is 1"),
    "tars as an object": (inside(tars={}), "'tars' is {}"),
    "policy as a list": (inside(policy=[]), r"'policy' is \[\]"),
    "policy with text": (inside("policy", num_ops="2"), r"'policy\.num_ops' is '2'"),
    "deep arguments": (inside("teacher", model_kwargs={"a": json.loads("[" * 300 + "]" * 300)}), "nested at most 16"),
    "version as boolean": (inside(format_version=True), "format_version True"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_command_names_the_field_when_a_manifest_makes_no_sense(path, capsys, name):
    change, named = MANIFESTS[name]
    sign(path, manifest=change)
    with pytest.raises(InputError, match=named):
        open_store(path)
    for command in (
        ["info"],
        ["verify"],
        ["repair"],
        ["bench", "--codecs", "f16"],
        ["plot", "--out", str(path / "out")],
    ):
        assert main([command[0], str(path), *command[1:]]) == 2
    assert capsys.readouterr().err.count("feature-store: error: ") == 5


@pytest.mark.parametrize("where", [(), ("teacher",), ("split",), ("policy",), ("taps", "stage4"), ("tars", 1)])
def test_open_names_a_field_of_a_newer_release_and_does_not_call_it_damaged(path, where):
    sign(path, manifest=inside(*where, zz_new=1))
    with pytest.raises(UnknownFieldError, match=r"written by a newer release: field '.*zz_new' is unknown") as caught:
        open_store(path)
    assert "damaged" not in str(caught.value)


def test_numbers_keep_their_json_form_when_a_manifest_is_read(path):
    """Otherwise its hashes would differ from those in the store."""
    sign(path, manifest=inside("policy", flip=0, level=9))
    store = open_store(path)
    assert json.dumps(store.manifest.to_dict()["policy"]["level"]) == "9"
    assert verify(path).findings == []


def test_names_that_are_not_utf8_are_read_as_they_were_written(path):
    sign(path, manifest=inside(licence="caf\udce9"))
    assert open_store(path).manifest.licence == "caf\udce9"
    assert main(["info", str(path)]) == 0


RECORDS = {
    "quarantined beyond the tar": (lambda r: r.update(quarantined={"5000": "x"}), "quarantined position 5000"),
    "negative quarantined": (lambda r: r.update(quarantined={"-1": "x"}), "quarantined.-1"),
    "quarantined as text": (lambda r: r.update(quarantined={"one": "x"}), "quarantined.one"),
    "reasons as numbers": (lambda r: r.update(quarantined={"1": 5}), "quarantined.1"),
    "negative length": (lambda r: [o.update(bytes=-1) for o in r["objects"].values()], "bytes' is -1"),
    "length as text": (lambda r: [o.update(bytes="1") for o in r["objects"].values()], "bytes' is '1'"),
    "checksum of 33 bits": (lambda r: [o.update(crc32c=2**32) for o in r["objects"].values()], "crc32c' is 4294967296"),
    "samples as boolean": (lambda r: r.update(samples=True), "'samples' is True"),
    "objects as a list": (lambda r: r.update(objects=[]), "'objects' is"),
    "another tar's samples": (lambda r: r.update(samples=3), "tar of commits"),
}


@pytest.mark.parametrize("name", RECORDS)
def test_verify_names_a_record_that_makes_no_sense(path, name):
    change, named = RECORDS[name]
    sign(path, record=change)
    with pytest.raises(UserError):
        open_store(path)
    (finding,) = [finding for finding in verify(path).findings if finding.path == RECORD]
    assert finding.kind == "record"
    assert named in finding.message


def test_a_record_of_a_newer_release_is_named_and_never_dropped(path):
    sign(path, record=lambda r: r.update(zz_new=1))
    (path / "commits/index").unlink()
    with pytest.raises(UnknownFieldError, match="newer release: field 'zz_new' is unknown"):
        open_store(path)
    assert [(finding.kind, finding.path) for finding in verify(path).findings] == [("newer", RECORD)]
    assert repair(path, apply=True, drop_damaged=True).dropped == []
    assert (path / RECORD).exists()


def test_objects_outside_of_the_store_are_never_touched(path):
    outside = path.parent / "outside"
    outside.write_bytes(b"mine")
    objects = LocalObjects(path)
    for name in ("../outside", str(outside), "taps/../../outside", "a\0b", ""):
        for call in (objects.get, objects.delete, objects.size, lambda name: objects.get_range(name, 0, 1)):
            with pytest.raises(CorruptStoreError, match="expected a path inside the store"):
                call(name)
        with pytest.raises(CorruptStoreError):
            objects.put(name, b"theirs")
    sign(path, record=lambda r: r["objects"].update({"../outside": {"bytes": 4, "crc32c": 1}}))
    (path / "commits/index").unlink()
    assert "../outside" in {finding.path for finding in verify(path).findings}
    with pytest.raises(CorruptStoreError):
        open_store(path).withdraw_unit(0)
    assert outside.read_bytes() == b"mine"


BLOCKS = {
    "a path": {"tensors": ["../../../outside"]},
    "an absolute path": {"tensors": ["/etc/passwd"]},
    "a number": {"tensors": [1]},
    "text": {"tensors": "norm.weight"},
    "nothing": {},
}


@pytest.mark.parametrize("name", BLOCKS)
def test_later_blocks_are_refused_when_their_names_make_no_sense(path, name):
    file = path / "teacher/blocks/zarr.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "attributes": BLOCKS[name]}))
    with pytest.raises(CorruptStoreError, match=r"teacher/blocks/zarr\.json is damaged"):
        open_store(path).later_blocks()
    assert {finding.kind for finding in verify(path).findings} == {"blocks"}


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [-1]}, {"shape": [2**40]}, {"shape": [10**30]}, {"shape": 8}, {"shape": ["8"]}, {"shape": [True]},
        {"data_type": "object"}, {"data_type": "f8,f8"}, {"data_type": 4}, {"fill_value": "x"}, {"fill_value": [[1]]},
    ],
)  # fmt: skip
def test_later_blocks_are_refused_when_a_tensors_metadata_make_no_sense(path, change):
    file = path / "teacher/blocks/norm.weight/zarr.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    (path / "teacher/blocks/norm.weight/c/0").unlink()  # then its shape alone says how large it is
    assert "blocks" in {finding.kind for finding in verify(path).findings}


def bind_socket(file):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(file))


SPECIAL = {
    "fifo": os.mkfifo,
    "directory": Path.mkdir,
    "socket": bind_socket,
    "endless device": lambda file: file.symlink_to("/dev/zero"),
    "circle of links": lambda file: file.symlink_to(file.name),
}
PLACES = (
    "zarr.json", RECORD, "commits/index", "commits/u00002-v2-2.json", "taps/stage4/c/0/0/0/0", "label/c/0",
    "label/zarr.json", "teacher/blocks/zarr.json", "teacher/blocks/norm.weight/c/0", ".locks/u00000", ".locks/grow",
)  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "place"),
    [*(("fifo", place) for place in PLACES), *((kind, place) for kind in SPECIAL for place in PLACES[:5:2])],
)
def test_nothing_hangs_or_crashes_when_a_special_file_is_in_a_store(path, monkeypatch, kind, place):
    monkeypatch.chdir(path)  # names of sockets are short
    file = path / place
    file.parent.mkdir(exist_ok=True)
    if file.exists():
        file.unlink()
    SPECIAL[kind](file)

    def use():
        for command in (["info"], ["repair", "--workers", "1"]):  # which verifies
            assert main([command[0], str(path), *command[1:]]) in (0, 1, 2, 3)
        with suppress(UserError):
            everything(open_store(path))

    thread = threading.Thread(target=use, daemon=True)
    failures = []
    monkeypatch.setattr(threading, "excepthook", lambda args: failures.append(args.exc_value))
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert failures == []


def npz(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def npy(values):
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def changed_index(path, entries=None, **changes):
    """The store's own index with some members, or entries of its head, changed."""
    with np.load(io.BytesIO((path / "commits/index").read_bytes()[:-4])) as file:
        arrays = {name: file[name] for name in file.files}
    head = json.loads(arrays["head"].tobytes())
    head.update(entries or {})
    return npz(**{**arrays, **changes, "head": np.frombuffer(json.dumps(head).encode(), np.uint8)})


def compressed():
    file = io.BytesIO()
    np.savez_compressed(file, head=np.zeros(1 << 26, np.uint8))
    return file.getvalue()


INDEXES = {
    "text": lambda path: b"an index of a later release",
    "one byte": lambda path: b"x",
    "JSON": lambda path: b'{"version": 2, "records": []}',
    "nested JSON": lambda path: b"[" * 100_000,
    "an empty zip": lambda path: b"PK\x05\x06" + bytes(18),
    "an npy": lambda path: npy(np.arange(4)),
    "an npy of objects": lambda path: npy(np.array([{}], object)),
    "an npz without members": lambda path: npz(),
    "an npz of other members": lambda path: npz(columns=np.arange(4)),
    "a bomb": lambda path: compressed(),
    "a cut one": lambda path: (path / "commits/index").read_bytes()[:-200],
    "longer columns": lambda path: changed_index(path, unit=np.arange(9, dtype="<u4")),
    "negative columns": lambda path: changed_index(path, unit=np.array([-1, -2], "<i8")),
    "huge units": lambda path: changed_index(path, unit=np.array([0, 2**32 - 1], "<u4")),
    "huge views": lambda path: changed_index(path, last_view=np.array([1, 2**32 - 1], "<u4")),
    "turned views": lambda path: changed_index(path, first_view=np.array([2, 2], "<u4"), last_view=np.zeros(2, "<u4")),
    "columns of text": lambda path: changed_index(path, unit=np.array(["a", "b"])),
    "a matrix": lambda path: changed_index(path, bytes=np.zeros((2, 2), "<u4")),
    "few proofs": lambda path: changed_index(path, sizes=np.zeros(3, "<u8")),
    "unknown software": lambda path: changed_index(path, software=np.array([0, 7], "<u4")),
    "the same record twice": lambda path: changed_index(path, unit=np.zeros(2, "<u4"), last_view=np.ones(2, "<u4")),
    "an unknown entry": lambda path: changed_index(path, {"zz_new": 1}),
    "negative units": lambda path: changed_index(path, {"units": -1}),
    "more units": lambda path: changed_index(path, {"units": 10**12}),
    "quarantined beyond the tar": lambda path: changed_index(path, {"quarantined": {"0": {"99": "x"}}}),
    "quarantined in no record": lambda path: changed_index(path, {"quarantined": {"50": {"0": "x"}}}),
    "software as numbers": lambda path: changed_index(path, {"software": [1]}),
    "another store's": lambda path: changed_index(path, {"store": "0" * 64}),
}


@pytest.mark.parametrize("name", INDEXES)
def test_an_index_of_any_content_is_ignored_with_a_warning_and_everything_works(path, caplog, capsys, name):
    before = everything(open_store(path))
    write_index(path, INDEXES[name](path))
    assert everything(open_store(path)) == before
    assert "commits/index is ignored" in caplog.text
    report = verify(path)
    assert report.findings == []
    assert report.foreign == ["commits/index"]
    assert main(["repair", str(path), "--workers", "1", "--quick", "--yes"]) == 0
    caplog.clear()
    assert everything(open_store(path)) == before
    assert caplog.text == ""  # repair wrote it again


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(payload=st.one_of(st.binary(min_size=1, max_size=400), st.integers(0, 3000)), byte=st.integers(0, 255))
def test_opening_never_fails_when_an_index_holds_random_bytes(path, payload, byte):
    """Random contents, and the store's own index with one byte changed, both with a right crc32c."""
    whole = (GOLDEN / "commits/index").read_bytes()[:-4]
    if isinstance(payload, int):
        payload %= len(whole)
        payload = whole[:payload] + bytes([byte]) + whole[payload + 1 :]
    write_index(path, payload)
    assert open_store(path).committed.units == [0, 1, 2]


NONSENSE = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-(2**80), 2**80), st.floats(), st.text(max_size=5),
    st.sampled_from([2**31, 2**32, 2**63, 2**64, 10**40, {}, [], [1, 2], [[[1]]], {"a": 1}, "../../x"]),
)  # fmt: skip


def fields_of(value, path=()):
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, child in children:
        yield from fields_of(child, (*path, name))


def put(value, path, new):
    for name in path[:-1]:
        value = value[name]
    value[path[-1]] = new


MANIFEST_FIELDS = [
    field for field in fields_of(json.loads((GOLDEN / "zarr.json").read_text())["attributes"]["manifest"]) if field
]
RECORD_FIELDS = [
    field
    for field in fields_of(json.loads((GOLDEN / RECORD).read_text()))
    if field and field[0] not in ("store", "record_crc32c")
]


def use_every_door(path):
    """Open, read, summarise, verify: each works, or says in its own words why not."""
    for door in (
        lambda: everything(open_store(path)),
        lambda: json.dumps(summarise(open_store(path))),
        lambda: verify(path),
    ):
        with suppress(UserError):
            door()


def fresh(folder):
    shutil.rmtree(folder / "s", ignore_errors=True)
    return Path(shutil.copytree(GOLDEN, folder / "s"))


@pytest.fixture
def little_memory():
    """The process grows by less than a gigabyte."""
    before = getrusage(RUSAGE_SELF).ru_maxrss
    yield
    assert getrusage(RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB


@pytest.mark.usefixtures("little_memory")
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(field=st.sampled_from(MANIFEST_FIELDS), nonsense=NONSENSE)
def test_every_door_works_or_refuses_when_a_manifests_field_is_nonsense(tmp_path, field, nonsense):
    path = fresh(tmp_path)
    sign(path, manifest=lambda stated: put(stated, field, copy.deepcopy(nonsense)))
    use_every_door(path)


@pytest.mark.usefixtures("little_memory")
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(field=st.sampled_from(RECORD_FIELDS), nonsense=NONSENSE)
def test_every_door_works_or_refuses_when_a_records_field_is_nonsense(tmp_path, field, nonsense):
    path = fresh(tmp_path)
    (path / "commits/index").unlink()
    sign(path, record=lambda stated: put(stated, field, copy.deepcopy(nonsense)))
    use_every_door(path)


def test_reading_refuses_when_a_signed_shard_index_points_outside_of_its_shard(tmp_path):
    """Offsets and lengths of 64 bits, with right checksums everywhere."""
    from feature_store.format.addressing import RowId
    from feature_store.format.arrays import shard_index_bytes
    from feature_store.format.checksums import crc32c

    for offset, length in ((2**64 - 2, 52), (2**63, 52), (10**6, 52), (0, 2**63), (0, 2**64 - 2), (0, 0)):
        shutil.rmtree(tmp_path / "s", ignore_errors=True)
        store = tiny_store(tmp_path / "s", tiny_manifest(codec="f16+zstd"), units=(0,))
        path = store.layout.arrays["taps/stage4"].object_path(0, 0)
        file = store.path / path
        raw, tail = bytearray(file.read_bytes()), shard_index_bytes(store.manifest.capacity)
        raw[-tail : -tail + 16] = np.array([offset, length], "<u8").tobytes()
        raw[-4:] = crc32c(bytes(raw[-tail:-4])).to_bytes(4, "little")
        file.write_bytes(raw)
        checksum = int.from_bytes(raw[-4:], "little")
        sign(store.path, record=lambda r, path=path, checksum=checksum: r["objects"][path].update(crc32c=checksum))
        with pytest.raises(CorruptStoreError, match=f"object {path} is damaged"):
            open_store(store.path).source().read([RowId(0, 0, 0)])
        assert "damaged" in {finding.kind for finding in verify(store.path).findings}
