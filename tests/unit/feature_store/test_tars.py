"""Tar: webdataset's samples in webdataset's order, random access from anywhere, every damage named."""

import errno
import io
import os
import pickle
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tar_files import samples, tar_bytes, write
from webdataset.tariterators import group_by_keys, tar_file_expander

from feature_store.errors import ImageError, InputError, ResourceError
from feature_store.inputs.tar import Tar
from feature_store.inputs.tar_index import IMAGE_EXTENSIONS

TEN = list(samples(10))


@pytest.fixture
def ten(tmp_path):
    with Tar.open(write(tmp_path / "train-000.tar", tar_bytes(TEN))) as tar:
        yield tar


def open_tar(tmp_path, members):
    return Tar.open(write(tmp_path / "a.tar", tar_bytes(members)))


def refusal(tmp_path, data):
    url = write(tmp_path / "broken.tar", data)
    with pytest.raises(InputError) as caught:
        Tar.open(url)
    assert url in str(caught.value)
    assert not isinstance(caught.value, ImageError)
    return str(caught.value)


# --- reading -----------------------------------------------------------------------------------------------


def test_tar_gives_every_sample_when_read_in_any_order(ten):
    assert (len(ten), ten.name) == (10, "train-000.tar")
    assert ten.keys == tuple(f"n01/{i:04}" for i in range(10))
    for i in (9, 0, 5, 5, 3):
        assert ten.read(i) == (f"n01/{i:04}", bytes([i]) * (700 + i), i * 7)


def test_tars_take_few_open_files_when_there_are_more_than_a_process_may_open(tmp_path):
    tars = [Tar.open(write(tmp_path / f"{i:03}.tar", tar_bytes(TEN))) for i in range(200)]
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(2):
        assert {tar.read(3).label for tar in tars} == {21}
    assert len(list(Path("/proc/self/fd").iterdir())) - before <= 64


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves its file open
def test_tar_equals_webdataset_when_both_read_the_same_file(ten):
    theirs = [(s["__key__"], s["jpg"], int(s["cls"])) for s in webdataset.WebDataset(ten.url, shardshuffle=False)]
    assert [tuple(ten.read(i)) for i in range(len(ten))] == theirs


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_reads_names_when_format_differs(tmp_path, format):
    names = ["a" * 80, "b/" * 60 + "c", "é" * 20]
    members = [(f"{name}.{ext}", b"1") for name in names for ext in ("jpg", "cls")]
    with Tar.open(write(tmp_path / "a.tar", tar_bytes(members, format))) as tar:
        assert list(tar.keys) == names
        assert [tar.read(i).image for i in range(3)] == [b"1"] * 3


@pytest.mark.parametrize("extension", [*sorted(IMAGE_EXTENSIONS), "JPG", "JpEg"])
def test_tar_finds_image_when_extension_is_known(tmp_path, extension):
    tar = open_tar(tmp_path, [("a.json", b"{}"), (f"a.{extension}", b"pixels"), ("a.CLS", b" 12\n")])
    assert tar.read(0) == ("a", b"pixels", 12)


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("a.cls", b"1")], "no image: members are cls, expected one of bmp, gif"),
        ([("a.seg.png", b"x"), ("a.cls", b"1")], "no image: members are seg.png, cls"),
        ([("a.jpg", b"x"), ("a.png", b"x"), ("a.cls", b"1")], "2 images (jpg, png), expected one"),
        ([("a.jpg", b"x")], "no label: members are jpg, expected one cls"),
        ([("a.jpg", b"x"), ("a.cls", b"")], "label is b'', expected a class index"),
        ([("a.jpg", b"x"), ("a.cls", b"-1")], "label is b'-1', expected"),
        ([("a.jpg", b"x"), ("a.cls", b"cat")], "label is b'cat', expected"),
        ([("a.jpg", b"x"), ("a.cls", b"1.5")], "label is b'1.5', expected"),
        ([("a.jpg", b"x"), ("a.cls", "٣".encode())], "expected a class index in decimal digits"),
        ([("a.jpg", b"x"), ("a.cls", b"9" * 19)], "expected a class index in decimal digits"),
        ([("a.jpg", b"x"), ("a.cls", b"1" * 65)], "label has 65 bytes, expected a class index"),
    ],
)
def test_tar_raises_image_error_but_keeps_position_when_sample_is_unusable(tmp_path, members, reason):
    tar = open_tar(tmp_path, [("0.jpg", b"first"), ("0.cls", b"3"), *members, ("z.jpg", b"last"), ("z.cls", b"4")])
    assert tar.keys == ("0", "a", "z")
    with pytest.raises(ImageError) as caught:
        tar.read(1)
    assert reason in str(caught.value)
    assert tar.read(0) == ("0", b"first", 3)
    assert tar.read(2) == ("z", b"last", 4)


