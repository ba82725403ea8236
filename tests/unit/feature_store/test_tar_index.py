"""Kept indexes of tars: used while a tar is unchanged, never trusted when anything is odd, made by all cores."""

import gzip
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tar_files import samples, tar_bytes, write
from tiny_jobs import encode_image, noise

from feature_store.errors import InputError
from feature_store.format.checksums import crc32c
from feature_store.inputs import index_cache, indexing
from feature_store.inputs.tar import Tar, open_tars
from feature_store.inputs.tar_index import Keys

ODD = [*samples(5), ("n01/b.jpg", b"x"), ("README", b"x"), ("n01/.DS_Store", b"x")]


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv(index_cache.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache" / f"tar-index-{os.geteuid()}"


@pytest.fixture
def read_files(monkeypatch) -> list[str]:
    """Names of files whose headers are read: tars are opened for that by Path.open."""
    names, open_path = list[str](), Path.open
    monkeypatch.setattr(
        Path, "open", lambda path, *more, **opts: names.append(path.name) or open_path(path, *more, **opts)
    )
    return names


@pytest.fixture
def many_processes(monkeypatch) -> None:
    """Worker processes from the first tar on; this process indexes none."""

    def refuse(*_):
        raise AssertionError("indexed in this process")

    monkeypatch.setattr(indexing, "HEAD_START_SECONDS", 0)
    monkeypatch.setattr(indexing, "usable_cpus", lambda: 2)
    monkeypatch.setattr(indexing, "index_tar", refuse)


def settled(path: Path, members=ODD) -> str:
    """A tar that is old enough for its index to be kept."""
    url = write(path, tar_bytes(members))
    time.sleep(0.03)
    return url


def contents(tar: Tar):
    good = [position for position in range(len(tar)) if position not in tar.problems]
    return tar.url, tar.keys, tar.header_sha256, tar.notes, tar.problems, [tar.read(position) for position in good]


def index_file(cache_folder: Path) -> Path:
    (file,) = cache_folder.iterdir()
    return file


# --- while nothing changed -------------------------------------------------------------------------------------


def test_second_open_equals_the_first_and_reads_no_header(tmp_path, read_files):
    url = settled(tmp_path / "a.tar")
    first = Tar.open(url)
    assert "a.tar" in read_files
    read_files.clear()
    second = Tar.open(url)
    assert read_files == []
    assert contents(second) == contents(first)
    assert len(second.notes) == 2
    assert list(second.problems) == [5]
    copy = pickle.loads(pickle.dumps(second))  # noqa: S301 - made here
    assert contents(copy) == contents(first)
    assert second.arranged(["n01/0003", "x", "n01/b"]).read(0).label == 21
    assert second.content_sha256() == first.content_sha256()


def test_second_open_reads_no_header_of_a_copy(tmp_path, read_files):
    url = write(tmp_path / "a.tar.gz", gzip.compress(tar_bytes(ODD)))
    opened = []
    for _ in range(3):  # the copy is new when it is made, and its index kept the next time
        read_files.clear()
        opened.append(contents(Tar.open(url, scratch=tmp_path / "scratch")))
        time.sleep(0.03)
    assert set(read_files) == {"a.tar.gz"}
    assert opened[0] == opened[1] == opened[2]


def test_kept_index_is_found_by_another_name_of_the_file(tmp_path, read_files, monkeypatch):
    first = Tar.open(settled(tmp_path / "a.tar"))
    (tmp_path / "link.tar").symlink_to("a.tar")
    monkeypatch.chdir(tmp_path)
    read_files.clear()
    for url in ("a.tar", "./link.tar", f"file://{tmp_path}/a.tar"):
        tar = Tar.open(url)
        assert (tar.keys, tar.url, tar.notes[0].startswith(f"{url}: ")) == (first.keys, url, True)
    assert read_files == []


# --- when the tar changed --------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["size", "mtime", "only change time", "replaced by rename"])
def test_tar_is_indexed_again_when_it_changed(tmp_path, change):
    path = tmp_path / "a.tar"
    url = settled(path, [("a.jpg", b"x"), ("a.cls", b"1")])
    assert Tar.open(url).keys == ("a",)
    before = path.stat()
    data = tar_bytes([("b.jpg", b"x"), ("b.cls", b"1"), *([("c.jpg", bytes(20000))] if change == "size" else [])])
    if change == "replaced by rename":
        write(tmp_path / "new.tar", data)
        (tmp_path / "new.tar").replace(path)
    else:
        path.write_bytes(data)
    if change != "mtime":
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert Tar.open(url).keys[0] == "b"


def test_index_of_a_tar_just_written_is_not_kept(tmp_path, cache_folder, monkeypatch):
    """A file system's clock stands still for some milliseconds: the next change might get the same time."""
    url = settled(tmp_path / "a.tar")
    monkeypatch.setattr(time, "time_ns", lambda: Path(url).stat().st_ctime_ns + 1_000_000)
    Tar.open(url)
    assert list(cache_folder.iterdir()) == []


def test_read_refuses_when_a_replaced_tar_has_the_size_and_times_of_the_indexed_one(tmp_path):
    """As on file systems that give the modification time for the change time."""
    data = tar_bytes([("a.jpg", bytes(100)), ("a.cls", b"1"), ("b.jpg", b"x"), ("b.cls", b"2")])
    earlier = indexing.index_tar("a", Path(write(tmp_path / "earlier.tar", data)))
    url = settled(tmp_path / "a.tar", [("a.jpg", bytes(1000)), ("a.cls", b"1"), ("b.jpg", b"x"), ("b.cls", b"2")])
    index_cache.IndexCache().save(index_cache.TarVersion.of(Path(url)), earlier)
    tar = Tar.open(url)
    for _ in range(2):
        with pytest.raises(InputError, match=r"no member at byte 2048, .*; run `touch` on it and start again"):
            tar.read(0)
    Path(url).touch()
    assert [Tar.open(url).read(i).label for i in range(2)] == [1, 2]


def test_errors_are_the_same_every_time_a_tar_is_opened(tmp_path):
    data = tar_bytes(ODD)
    for name, content in {
        "cut": data[:3000],
        "empty": b"",
        "twice": tar_bytes([*ODD, *ODD]),
        "none": bytes(10240),
    }.items():
        write(tmp_path / f"{name}.tar", content)
        time.sleep(0.03)
        messages = []
        for _ in range(3):
            with pytest.raises(InputError) as caught:
                Tar.open(str(tmp_path / f"{name}.tar"))
            messages.append(str(caught.value))
        assert len(set(messages)) == 1, messages


# --- what is not trusted ---------------------------------------------------------------------------------------


def _with_crc(body: bytes) -> bytes:
    return body + crc32c(body).to_bytes(4, "little")


WRONG = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "foreign": lambda data: b"PK\x03\x04" + bytes(500),
    "flipped": lambda data: data[:-20] + bytes([data[-20] ^ 1]) + data[-19:],
    "longer": lambda data: data + b"x",
    "other format": lambda data: _with_crc(data[:-4].replace(b"tar-index 1", b"tar-index 2")),
    "other code": lambda data: _with_crc(data[:-4].replace(b'"code": "', b'"code": "0')),
    "other tar": lambda data: _with_crc(data[:-4].replace(b"a.tar", b"b.tar")),
    "no JSON": lambda data: _with_crc(data[:20] + b"{\n" + data[22:-4]),
    "lacking field": lambda data: _with_crc(data[:-4].replace(b'"samples"', b'"sampled"')),
    "more samples": lambda data: _with_crc(data[:-4].replace(b'"samples": 6', b'"samples": 60')),
    "no samples": lambda data: _with_crc(data[:-4].replace(b'"samples": 6', b'"samples": 0')),
    "samples in words": lambda data: _with_crc(data[:-4].replace(b'"samples": 6', b'"samples": "6"')),
    "keys cut": lambda data: _with_crc(data[:-5]),
}


