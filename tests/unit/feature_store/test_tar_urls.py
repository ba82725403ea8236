"""expand_tars and remote or compressed tars: patterns, forbidden commands, copies made once and whole."""

import base64
import bz2
import contextlib
import gzip
import http.server
import lzma
import os
import sys
import threading
from types import SimpleNamespace

import pytest
from servers import s3_server
from tar_files import samples, tar_bytes, write

from feature_store.backends.open import open_objects
from feature_store.errors import InputError, ResourceError
from feature_store.inputs.tar import Tar, expand_tars

DATA = tar_bytes(samples(5))


# --- patterns ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patterns", "urls"),
    [
        (["a.tar"], ["a.tar"]),
        (["t-{08..11}.tar"], ["t-08.tar", "t-09.tar", "t-10.tar", "t-11.tar"]),
        (["{a,b}/{0..1}.tar", "c.tar"], ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar", "c.tar"]),
        (["a.tar::b-{0..1}.tar"], ["a.tar", "b-0.tar", "b-1.tar"]),
        (["http://h/{0..1}.tar", "https://h/a.tar"], ["http://h/0.tar", "http://h/1.tar", "https://h/a.tar"]),
        (["file:///d/a.tar"], ["file:///d/a.tar"]),
        (["./a:1.tar"], ["./a:1.tar"]),
        (["gs://b/a.tar", "S3://b/{0..1}.tar"], ["gs://b/a.tar", "S3://b/0.tar", "S3://b/1.tar"]),
        (["hf://datasets/o/n/a.tar"], ["hf://datasets/o/n/a.tar"]),
        (["http://[::1]:80/a.tar::b.tar"], ["http://[::1]:80/a.tar", "b.tar"]),
        (["http://h/a b.tar?x=1&y=*"], ["http://h/a b.tar?x=1&y=*"]),
        ("a-{0..1}.tar", ["a-0.tar", "a-1.tar"]),
    ],
)
def test_expand_gives_urls_in_order_when_patterns_are_good(patterns, urls):
    assert expand_tars(patterns) == urls


def test_expand_takes_wds_variables_when_set(monkeypatch):
    monkeypatch.setenv("WDS_ROOT", "/data/{0..1}")
    assert expand_tars(["${ROOT}.tar"]) == ["/data/0.tar", "/data/1.tar"]


def test_expand_matches_files_when_a_glob_is_quoted(tmp_path):
    for name in ("b-1.tar", "b-0.tar", "c.tar", "b-2.txt", "[x].tar"):
        write(tmp_path / name, b"")
    assert expand_tars([f"{tmp_path}/b-*.tar"]) == [f"{tmp_path}/b-0.tar", f"{tmp_path}/b-1.tar"]
    assert expand_tars([f"file://{tmp_path}/b-*.tar"]) == [f"{tmp_path}/b-0.tar", f"{tmp_path}/b-1.tar"]
    assert expand_tars([f"{tmp_path}/[x].tar"]) == [f"{tmp_path}/[x].tar"]  # a file of that name


def test_expand_reads_a_list_and_the_home_folder_when_they_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "tars.txt", b"# a comment\n\na-{0..1}.tar\r\n ~/b.tar \n")
    assert expand_tars(["@~/tars.txt", "c.tar"]) == ["a-0.tar", "a-1.tar", f"{tmp_path}/b.tar", "c.tar"]
    write(tmp_path / "tars.txt", b"\n")
    with pytest.raises(InputError, match="is empty, expected one path"):
        expand_tars([f"@{tmp_path}/tars.txt"])


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ([], "no tars are listed"),
        ([""], "names an empty path"),
        (["a.tar::"], "names an empty path"),
        (["a-{0..3.tar"], "is broken: .*; correct its braces"),
        (["${NOWHERE}/a.tar"], "WDS_NOWHERE"),
        (["a.tar", "b.tar", "a.tar"], "tar a.tar is listed twice"),
        (["data:a.tar"], "unknown scheme 'data', .*write ./ before a path with a colon"),
        (["s4://bucket/a.tar"], "unknown scheme 's4'"),
        (["file://data/a.tar"], "names a host, 'data'; write file:///path"),
        (["http://[::1/a.tar"], "is no URL"),
        (["a\0.tar"], "has a NUL character"),
        (["none-*.tar"], "tar pattern 'none-\\*.tar' matches no file"),
        (["http://h/*.tar"], "web servers do not list files; count with braces"),
        (["t-{0..9999999}.tar"], "stands for 10,000,000 tars, expected at most 1,000,000"),
        (["@none.txt"], "list of tars @none.txt cannot be read: .*name a text file"),
        (["~nobody-of-this-name/a.tar"], "tar ~nobody-of-this-name/a.tar: .*write the folder out"),
    ],
)
def test_expand_refuses_when_patterns_are_bad(patterns, message):
    with pytest.raises(InputError, match=message):
        expand_tars(patterns)


