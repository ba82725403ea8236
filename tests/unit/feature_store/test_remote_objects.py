"""Buckets and web servers, against servers on loopback."""

import os
import signal
import time

import pytest
from object_store_conformance import CONTENT, ObjectStoreConformance
from servers import WebServer, s3_server
from tiny_store import BLOCKS, everything, tiny_manifest, tiny_store, unit_data

from feature_store import Store, open_store
from feature_store.backends.bucket import RemoteObjects
from feature_store.backends.local import LocalObjects
from feature_store.errors import CorruptStoreError, InputError, ResourceError


@pytest.fixture(scope="module")
def new_bucket():
    with s3_server() as new_bucket:
        yield new_bucket


@pytest.fixture
def bucket(new_bucket):
    return new_bucket() + "/some/store"


@pytest.fixture
def web(tmp_path):
    with WebServer(tmp_path / "web") as web:
        yield web


class TestBucket(ObjectStoreConformance):
    @pytest.fixture
    def objects(self, bucket):
        return RemoteObjects(bucket)


def test_a_store_in_a_bucket_is_the_same_store_as_on_disk(bucket, tmp_path):
    local = tiny_store(tmp_path / "local")
    remote = Store.create(bucket, tiny_manifest(), BLOCKS)
    for unit in range(3):
        remote.write_unit(unit, 0, unit_data(remote.manifest, unit))
    assert everything(open_store(bucket)) == everything(local)
    with pytest.raises(InputError, match="not a local directory"):
        _ = remote.path


def test_a_bucket_keeps_the_objects_of_an_uncommitted_writer_when_another_one_has_other_bytes(bucket):
    store = Store.create(bucket, tiny_manifest(), BLOCKS)
    late = open_store(bucket)
    data = unit_data(store.manifest, 0)
    store.write_unit(0, 0, data)
    before = everything(store)
    store.objects.delete("commits/u00000-v0-1.json")  # as if the first writer were not done yet
    data.features["stage4"][""][0, 0, 0, 0] += 1
    with pytest.raises(
        ResourceError, match=r"exists with other bytes: another process is writing unit 0 \(tar-0.tar\)"
    ):
        late.write_unit(0, 0, data)
    late.write_unit(0, 0, unit_data(store.manifest, 0))
    assert everything(open_store(bucket)) == before


def copy_to(folder, local):
    objects = LocalObjects(folder)
    for path in local.objects.list():
        objects.put(path, local.objects.get(path))


def test_of_two_that_make_a_store_in_a_bucket_one_is_refused(bucket, monkeypatch):
    """Nothing locks machines out of each other: the root decides."""
    put, first = RemoteObjects.put, []

    def put_second(self, path, payload, *, new=False):
        if path == "zarr.json" and not first:
            first.append("another machine is faster")
            tiny_store(f"{bucket}/s")
        put(self, path, payload, new=new)

    monkeypatch.setattr(RemoteObjects, "put", put_second)

    with pytest.raises(InputError, match=f"another process made {bucket}/s meanwhile; .*same command again"):
        Store.create(f"{bucket}/s", tiny_manifest(seed=99), BLOCKS)

    assert open_store(f"{bucket}/s").committed.units == [0, 1, 2]


def test_a_store_behind_a_web_server_reads_through_its_commit_index(web, tmp_path):
    local = tiny_store(tmp_path / "local", quarantined={1: "broken"})
    copy_to(web.folder, local)
    with pytest.raises(InputError, match=r"cannot be listed and has no commit index"):
        open_store(web.url)
    local.write_commit_index()
    copy_to(web.folder, local)
    store = open_store(web.url)
    assert everything(store) == everything(local)
    assert store.quarantined(0) == {1: "broken"}
    with pytest.raises(InputError, match="a web server is read only"):
        store.objects.put("x", b"")