def test_tar_treats_names_as_keys_only_when_they_point_outside(tmp_path):
    before = sorted(path.name for path in tmp_path.parent.iterdir())
    members = [("../../evil.jpg", b"x"), ("../../evil.cls", b"1"), ("/etc/passwd.jpg", b"y"), ("/etc/passwd.cls", b"2")]
    tar = open_tar(tmp_path, members)
    assert tar.keys == ("../../evil", "/etc/passwd")
    assert [tar.read(i).image for i in range(2)] == [b"x", b"y"]
    assert sorted(path.name for path in tmp_path.parent.iterdir()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def test_tar_ignores_members_when_they_are_not_regular_files(tmp_path):
    special = []
    for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
        info = tarfile.TarInfo("b.jpg")
        info.type, info.linkname = kind, "/etc/passwd"
        special.append((info, b""))
    with open_tar(tmp_path, [*special, ("a.jpg", b"x"), *special, ("a.cls", b"1")]) as tar:
        assert tar.keys == ("a",)
        assert tar.header_sha256 == open_tar(tmp_path, [("a.jpg", b"x"), ("a.cls", b"1")]).header_sha256


def test_header_hash_follows_names_sizes_and_order_when_they_change(tmp_path):
    base = [("a.jpg", b"xx"), ("a.cls", b"1"), ("b.jpg", b"x"), ("b.cls", b"1")]
    same = [("a.jpg", b"yy"), *base[1:]]
    others = [
        [("a.jpg", b"x"), *base[1:]],
        [("a.png", b"xx"), *base[1:]],
        [*base[2:], *base[:2]],
        base[:2],
        [*base, ("__meta__", b"")],
    ]
    hashes = [open_tar(tmp_path, members).header_sha256 for members in (base, same, *others)]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == len(hashes) - 1


@pytest.mark.parametrize("position", [-1, 10])
def test_tar_refuses_when_position_is_out_of_range(ten, position):
    with pytest.raises(InputError, match=f"no position {position}, expected 0 to 9"):
        ten.read(position)


# --- sharing -----------------------------------------------------------------------------------------------


def test_tar_holds_no_file_when_indexed_pickled_closed_or_deleted(ten):
    def is_open():
        return Path(ten_url) in {link.readlink() for link in Path("/proc/self/fd").iterdir() if link.exists()}

    ten_url = ten.url
    assert not is_open()
    ten.read(0)
    assert is_open()
    copy = pickle.loads(pickle.dumps(ten))  # noqa: S301 - made here
    ten.close()
    ten.close()
    assert not is_open()
    assert copy.read(4) == ten.read(4)
    assert (copy.keys, copy.header_sha256, copy.url) == (ten.keys, ten.header_sha256, ten.url)
    ten.close()
    del copy
    assert not is_open()


def test_tar_keeps_one_file_when_threads_open_it_at_once(ten, monkeypatch):
    together, opened, open_file = threading.Barrier(4), [], os.open

    def open_together(*arguments):
        together.wait()
        opened.append(open_file(*arguments))
        return opened[-1]

    monkeypatch.setattr(os, "open", open_together)
    with ThreadPoolExecutor(4) as threads:
        assert [sample.label for sample in threads.map(ten.read, range(4))] == [0, 7, 14, 21]
    still_open = [link for link in Path("/proc/self/fd").iterdir() if int(link.name) in opened and link.exists()]
    assert [link.readlink() for link in still_open] == [Path(ten.url)]


def test_tar_gives_right_bytes_when_shared_by_threads_and_a_fork(ten):
    start = threading.Barrier(4)

    def read_all(_):
        start.wait()  # so that they open the file at once
        return [ten.read(i).label for i in range(10)] * 20

    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(read_all, range(4)))
    expected = [i * 7 for i in range(10)] * 20
    assert results == [expected] * 4
    child = os.fork()
    if child == 0:  # reads and closes what it inherited, without touching the parent's file
        good = [ten.read(i).label for i in range(10)] * 20 == expected
        ten.close()
        os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert ten.read(3).label == 21