PIPES = [
    "pipe:cat a.tar",
    "PIPE:cat a.tar",
    "ais://b/a.tar",
    "htgs://b/a.tar",
]


@pytest.mark.parametrize("pattern", [*PIPES, "b.tar::pipe:cat a.tar", "{b.tar,pipe:cat a.tar}"])
def test_expand_refuses_when_a_program_would_be_started(pattern):
    with pytest.raises(InputError, match=r"would start a program .*allow_pipe=True"):
        expand_tars(["c.tar", pattern])
    assert len(expand_tars(["c.tar", pattern], allow_pipe=True)) >= 2


def test_expand_refuses_when_environment_hides_a_program(monkeypatch):
    monkeypatch.setenv("WDS_HIDDEN", "pipe:cat a.tar")
    with pytest.raises(InputError, match="would start a program"):
        expand_tars(["${HIDDEN}"])
    monkeypatch.setenv("GOPEN_REWRITE", "http://safe/=pipe:cat ")
    with pytest.raises(InputError, match=r"tar pipe:cat a.tar would start a program"):
        expand_tars(["http://safe/a.tar"])


# --- compressed ----------------------------------------------------------------------------------------------

COMPRESS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


@pytest.mark.parametrize("kind", COMPRESS)
def test_open_gives_same_tar_when_compressed(tmp_path, kind):
    plain = Tar.open(write(tmp_path / "a.tar", DATA))
    packed = Tar.open(write(tmp_path / f"a.tar.{kind}", COMPRESS[kind](DATA)), scratch=tmp_path / "s" / "t")
    assert (packed.keys, packed.header_sha256, packed.name) == (plain.keys, plain.header_sha256, f"a.tar.{kind}")
    assert [packed.read(i) for i in range(5)] == [plain.read(i) for i in range(5)]


def test_open_knows_compression_when_the_name_does_not_tell(tmp_path):
    assert len(Tar.open(write(tmp_path / "a.tar", gzip.compress(DATA)), scratch=tmp_path / "s")) == 5


def test_copy_is_made_once_when_opened_again_and_anew_when_the_source_changed(tmp_path):
    url, scratch = write(tmp_path / "a.tar.gz", gzip.compress(DATA)), tmp_path / "s"
    Tar.open(url, scratch=scratch)
    (copy,) = scratch.iterdir()
    made = copy.stat().st_mtime_ns
    Tar.open(url, scratch=scratch)
    assert [(path, path.stat().st_mtime_ns) for path in scratch.iterdir()] == [(copy, made)]
    write(tmp_path / "a.tar.gz", gzip.compress(tar_bytes(samples(3))))
    assert len(Tar.open(url, scratch=scratch)) == 3


