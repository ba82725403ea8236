"""Stores on file systems that lack flock (Lustre, NFS), hard links (FUSE, CIFS, exFAT) or fsync of folders (CIFS)."""

import ctypes
import errno
import fcntl
import multiprocessing
import os
import re
import stat
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tiny_store import everything, tiny_store

from feature_store.backends.local import LocalObjects
from feature_store.commits.locks import exclusive, has_locks, is_held, lock_name
from feature_store.errors import ResourceError


@pytest.fixture
def temporary(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("machine")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture(params=[errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP], ids=["ENOSYS", "ENOLCK", "EOPNOTSUPP"])
def without_flock(request, temporary, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", flock_only_below(temporary, request.param))


def flock_only_below(folder, number):
    """Locks as in a machine whose temporary folder has them and whose network file system has none."""
    flock = fcntl.flock

    def refused(file, operation):
        if not Path(f"/proc/self/fd/{file.fileno()}").readlink().is_relative_to(folder):
            raise OSError(number, os.strerror(number))
        return flock(file, operation)

    return refused


def refuse(number):
    def refused(*_, **__):
        raise OSError(number, os.strerror(number))

    return refused


def test_store_is_written_with_one_warning_when_there_are_no_locks(tmp_path, without_flock, caplog):
    store = tiny_store(tmp_path / "store")
    assert everything(store) == everything(tiny_store(tmp_path / "other"))
    assert not has_locks(store.objects)
    assert [record.message.split(" (")[0] for record in caplog.records] == [
        f"the file system of {tmp_path / name / '.locks'} has no file locks" for name in ("store", "other")
    ]
    assert "write there from one machine at a time" in caplog.text
    assert not list((tmp_path / "store/.locks").iterdir())


def test_processes_of_one_machine_exclude_each_other_when_there_are_no_locks(tmp_path, without_flock):
    objects = LocalObjects(tmp_path)
    assert not is_held(objects, 3)
    with exclusive(objects, lock_name(3), "-"):
        assert is_held(objects, 3)
        assert not is_held(objects, 4)
        with pytest.raises(ResourceError, match="unit 3 is busy"), exclusive(objects, lock_name(3), "unit 3 is busy"):
            pass
    assert not is_held(objects, 3)


def hold(folder, temporary, connection):
    tempfile.tempdir = str(temporary)
    fcntl.flock = flock_only_below(temporary, errno.ENOSYS)
    with exclusive(LocalObjects(folder), lock_name(3), "-"):
        connection.send("held")
        connection.recv()


def test_other_processes_are_excluded_until_the_holder_is_killed_when_there_are_no_locks(
    tmp_path, temporary, without_flock
):
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    holder = context.Process(target=hold, args=(tmp_path, temporary, there))
    holder.start()
    assert here.recv() == "held"
    objects = LocalObjects(tmp_path)
    assert is_held(objects, 3)
    with pytest.raises(ResourceError, match="busy"), exclusive(objects, lock_name(3), "busy"):
        pass
    holder.kill()
    holder.join()
    assert not is_held(objects, 3)
    with exclusive(objects, lock_name(3), "busy"):
        pass


def test_lock_raises_when_the_temporary_folder_has_no_locks_either(tmp_path, temporary, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", refuse(errno.ENOLCK))
    message = rf"nor {re.escape(tempfile.gettempdir())} has file locks \({os.strerror(errno.ENOLCK)}\); set TMPDIR"
    with pytest.raises(ResourceError, match=message), exclusive(LocalObjects(tmp_path), "u00000", "-"):
        pass


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_lock_raises_when_the_file_system_fails_otherwise(tmp_path, monkeypatch, number):
    monkeypatch.setattr(fcntl, "flock", refuse(number))
    with pytest.raises(OSError, match=os.strerror(number)), exclusive(LocalObjects(tmp_path), "u00000", "-"):
        pass


@pytest.fixture(params=["rename", "empty file"])
def without_links(request, monkeypatch):
    monkeypatch.setattr(os, "link", refuse(errno.EPERM))
    if request.param == "empty file":
        monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())


def test_store_is_the_same_when_there_are_no_hard_links(tmp_path, monkeypatch, without_links):
    assert everything(tiny_store(tmp_path / "store"))
    assert not list((tmp_path / "store").rglob("*.partial"))


def test_new_object_is_written_once_when_there_are_no_hard_links(tmp_path, without_links):
    objects = LocalObjects(tmp_path)

    def put(number):
        try:
            objects.put("folder/record", b"%d" % number * 1000, new=True)
        except FileExistsError:
            return None
        return number

    with ThreadPoolExecutor(8) as threads:
        (written,) = [number for number in threads.map(put, range(8)) if number is not None]
    assert objects.get("folder/record").tobytes() == b"%d" % written * 1000
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["record"]


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS])
def test_new_object_is_written_whatever_a_file_system_without_links_says(tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "link", refuse(number))
    LocalObjects(tmp_path).put("record", b"whole", new=True)
    assert (tmp_path / "record").read_bytes() == b"whole"


def test_new_object_is_absent_when_its_rename_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", refuse(errno.EPERM))
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())
    monkeypatch.setattr(os, "replace", refuse(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        LocalObjects(tmp_path).put("record", b"whole", new=True)
    assert not list(tmp_path.iterdir())


def test_link_raises_when_the_disk_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", refuse(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        LocalObjects(tmp_path).put("record", b"whole", new=True)
    assert not list(tmp_path.iterdir())


def fsync_of_folders(number):
    fsync = os.fsync

    def refused(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    return refused


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_store_is_written_when_folders_cannot_be_synced(tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "fsync", fsync_of_folders(number))
    assert everything(tiny_store(tmp_path / "store"))


def test_store_is_refused_when_the_sync_of_a_folder_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", fsync_of_folders(errno.EIO))
    with pytest.raises((OSError, ResourceError)):
        tiny_store(tmp_path / "store")
