"""Local objects, and what a URL opens."""

import os

import pytest
from object_store_conformance import ObjectStoreConformance

from feature_store.backends.local import LocalObjects
from feature_store.backends.open import open_objects
from feature_store.errors import InputError


class TestLocalObjects(ObjectStoreConformance):
    @pytest.fixture
    def objects(self, tmp_path):
        return LocalObjects(tmp_path / "store")


class TestLocalObjectsWithFewOpenFiles(ObjectStoreConformance):
    @pytest.fixture
    def objects(self, tmp_path):
        return LocalObjects(tmp_path / "store", open_files=0)


def open_descriptors(folder):
    links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]  # noqa: PTH208
    return sum(os.path.exists(link) and os.readlink(link).startswith(str(folder)) for link in links)  # noqa: PTH110, PTH115


def test_local_objects_keep_at_most_the_stated_number_of_files_open(tmp_path):
    objects = LocalObjects(tmp_path, open_files=3)
    for name in "abcdef":
        objects.put(name, b"x")
        objects.read_into(name, 0, [memoryview(bytearray(1))])
    assert open_descriptors(tmp_path) == 3
    del objects
    assert open_descriptors(tmp_path) == 0


def test_local_put_leaves_nothing_when_it_fails(tmp_path):
    objects = LocalObjects(tmp_path)
    with pytest.raises(TypeError):
        objects.put("a/b", [b"x", "not bytes"])
    (tmp_path / "a/folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        objects.put("a/folder", b"x")
    assert objects.list() == []


def test_open_objects_takes_paths_and_file_urls(tmp_path):
    LocalObjects(tmp_path).put("a", b"x")
    for url in (tmp_path, str(tmp_path), f"file://{tmp_path}"):
        assert open_objects(url).get("a").tobytes() == b"x"


def test_open_objects_refuses_an_unknown_scheme():
    with pytest.raises(InputError, match=r"cannot open ftp://x: expected a local path, file://, s3://"):
        open_objects("ftp://x")


def test_open_objects_names_the_extra_when_obstore_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "obstore", None)
    monkeypatch.setitem(__import__("sys").modules, "obstore.store", None)
    with pytest.raises(InputError, match=r"obstore is not installed; pip install 'scalekd-cache\[s3\]'"):
        open_objects("s3://bucket/store").get("a")