@pytest.mark.parametrize("kind", COMPRESS)
def test_open_refuses_and_leaves_nothing_when_compressed_data_is_damaged(tmp_path, kind):
    packed = bytearray(COMPRESS[kind](DATA))
    for broken in (packed[:-20], packed[: len(packed) // 2], packed[:40] + bytes(8) + packed[48:]):
        with pytest.raises(InputError, match=r"a.tar.* is cut short or damaged: .*; fetch or make it again"):
            Tar.open(write(tmp_path / f"a.tar.{kind}", broken), scratch=tmp_path / "s")
        assert list((tmp_path / "s").iterdir()) == []


@pytest.mark.parametrize(("content", "message"), [(b"<html>" * 200, "a web page"), (b"", "empty")])
def test_open_refuses_and_leaves_nothing_when_something_else_is_compressed(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        Tar.open(write(tmp_path / "a.tar.gz", gzip.compress(content)), scratch=tmp_path / "s")
    assert list((tmp_path / "s").iterdir()) == []


def test_open_uses_a_private_directory_when_no_scratch_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert len(Tar.open(write(tmp_path / "a.tar.gz", gzip.compress(DATA)))) == 5
    (directory,) = tmp_path.glob("scalekd-tars-*")
    assert directory.stat().st_mode & 0o077 == 0
    monkeypatch.setattr("os.getuid", lambda: 4242)
    (tmp_path / "scalekd-tars-4242").mkdir()  # made by somebody else before us
    with pytest.raises(ResourceError, match="belongs to another user; name a scratch directory"):
        Tar.open(write(tmp_path / "a.tar.gz", gzip.compress(DATA)))


def test_open_refuses_a_link_in_place_of_the_private_directory(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "mine").mkdir()
    (tmp_path / f"scalekd-tars-{os.getuid()}").symlink_to(tmp_path / "mine")
    with pytest.raises(ResourceError, match="is a link or belongs to another user"):
        Tar.open(write(tmp_path / "a.tar.gz", gzip.compress(DATA)))
    assert list((tmp_path / "mine").iterdir()) == []


def test_open_raises_resource_error_when_scratch_cannot_be_used(tmp_path):
    url = write(tmp_path / "a.tar.gz", gzip.compress(DATA))
    with pytest.raises(ResourceError, match=r"cannot be copied to scratch: .*check"):
        Tar.open(url, scratch=tmp_path / "a.tar.gz")


# --- remote --------------------------------------------------------------------------------------------------


class Answers(dict):
    """What a loopback web server answers, by path: status, body, announced length (None for none) and headers."""

    asked: list
    url: str

    def file(self, path, body, **headers):
        self[path] = 200, body, len(body), headers


@pytest.fixture
def web(monkeypatch):
    answers = Answers()
    answers.asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            answers.asked.append((self.path, self.headers.get("Authorization")))
            given = answers.get(self.path, (404, b"", 0, {}))
            status, body, length, headers = given.pop(0) if isinstance(given, list) else given
            self.send_response(status)
            if length is not None:
                self.send_header("Content-Length", str(length))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            with contextlib.suppress(ConnectionError):  # a client that knows the version reads no further
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("feature_store.inputs.copies.PAUSES", (0, 0))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        answers.url = f"http://127.0.0.1:{httpd.server_port}"
        yield answers
        httpd.shutdown()
        thread.join()


def copies(scratch):
    """Names and times of the copies in a scratch folder."""
    return {path.name: path.stat().st_mtime_ns for path in scratch.iterdir()}


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_open_fetches_once_when_tar_is_remote(tmp_path, web, pack):
    web.file("/d/t%20t-0.tar?v=1", pack(DATA))
    (url,) = expand_tars([f"{web.url}/d/t t-0.tar?v=1"])
    made = []
    for _ in range(2):
        tar = Tar.open(url, scratch=tmp_path)
        assert (tar.name, len(tar), tar.read(4).label) == ("t t-0.tar", 5, 28)
        made.append(copies(tmp_path))
    assert made[0] == made[1]


@pytest.mark.parametrize("header", [{"ETag": '"{}"'}, {"Last_Modified": "Thu, 0{} Jan 2026 00:00:00 GMT"}, {}])
def test_open_fetches_anew_when_the_tar_was_replaced(tmp_path, web, header):
    for number, labels in enumerate((range(5), range(7, 12)), start=1):
        body = tar_bytes((f"{i:04}.{kind}", b"%02d" % i) for i in labels for kind in ("jpg", "cls"))
        web.file("/t.tar", body, **{name: value.format(number) for name, value in header.items()})  # of one length
        assert [Tar.open(f"{web.url}/t.tar", scratch=tmp_path).read(i).label for i in range(5)] == list(labels)


def test_open_keeps_nothing_when_the_answer_is_a_login_page(tmp_path, web):
    web.file("/t.tar", b"<html>log in</html>", Content_Type="application/x-tar")
    with pytest.raises(InputError, match=r"t.tar is not a tar: it is a web page or XML .*log in"):
        Tar.open(f"{web.url}/t.tar", scratch=tmp_path)
    assert copies(tmp_path) == {}
    web.file("/t.tar", DATA)
    assert len(Tar.open(f"{web.url}/t.tar", scratch=tmp_path)) == 5


def test_open_keeps_nothing_when_a_tar_of_unknown_length_is_cut_short(tmp_path, web):
    web["/t.tar"] = 200, DATA[:3000], None, {"ETag": '"1"'}
    with pytest.raises(InputError, match="is cut short"):
        Tar.open(f"{web.url}/t.tar", scratch=tmp_path)
    assert copies(tmp_path) == {}
    web["/t.tar"] = 200, DATA, None, {"ETag": '"1"'}
    assert len(Tar.open(f"{web.url}/t.tar", scratch=tmp_path)) == 5


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        ((200, DATA[:3000], len(DATA), {}), ResourceError, r"t.tar was cut short: 3000 of \d+ bytes came; try again"),
        ((503, b"", 0, {}), ResourceError, "t.tar cannot be fetched: the server answered 503 Service Unavailable"),
        ((404, b"", 0, {}), InputError, "t.tar cannot be fetched: the server answered 404 Not Found; correct the URL"),
        ((403, b"", 0, {}), InputError, "the server answered 403 Forbidden; write http://user:password@host"),
    ],
)
def test_open_tells_the_status_and_leaves_nothing_when_fetching_fails(tmp_path, web, answer, kind, message):
    web["/t.tar"] = answer
    with pytest.raises(kind, match=message):
        Tar.open(f"{web.url}/t.tar", scratch=tmp_path)
    assert copies(tmp_path) == {}
    assert len(web.asked) == (3 if kind is ResourceError else 1)


def test_open_tries_again_when_the_server_fails_for_a_while(tmp_path, web):
    web["/t.tar"] = [(503, b"", 0, {}), (200, DATA[:700], len(DATA), {}), (200, DATA, len(DATA), {})]
    assert len(Tar.open(f"{web.url}/t.tar", scratch=tmp_path)) == 5


def test_open_uses_the_last_copy_and_says_so_when_the_server_is_gone(tmp_path, web):
    web.file("/t.tar", DATA)
    Tar.open(f"{web.url}/t.tar", scratch=tmp_path)
    web["/t.tar"] = 503, b"", 0, {}
    (note,) = Tar.open(f"{web.url}/t.tar", scratch=tmp_path).notes
    assert "503 Service Unavailable" in note
    assert "the copy fetched earlier is used" in note


def test_open_sends_the_password_to_its_own_server_only(tmp_path, web):
    web["/t.tar"] = 302, b"", 0, {"Location": f"{web.url.replace('127.0.0.1', 'localhost')}/real.tar"}
    web.file("/real.tar", DATA)
    url = web.url.replace("http://", "http://us%40er:pass@")
    assert len(Tar.open(f"{url}/t.tar", scratch=tmp_path)) == 5
    basic = base64.b64encode(b"us@er:pass").decode()
    assert web.asked == [("/t.tar", f"Basic {basic}"), ("/real.tar", None)]


@pytest.mark.parametrize("url", ["http:///a.tar", "http://h:port/a.tar", "http://h:0/a.tar", "http://h h/a.tar"])
def test_open_refuses_when_the_url_has_no_usable_host_or_port(tmp_path, url):
    with pytest.raises(InputError, match="correct it"):
        Tar.open(url, scratch=tmp_path)


def test_open_fetches_from_the_hub_when_the_url_is_one_of_its_own(tmp_path, web, monkeypatch):
    class FileSystem:
        def resolve_path(self, url):
            if "missing" in url:
                raise FileNotFoundError(url)
            return SimpleNamespace(repo_id="o/n", path_in_repo="d/t.tar", repo_type="dataset", revision="main")

    monkeypatch.setattr("huggingface_hub.HfFileSystem", FileSystem)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "secret")
    monkeypatch.setattr("huggingface_hub.hf_hub_url", lambda repo, path, **_: f"{web.url}/{repo}/{path}")
    web.file("/o/n/d/t.tar", DATA)
    assert len(Tar.open("hf://datasets/o/n/d/t.tar", scratch=tmp_path)) == 5
    assert web.asked == [("/o/n/d/t.tar", "Bearer secret")]
    with pytest.raises(InputError, match="tar hf://datasets/o/n/missing.tar is not there"):
        Tar.open("hf://datasets/o/n/missing.tar", scratch=tmp_path)