# --- refusals ----------------------------------------------------------------------------------------------


def test_open_refuses_when_key_comes_twice(tmp_path):
    twice = [("a.jpg", b"x"), ("a.cls", b"1"), ("b.jpg", b"x"), ("b.cls", b"1"), ("a.png", b"x")]
    assert "2 samples with key 'a', expected one" in refusal(tmp_path, tar_bytes(twice))


def test_open_refuses_when_member_comes_twice(tmp_path):
    message = refusal(tmp_path, tar_bytes([("a.jpg", b"x"), ("a.cls", b"1"), ("a.JPG", b"x")]))
    assert "a member twice: a.JPG: duplicate file name" in message


@pytest.mark.parametrize(("start", "whole"), [(0, 0), (3, 3)])
def test_open_says_how_many_are_whole_when_tar_is_cut_anywhere(tmp_path, start, whole):
    """One sample is jpg header 512, data 1024; cls header 512, data 512. Cut within each of them."""
    data = tar_bytes(TEN)
    sample = 512 + 1024 + 512 + 512
    cuts = {300: 0, 512: 0, 900: 0, 1535: 0, 1700: 0, 2048: 0, 2050: 1, 2300: 1}
    for cut, extra in cuts.items():
        if start == 0 and cut == 300:
            assert "is not a tar: it is cut short (300 bytes)" in refusal(tmp_path, data[:cut])
            continue
        message = refusal(tmp_path, data[: start * sample + cut])
        assert "is cut short" in message, cut
        assert f"{whole + extra} whole samples come before; fetch or make the tar again" in message, cut


def test_open_accepts_when_only_the_end_marker_is_missing(tmp_path):
    data = tar_bytes(TEN).rstrip(b"\0")
    members_end = -(-len(data) // 512) * 512
    for end in (members_end, members_end + 512, members_end + 700):
        tar = Tar.open(write(tmp_path / f"{end}.tar", data.ljust(members_end, b"\0") + bytes(end - members_end)))
        assert len(tar) == 10
        assert tar.read(9).label == 63


def test_open_refuses_when_a_header_in_the_middle_is_damaged(tmp_path):
    data = bytearray(tar_bytes(TEN))
    data[3 * 2560 + 5] ^= 255  # in the fourth sample's name: the header's checksum no longer fits
    message = refusal(tmp_path, bytes(data))
    assert "damaged in the header at byte 7680; 3 whole samples come before" in message


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is not a tar: it is empty (0 bytes)"),
        (b"\x89PNG" * 300, "is not a tar: it is something else (first bytes 89 50"),
        (b"PK\x03\x04" + bytes(2000), "is not a tar: it is a zip archive; unpack it"),
        (b"\x28\xb5\x2f\xfd" + bytes(2000), "it is compressed with zstd; decompress it with `zstd -d FILE`"),
        (b"\x04\x22\x4d\x18" + bytes(2000), "it is compressed with lz4"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a Git LFS pointer, not the file itself"),
        (b"<!DOCTYPE html>\n<title>Sign in</title>" * 50, "it is a web page or XML ('<!DOCTYPE html>\\n"),
        (b"a-000.tar\na-001.tar\n" * 50, "a list of tars is given as @FILE"),
        (tar_bytes([]), "holds no samples (0 files)"),
        (bytes(10240), "holds no samples (0 files)"),
        (
            tar_bytes([("README", b"x"), ("__index__", b"x"), (".hidden", b"x")]),
            "holds no samples (3 files); 1 hidden files are skipped ('.hidden'); "
            "1 files without an extension belong to no sample ('README')",
        ),
    ],
)
def test_open_refuses_when_there_is_nothing_to_read(tmp_path, data, reason):
    assert reason in refusal(tmp_path, data)