def test_rows_side_by_side_come_in_one_request(web, tmp_path):
    local = tiny_store(tmp_path / "local")
    local.write_commit_index()
    copy_to(web.folder, local)
    source = open_store(web.url).source()
    source.read(source.unit_rows(0, 0))
    web.requests.clear()
    source.read(source.unit_rows(0, 0)[::-2])  # with gaps, in any order
    assert sorted(path.split("/")[1] for _, path, _ in web.requests) == ["logits", "taps"]


def test_reads_are_tried_again_when_the_server_fails_for_a_moment(web):
    LocalObjects(web.folder).put("a", CONTENT)
    web.failures = 2
    assert RemoteObjects(web.url).get("a").tobytes() == CONTENT
    assert len(web.requests) == 3


def test_a_refusal_is_a_resource_error_that_names_the_object(web):
    with pytest.raises(
        ResourceError, match=r"http://127.0.0.1:\d+/forbidden: access denied \(403 Forbidden\); .*check the URL"
    ):
        RemoteObjects(web.url).get("forbidden")


def test_the_token_is_sent_to_the_services_store_only(web, tmp_path, monkeypatch):
    monkeypatch.setenv("FEATURE_STORE_TOKEN", "skc_1\n")  # as files of mounted secrets end
    with WebServer(tmp_path / "other") as other:
        for place in ("v1/zarr", "public"):
            LocalObjects(web.folder / place).put("a", CONTENT)
            LocalObjects(other.folder / place).put("a", CONTENT)
        assert RemoteObjects(f"{web.url}/v1/zarr").get("a").tobytes() == CONTENT
        assert RemoteObjects(f"{web.url}/public").get("a").tobytes() == CONTENT
        assert web.authorizations == ["Bearer skc_1", None]
        web.redirect = other.url
        assert RemoteObjects(f"{web.url}/v1/zarr/").get("a").tobytes() == CONTENT
        assert (web.authorizations[2:], other.authorizations) == (["Bearer skc_1"], [None])


def test_a_web_server_without_a_store_names_a_services_url(web):
    with pytest.raises(
        InputError, match=f"{web.url} is not a store .*; for a service open {web.url}/v1/zarr$"
    ) as error:
        open_store(web.url)
    assert error.value.remedy is not None
    with pytest.raises(
        ResourceError, match="a service's store ends with /v1/zarr and needs a token in FEATURE_STORE_TOK"
    ):
        open_store(f"{web.url}/forbidden")
    with pytest.raises(InputError, match=r"/v1/zarr is not a store \(no zarr.json\); check the URL$"):
        open_store(f"{web.url}/v1/zarr")


def test_a_missing_committed_object_is_damage_on_the_web_too(web, tmp_path):
    local = tiny_store(tmp_path / "local")
    local.write_commit_index()
    copy_to(web.folder, local)
    (web.folder / "taps/stage4/c/0/0/0/0").unlink()
    with pytest.raises(CorruptStoreError, match=r"taps/stage4/c/0/0/0/0 is damaged: it is committed but missing"):
        everything(open_store(web.url))


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_a_process_forked_after_use_is_refused_instead_of_hanging(web):
    LocalObjects(web.folder).put("a", CONTENT)
    objects = RemoteObjects(web.url)
    objects.get("a")
    pid = os.fork()
    if pid == 0:
        try:
            objects.get("a")
        except ResourceError as error:
            os._exit(7 if 'multiprocessing_context="forkserver"' in str(error) else 8)
        os._exit(9)
    deadline = time.monotonic() + 20
    while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    if ended == (0, 0):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert ended != (0, 0), "the child hangs"
    assert os.waitstatus_to_exitcode(ended[1]) == 7


def test_damage_behind_a_web_server_is_refused(web, tmp_path):
    local = tiny_store(tmp_path / "local")
    local.write_commit_index()
    copy_to(web.folder, local)
    file = web.folder / "taps/stage4/c/0/0/0/0"
    content = bytearray(file.read_bytes())
    content[3] ^= 1
    file.write_bytes(content)
    with pytest.raises(CorruptStoreError, match="crc32c of position 0 does not match"):
        everything(open_store(web.url))