@pytest.fixture(scope="module")
def new_bucket():
    with s3_server() as make:
        yield make


def test_open_reads_and_revalidates_when_the_tar_is_in_a_bucket(tmp_path, new_bucket):
    bucket = open_objects(new_bucket())
    bucket.put("in a/é-0.tar", DATA)
    bucket.put("in a/é-1.tar", DATA)
    bucket.put("in a/deeper/é-2.tar", DATA)
    urls = expand_tars([f"{bucket.url}/in a/é-*.tar"])
    assert urls == [f"{bucket.url}/in a/é-{i}.tar" for i in (0, 1)]
    tar = Tar.open(urls[0], scratch=tmp_path)
    assert (tar.name, len(tar), tar.read(4).label) == ("é-0.tar", 5, 28)
    made = copies(tmp_path)
    Tar.open(urls[0], scratch=tmp_path)
    assert copies(tmp_path) == made
    bucket.put("in a/é-0.tar", tar_bytes(samples(3)))
    assert len(Tar.open(urls[0], scratch=tmp_path)) == 3


def test_open_refuses_when_a_bucket_has_no_such_tar(tmp_path, new_bucket):
    bucket = open_objects(new_bucket())
    bucket.put("page.tar", b"<html></html>" * 100)
    for key, message in (
        ("none.tar", "none.tar is not there; correct the URL"),
        ("page.tar", "is not a tar: it is a web page"),
        ("folder/", "names no object of a bucket; expected s3://bucket/folder/a.tar"),
    ):
        with pytest.raises(InputError, match=message):
            Tar.open(f"{bucket.url}/{key}", scratch=tmp_path)
    with pytest.raises(InputError, match="matches no file"):
        expand_tars([f"{bucket.url}/*.zip"])
    assert copies(tmp_path) == {}