@pytest.mark.parametrize("kind", WRONG)
def test_index_is_made_anew_when_its_file_is_wrong(tmp_path, cache_folder, read_files, kind):
    url = settled(tmp_path / "a.tar")
    first, file = contents(Tar.open(url)), index_file(cache_folder)
    good = file.read_bytes()
    file.write_bytes(WRONG[kind](good))
    assert file.read_bytes() != good
    assert contents(Tar.open(url)) == first
    assert file.read_bytes() == good
    read_files.clear()
    assert contents(Tar.open(url)) == first
    assert read_files == []


@given(position=st.integers(0, 10_000), bit=st.integers(0, 7))
@settings(max_examples=200, deadline=None)
def test_index_is_never_used_when_any_bit_is_flipped(position, bit, tmp_path_factory):
    base = tmp_path_factory.getbasetemp()
    path = base / "flipped.tar"
    if not path.exists():
        settled(path)
    version = index_cache.TarVersion.of(path)
    assert version is not None
    data = bytearray(index_cache.encode_index(indexing.index_tar("t", path), version))
    data[position % len(data)] ^= 1 << bit
    with pytest.raises(ValueError, match=r"no index of a tar, or damaged"):
        index_cache.decode_index(bytes(data), version)


@pytest.mark.parametrize("kind", ["link", "FIFO", "folder", "of another user"])
def test_index_is_not_read_when_its_file_is_not_this_users_regular_file(tmp_path, cache_folder, kind):
    url = settled(tmp_path / "a.tar")
    first, file = contents(Tar.open(url)), index_file(cache_folder)
    poisoned = _with_crc(file.read_bytes()[:-4].replace(b"n01/0000", b"n01/evil"))
    file.unlink()
    if kind == "link":
        (tmp_path / "elsewhere").write_bytes(poisoned)
        file.symlink_to(tmp_path / "elsewhere")
    elif kind == "FIFO":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        if os.geteuid() != 0:
            pytest.skip("only root can give a file away")
        file.write_bytes(poisoned)
        os.chown(file, 12345, -1)
    assert contents(Tar.open(url)) == first