def test_open_refuses_when_member_is_sparse(tmp_path):
    info = tarfile.TarInfo("a.jpg")
    info.pax_headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": "9", "GNU.sparse.name": "a.jpg"}
    assert "'a.jpg' as a sparse file" in refusal(tmp_path, tar_bytes([(info, b"x"), ("a.cls", b"1")]))


def test_open_refuses_when_name_is_not_utf8(tmp_path):
    data = tar_bytes([("\udcff.jpg", b"x"), ("\udcff.cls", b"1")], tarfile.GNU_FORMAT)
    assert "a name that is not UTF-8" in refusal(tmp_path, data)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("missing.tar", r"is not there: .*; correct the path"),
        ("a.tar/inside.tar", r"is not there: .*; correct the path"),
        ("folder", r"is a folder; name the tars in it: .*/folder/\*.tar"),
        ("fifo", r"is not a regular file; write a program's output as pipe:COMMAND"),
    ],
)
def test_open_refuses_when_path_is_no_file(tmp_path, place, message):
    write(tmp_path / "a.tar", tar_bytes(TEN))
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(InputError, match=message):
        Tar.open(str(tmp_path / place))


def test_open_raises_resource_error_when_file_may_not_be_read(tmp_path, monkeypatch):
    url = write(tmp_path / "a.tar", tar_bytes(TEN))

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ResourceError, match="Permission denied; check permissions"):
        Tar.open(url)