def test_open_names_the_extra_when_obstore_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(InputError, match=r"obstore is not installed; pip install 'scalekd-cache\[s3\]'"):
        Tar.open("s3://bucket/a.tar", scratch=tmp_path)


def test_copies_are_readable_by_others_when_the_umask_lets_them(tmp_path, web):
    web.file("/t.tar", DATA)
    before = os.umask(0o022)
    try:
        Tar.open(f"{web.url}/t.tar", scratch=tmp_path)
    finally:
        os.umask(before)
    (copy,) = tmp_path.iterdir()
    assert copy.stat().st_mode & 0o777 == 0o644


def test_open_removes_what_a_killed_fetch_left_when_it_fetches_again(tmp_path, web):
    web.file("/t.tar", DATA)
    Tar.open(f"{web.url}/t.tar", scratch=tmp_path)
    (copy,) = tmp_path.iterdir()
    copy.rename(f"{copy}.0123.partial")
    Tar.open(f"{web.url}/t.tar", scratch=tmp_path)
    assert list(tmp_path.iterdir()) == [copy]


def test_open_reads_in_place_when_url_is_a_file(tmp_path):
    write(tmp_path / "a b.tar", DATA)
    tar = Tar.open(f"file://{tmp_path}/a%20b.tar", scratch=tmp_path / "s")
    assert tar.read(1).label == 7
    assert not (tmp_path / "s").exists()


def test_open_reads_a_command_when_pipes_were_allowed(tmp_path):
    (url,) = expand_tars([f"pipe:cat {write(tmp_path / 'a.tar', DATA)}"], allow_pipe=True)
    tar = Tar.open(url, scratch=tmp_path / "s")
    assert (tar.name, tar.read(1).label) == ("a.tar", 7)
    with pytest.raises(ResourceError, match="the program that reads tar pipe:exit 3 ended with exit code 3"):
        Tar.open("pipe:exit 3", scratch=tmp_path / "s")
    with pytest.raises(InputError, match=r"is not a tar: it is text \('hello"):
        Tar.open("pipe:echo hello", scratch=tmp_path / "s")
    assert len(copies(tmp_path / "s")) == 1


def test_open_names_the_program_when_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ResourceError, match="No such file or directory: 'curl'"):
        Tar.open("sftp://host/a.tar", scratch=tmp_path)