@pytest.mark.parametrize("mode", [0o755, 0o710, 0o707])
def test_nothing_is_kept_when_others_may_enter_the_folder(tmp_path, cache_folder, mode):
    url = settled(tmp_path / "a.tar")
    first, file = contents(Tar.open(url)), index_file(cache_folder)
    poisoned = _with_crc(file.read_bytes()[:-4].replace(b"n01/0000", b"n01/evil"))
    file.write_bytes(poisoned)
    cache_folder.chmod(0o700)
    assert Tar.open(url).keys[0] == "n01/evil"  # in a private folder it would be used
    cache_folder.chmod(mode)
    assert contents(Tar.open(url)) == first
    assert file.read_bytes() == poisoned


def test_folder_is_private_whatever_the_umask(tmp_path, cache_folder):
    before = os.umask(0)
    try:
        Tar.open(settled(tmp_path / "a.tar"))
    finally:
        os.umask(before)
    assert cache_folder.stat().st_mode & 0o777 == 0o700


def test_tars_open_when_there_is_no_folder_to_keep_indexes_in(tmp_path, monkeypatch, caplog):
    url = settled(tmp_path / "a.tar")
    first = contents(Tar.open(url))
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    (tmp_path / "cache" / f"tar-index-{os.geteuid()}").rename(tmp_path / "cache/other")
    for place in ("/dev/null", "relative", str(tmp_path / "a.tar")):
        monkeypatch.setenv(index_cache.VARIABLE, place)
        assert contents(Tar.open(url)) == first
    monkeypatch.delenv(index_cache.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert contents(Tar.open(url)) == first
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert contents(Tar.open(url)) == first
    assert [path.name for path in (tmp_path / "xdg/scalekd-cache").iterdir()] == [f"tar-index-{os.geteuid()}"]
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # a user without a home
    assert contents(Tar.open(url)) == first
    assert {path.name for path in tmp_path.iterdir()} - {path.name for path in before} == {"xdg"}
    assert caplog.records == []


def test_tars_open_when_an_index_cannot_be_written(tmp_path, cache_folder, monkeypatch):
    url = settled(tmp_path / "a.tar")

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        first = contents(Tar.open(url))
    assert list(cache_folder.iterdir()) == []
    assert contents(Tar.open(url)) == first


def test_oldest_indexes_are_deleted_when_all_take_too_much(tmp_path, cache_folder, monkeypatch):
    for name in "abc":
        Tar.open(settled(tmp_path / f"{name}.tar"))
    sizes = [file.stat().st_size for file in cache_folder.iterdir()]
    oldest = min(cache_folder.iterdir(), key=lambda file: file.stat().st_mtime_ns)
    monkeypatch.setattr(index_cache, "MOST_BYTES", sum(sizes))
    Tar.open(settled(tmp_path / "d.tar"))
    assert len(list(cache_folder.iterdir())) == 3
    assert not oldest.exists()


# --- all cores -------------------------------------------------------------------------------------------------

PIXELS = encode_image(noise(8, 8))


def many_tars(folder: Path) -> list[str]:
    """Tars of which some take longer to index than those after them."""
    folder.mkdir(exist_ok=True)
    urls = []
    for i in range(12):
        members = [("first.png", PIXELS), ("first.cls", str(i).encode()), *samples(200 if i % 3 == 0 else 2)]
        urls.append(write(folder / f"{i:02}.tar", tar_bytes(members)))
    time.sleep(0.03)
    return urls


def test_tars_keep_their_order_when_processes_index_them(tmp_path, many_processes, cache_folder):
    urls = many_tars(tmp_path / "tars")[::-1]
    tars = open_tars(urls)
    assert [tar.url for tar in tars] == urls
    assert [tar.read(0).label for tar in tars] == [*range(12)][::-1]
    assert len(list(cache_folder.iterdir())) == 12
    assert [contents(tar) for tar in open_tars(urls)] == [contents(tar) for tar in tars]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {3: b"", 1: tar_bytes(ODD)[:3000], 8: b"text"},
            r"01.tar is cut short in the header at byte 2560; 1 whole samples",
        ),
        ({3: None, 4: tar_bytes(ODD)[:3000]}, r"03.tar is not there"),
        ({4: None, 3: tar_bytes([*ODD, *ODD])}, r"03.tar has 2 samples with key 'n01/0000'"),
    ],
)
def test_error_is_that_of_the_first_wrong_tar_when_processes_index_them(tmp_path, many_processes, wrong, message):
    urls = many_tars(tmp_path / "tars")
    for number, data in wrong.items():
        Path(urls[number]).unlink()
        if data is not None:
            write(Path(urls[number]), data)
    with pytest.raises(InputError, match=message):
        open_tars(urls)


