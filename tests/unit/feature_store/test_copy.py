"""A copied store holds what the source holds, and an interrupted copy lacks units."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import WebServer, s3_server
from tiny_store import everything, tiny_manifest, tiny_store, unit_data

from feature_store import open_store
from feature_store.backends.local import LocalObjects
from feature_store.backends.open import open_objects
from feature_store.errors import CorruptStoreError, MismatchError, ResourceError
from feature_store.tools.card import write_card
from feature_store.tools.cli import main
from feature_store.tools.copy import copy
from feature_store.tools.verify import verify


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_server() as new_bucket:
        yield new_bucket()


def test_copy_has_every_object_of_the_source(tmp_path: Path) -> None:
    store = tiny_store(tmp_path / "s")
    store.write_commit_index()
    write_card(store, store.path)

    report = copy(tmp_path / "s", tmp_path / "c")

    source, target = (open_objects(tmp_path / name) for name in "sc")
    assert {path: target.get(path).tobytes() for path in target.list()} == {
        path: source.get(path).tobytes() for path in source.list()
    }
    assert (report.records, report.copied) == (3, 3)
    assert not verify(tmp_path / "c").findings


def test_copy_goes_to_a_bucket_and_back(tmp_path: Path, bucket: str) -> None:
    tiny_store(tmp_path / "s")

    copy(tmp_path / "s", f"{bucket}/there")
    copy(f"{bucket}/there", tmp_path / "back")

    assert everything(open_store(tmp_path / "back")) == everything(open_store(tmp_path / "s"))
    assert not verify(f"{bucket}/there").findings


def test_copy_reads_a_web_server_and_refuses_to_write_to_one(tmp_path: Path) -> None:
    store = tiny_store(tmp_path / "s", quarantined={1: "zero bytes"})
    store.write_commit_index()  # behind a web server it alone says what is committed
    with WebServer(tmp_path) as server:
        copy(f"{server.url}/s", tmp_path / "c")
        assert everything(open_store(tmp_path / "c")) == everything(open_store(tmp_path / "s"))
        assert main(["copy", str(tmp_path / "s"), f"{server.url}/d"]) == 2


def test_interrupted_copy_lacks_units_and_the_same_call_completes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_store(tmp_path / "s")
    put = LocalObjects.put

    def failing(self: LocalObjects, path: str, *arguments, **options) -> None:
        if path.startswith("taps/") and path.endswith("/2/0/0"):  # of the last unit
            raise ResourceError("the disk is gone")
        put(self, path, *arguments, **options)

    monkeypatch.setattr(LocalObjects, "put", failing)
    with pytest.raises(ResourceError, match="the disk is gone"):
        copy(tmp_path / "s", tmp_path / "c", workers=1)
    assert open_store(tmp_path / "c").committed.missing_views() == {2: [0, 1]}
    monkeypatch.setattr(LocalObjects, "put", put)

    report = copy(tmp_path / "s", tmp_path / "c")

    assert report.copied == 1
    assert everything(open_store(tmp_path / "c")) == everything(open_store(tmp_path / "s"))
    assert copy(tmp_path / "s", tmp_path / "c").copied == 0


def test_copy_interrupted_before_its_root_is_no_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_store(tmp_path / "s")
    put = LocalObjects.put

    def failing(self: LocalObjects, path: str, *arguments, **options) -> None:
        if path == "zarr.json":
            raise ResourceError("the disk is gone")
        put(self, path, *arguments, **options)

    monkeypatch.setattr(LocalObjects, "put", failing)
    with pytest.raises(ResourceError, match="the disk is gone"):
        copy(tmp_path / "s", tmp_path / "c")
    assert main(["info", str(tmp_path / "c")]) == 2
    monkeypatch.setattr(LocalObjects, "put", put)
    copy(tmp_path / "s", tmp_path / "c")
    assert everything(open_store(tmp_path / "c")) == everything(open_store(tmp_path / "s"))


def test_copy_of_a_damaged_object_is_refused_before_its_record(tmp_path: Path) -> None:
    store = tiny_store(tmp_path / "s")
    shard = store.path / next(path for path in open_objects(tmp_path / "s").list("taps/stage4/c/0/1/"))
    content = bytearray(shard.read_bytes())
    content[3] ^= 1
    shard.write_bytes(content)

    with pytest.raises(CorruptStoreError, match="objects of unit 1 in .* are damaged, the first, taps/stage4"):
        copy(tmp_path / "s", tmp_path / "c", workers=1)

    assert open_store(tmp_path / "c").committed.units in ([0], [0, 2])


def test_copy_follows_a_source_that_has_grown(tmp_path: Path) -> None:
    tiny_store(tmp_path / "s", tiny_manifest(views=1))
    copy(tmp_path / "s", tmp_path / "c")
    manifest = tiny_manifest(views=2)
    grown = open_store(tmp_path / "s").grow(manifest)
    for unit in range(3):
        data = unit_data(manifest, unit)
        whole = unit_data(tiny_manifest(views=1), unit)
        grown.write_unit(unit, 1, type(data)(**{**vars(data), "labels": whole.labels, "params": data.params[1:],
            "pixel_crc": data.pixel_crc[1:], "features": {
                name: {suffix: values[1:] for suffix, values in parts.items()} for name, parts in data.features.items()
            }}))  # fmt: skip

    report = copy(tmp_path / "s", tmp_path / "c")

    assert (report.records, report.copied) == (6, 3)
    assert everything(open_store(tmp_path / "c")) == everything(open_store(tmp_path / "s"))


def test_copy_refuses_another_store_in_its_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_store(tmp_path / "s")
    tiny_store(tmp_path / "other", tiny_manifest(seed=9))
    with pytest.raises(MismatchError, match="seed differs"):
        copy(tmp_path / "s", tmp_path / "other")
    assert main(["copy", str(tmp_path / "s"), str(tmp_path / "s")]) == 2
    assert "is the store itself" in capsys.readouterr().err
    assert main(["copy", str(tmp_path / "s"), str(tmp_path / "c"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["copied"] == 3