def test_read_raises_resource_error_when_the_disk_fails(ten, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(ResourceError, match=r"train-000.tar cannot be read: .*Input/output error"):
        ten.read(0)


def test_read_refuses_when_the_file_changed_since_it_was_indexed(ten):
    ten.read(0)
    Path(ten.url).write_bytes(tar_bytes(TEN)[:3000])
    with pytest.raises(InputError, match="was cut short while in use"):
        ten.read(5)
    ten.close()
    with pytest.raises(InputError, match=r"changed while in use: \d+ bytes when it was indexed, 3000 now"):
        ten.read(0)


# --- any layout, against webdataset itself -------------------------------------------------------------------

NAMES = st.builds(
    "".join,
    st.tuples(
        st.sampled_from(["", "d/", "./", "d.e/", "__m__/", "../"]),
        st.sampled_from(["a", "b", "__m__", "", "__", "x y", "é"]),
        st.sampled_from([".jpg", ".JPG", ".cls", ".seg.png", "", ".txt", ".", ".jpg__"]),
    ),
)


@given(names=st.lists(NAMES.filter(bool), max_size=8))
@settings(max_examples=300, deadline=None)
def test_tar_groups_as_webdataset_when_members_have_any_names(names, tmp_path_factory):
    data = tar_bytes([(name, f"{i}".encode()) for i, name in enumerate(names)])
    shown = tar_bytes(
        [(name, f"{i}".encode()) for i, name in enumerate(names) if not name.rpartition("/")[2].startswith(".")]
    )  # webdataset makes a sample d/ of d/.jpg
    url = write(tmp_path_factory.getbasetemp() / "any.tar", data)
    try:
        theirs = list(group_by_keys(tar_file_expander([{"url": url, "stream": io.BytesIO(shown)}])))
    except ValueError:
        theirs = []  # a member twice
    keys = [sample["__key__"] for sample in theirs]
    if not keys or len(set(keys)) < len(keys):
        with pytest.raises(InputError):
            Tar.open(url)
        return
    with Tar.open(url) as tar:
        assert list(tar.keys) == keys
        for position, sample in enumerate(theirs):
            if {"jpg", "cls"} <= sample.keys():
                assert tuple(tar.read(position)) == (sample["__key__"], sample["jpg"], int(sample["cls"]))


# --- nothing is left out in silence ---------------------------------------------------------------------------

KINDS = st.sampled_from(["sample", "swapped", "unlabelled", "word", "hidden", "mac", "keyless", "link", "folder"])


def members_of(kind, number):
    """Members of one thing a tar may hold, with names of its own; and the keys of good samples among them."""
    key = f"d.1/k{number:03}"
    image, label = (f"{key}.jpg", f"image {number}".encode()), (f"{key}.cls", f"{number}".encode())
    special = tarfile.TarInfo(f"{key}.png")
    special.type, special.linkname = (tarfile.DIRTYPE if kind == "folder" else tarfile.LNKTYPE), "d.1/other.png"
    return {
        "sample": ([image, label], [key]),
        "swapped": ([label, image], [key]),
        "unlabelled": ([image], []),
        "word": ([image, (label[0], b"cat")], []),
        "hidden": ([(f"d.1/.DS_Store{number}", b"x")], []),
        "mac": ([(f"d.1/._k{number:03}.jpg", b"x"), image, (f"d.1/._k{number:03}.cls", b"x"), label], [key]),
        "keyless": ([(f"d.1/README{number}", b"x")], []),
        "link": ([(special, b"")], []),
        "folder": ([(special, b"")], []),
    }[kind]


@given(
    parts=st.lists(st.tuples(st.lists(KINDS, max_size=5), st.integers(0, 3)), min_size=1, max_size=3),
    cut=st.none() | st.floats(0, 1),
    tail=st.sampled_from([b"", b"", b"\0" * 700, b"garbage", b"\0" * 1024 + b"x" * 600]),
)
@settings(max_examples=300, deadline=None)
def test_tar_makes_every_labelled_image_a_row_or_is_refused_when_put_together_at_random(
    parts, cut, tail, tmp_path_factory
):
    numbered = iter(range(1000))
    made = [[(kind, *members_of(kind, next(numbered))) for kind in kinds] for kinds, _ in parts]
    archives = [tar_bytes([member for _, members, _ in each for member in members]) for each in made]
    data = b"".join(archive + bytes(512 * padding) for archive, (_, padding) in zip(archives, parts, strict=True))
    data += tail
    if cut is not None:
        data = data[: round(cut * len(data))]
    expected = [key for each in made for _, _, keys in each for key in keys]
    kinds = [kind for each in made for kind, _, _ in each]
    url = write(tmp_path_factory.getbasetemp() / "put-together.tar", data)
    rows = [kind for kind in kinds if kind in ("sample", "swapped", "unlabelled", "word", "mac")]
    if cut is None and (not rows or tail.strip(b"\0")):
        with pytest.raises(InputError, match="holds no samples|behind its end mark"):
            Tar.open(url)
        return
    try:
        tar = Tar.open(url)
    except InputError:
        if cut is None:
            raise
        return
    with tar:
        good = {key: i for i, key in enumerate(tar.keys) if i not in tar.problems and not key.endswith("word")}
        found = [key for key in expected if key in good]
        for key in found:
            assert tar.read(good[key]) == (key, f"image {int(key[-3:])}".encode(), int(key[-3:]))
        if cut is None:
            assert found == expected
            assert any("hidden" in note for note in tar.notes) == bool({"hidden", "mac"} & set(kinds))
            assert any("without an extension" in note for note in tar.notes) == ("keyless" in kinds)
            assert any("links" in note for note in tar.notes) == ("link" in kinds)
            assert any("one after another" in note for note in tar.notes) == any(later for later, _ in parts[1:])
        else:
            assert found == expected[: len(found)]


def test_tar_reads_on_when_two_were_put_together(tmp_path):
    (first, second) = (tar_bytes(list(samples(8))[start : start + 8]) for start in (0, 8))
    tar = Tar.open(write(tmp_path / "ab.tar", first + bytes(1 << 20) + second))
    assert [tar.read(i).label for i in range(8)] == [7 * i for i in range(8)]
    assert "2 tars one after another" in tar.notes[0]


@pytest.mark.parametrize("padding", [0, 512, 10240, 1 << 20, 700])
def test_tar_has_no_note_when_zeros_follow_its_end_mark(tmp_path, padding):
    assert Tar.open(write(tmp_path / "a.tar", tar_bytes(TEN) + bytes(padding))).notes == ()


def test_open_names_the_bytes_when_something_else_follows_the_end_mark(tmp_path):
    data = tar_bytes(TEN)
    message = refusal(tmp_path, data + b"no zeros")
    assert f"has 8 bytes behind its end mark, from byte {len(data)} on, that are no tar: cut them off" in message
    assert "behind its end mark" in refusal(tmp_path, data[:1536] + bytes(512) + data[2048:])  # a hole of zeros


@pytest.mark.parametrize(
    "name",
    [".DS_Store", "train/.DS_Store", "._a.jpg", "train/._a.jpg", ".nfs0001", "__MACOSX/a.jpg", "d/__MACOSX/d/a.jpg",
     "d/Thumbs.db", "desktop.ini", "d/.ipynb_checkpoints/a.jpg", "@eaDir/a.jpg"],
)  # fmt: skip
def test_tar_skips_and_names_what_systems_leave_in_folders(tmp_path, name):
    tar = open_tar(tmp_path, [(name, b"x"), ("b.jpg", b"y"), ("b.cls", b"1")])
    assert tar.keys == ("b",)
    assert tar.notes == (f"{tar.url}: 1 hidden files are skipped ({name!r})",)


def test_tar_keeps_samples_when_only_their_folder_is_hidden(tmp_path):
    assert open_tar(tmp_path, [("./.data/b.jpg", b"y"), ("./.data/b.cls", b"1")]).keys == ("./.data/b",)


def test_tar_says_it_may_be_cut_short_when_the_end_mark_is_missing(tmp_path):
    tar = Tar.open(write(tmp_path / "a.tar", tar_bytes(TEN)[: 10 * 2560]))
    assert (len(tar), tar.notes) == (
        10,
        (f"{tar.url}: it has no end mark, so it may be cut short; all its members are whole",),
    )


def test_tar_is_arranged_by_keys_when_a_store_gave_a_hidden_file_a_place(tmp_path):
    tar = open_tar(tmp_path, [("d/.x", b"x"), ("d/a.jpg", b"a"), ("d/a.cls", b"1"), ("d/b.jpg", b"b")])
    arranged = tar.arranged(["d/", "d/a", "d/b"])
    assert arranged.read(1) == ("d/a", b"a", 1)
    assert sorted(arranged.problems) == [0, 2]
    with pytest.raises(ImageError, match="no sample"):
        arranged.read(0)


def test_sample_says_how_to_name_files_when_their_names_have_more_dots(tmp_path):
    tar = open_tar(tmp_path, [("v1.0.jpg", b"x"), ("v1.0.cls", b"1"), ("v1.1.jpg", b"x"), ("v1.1.cls", b"1")])
    with pytest.raises(ImageError, match=r"members are 0.jpg, 0.cls, .*a key ends at the first dot"):
        tar.read(0)