@pytest.mark.parametrize("program", ["/bin/false", "/does/not/exist"])
def test_tars_open_when_worker_processes_end_or_cannot_be_started(tmp_path, monkeypatch, program):
    monkeypatch.setattr(indexing, "HEAD_START_SECONDS", 0)
    monkeypatch.setattr(indexing, "usable_cpus", lambda: 2)
    monkeypatch.setattr(sys, "executable", program)
    assert [tar.read(0).label for tar in open_tars(many_tars(tmp_path / "tars"))] == [*range(12)]


def test_user_is_told_when_many_indexes_cannot_be_kept(tmp_path, many_processes, monkeypatch, caplog):
    monkeypatch.setenv(index_cache.VARIABLE, "/dev/null")
    assert len(open_tars(many_tars(tmp_path / "tars"))) == 12
    (record,) = caplog.records
    assert "set SCALEKD_TAR_INDEX to a folder" in record.getMessage()


def test_processes_of_a_job_start_no_others_when_they_leave_no_core_free_and_nothing_is_kept(tmp_path, monkeypatch):
    urls = many_tars(tmp_path / "tars")
    monkeypatch.setattr(indexing, "HEAD_START_SECONDS", 0)
    monkeypatch.setattr(indexing, "usable_cpus", lambda: 8)
    monkeypatch.setenv(index_cache.VARIABLE, "/dev/null")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")

    def refuse(*_, **__):
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
    assert len(open_tars(urls)) == 12


PROGRAM = """
import sys
from feature_store.inputs import indexing
from feature_store.inputs.tar import open_tars
indexing.HEAD_START_SECONDS, indexing.usable_cpus = 0, lambda: 2
print([tar.read(0).label for tar in open_tars(sys.argv[1:])])
"""  # without a __main__ guard


def test_jobs_agree_when_they_begin_at_once_with_no_index(tmp_path, cache_folder):
    urls = many_tars(tmp_path / "tars")
    (tmp_path / "program.py").write_text(PROGRAM)
    path = os.pathsep.join([str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(tmp_path / "program.py"), *urls]
    jobs = [
        subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert [job.communicate(timeout=300)[0] for job in jobs] == [f"{[*range(12)]}\n"] * 3
    assert {file.suffix for file in cache_folder.iterdir()} == {".index"}
    assert len(list(cache_folder.iterdir())) == 12


# --- keys ------------------------------------------------------------------------------------------------------


@given(
    names=st.lists(st.text(st.characters(codec="utf-8")), min_size=1),
    start=st.none() | st.integers(-5, 5),
    stop=st.none() | st.integers(-5, 5),
)
def test_keys_behave_as_a_tuple(names, start, stop):
    keys, expected = Keys.of(names), tuple(names)
    assert keys == expected
    assert keys != (*expected, "x")
    assert keys[start:stop] == expected[start:stop]
    assert [keys[i] for i in range(-len(expected), len(expected))] == [*expected, *expected]
    assert (hash(keys), repr(keys), names[0] in keys, "\0x" in keys) == (
        hash(expected),
        repr(expected),
        True,
        "\0x" in names,
    )
    with pytest.raises(IndexError):
        keys[len(names)]
