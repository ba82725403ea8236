"""expand_tars and remote or compressed tars: patterns, forbidden commands, copies made once and whole."""

import bz2
import gzip
import http.server
import lzma
import threading

import pytest
from tar_files import samples, tar_bytes, write

from feature_store.errors import InputError, ResourceError
from feature_store.tars.tar import Tar, expand_tars

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
        ("a-{0..1}.tar", ["a-0.tar", "a-1.tar"]),
    ],
)
def test_expand_gives_urls_in_order_when_patterns_are_good(patterns, urls):
    assert expand_tars(patterns) == urls


def test_expand_takes_wds_variables_when_set(monkeypatch):
    monkeypatch.setenv("WDS_ROOT", "/data/{0..1}")
    assert expand_tars(["${ROOT}.tar"]) == ["/data/0.tar", "/data/1.tar"]


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
    ],
)
def test_expand_refuses_when_patterns_are_bad(patterns, message):
    with pytest.raises(InputError, match=message):
        expand_tars(patterns)


PIPES = [
    "pipe:cat a.tar",
    "PIPE:cat a.tar",
    "gs://b/a.tar",
    "hf://datasets/o/n/a.tar",
    "ais://b/a.tar",
    "htgs://b/a.tar",
]


@pytest.mark.parametrize("pattern", [*PIPES, "b.tar::pipe:cat a.tar", "{b.tar,pipe:cat a.tar}"])
def test_expand_refuses_when_a_program_would_be_started(pattern):
    with pytest.raises(InputError, match=r"would start a program .*allow pipe URLs explicitly"):
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


def test_open_uses_a_private_directory_when_no_scratch_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert len(Tar.open(write(tmp_path / "a.tar.gz", gzip.compress(DATA)))) == 5
    (directory,) = tmp_path.glob("scalekd-tars-*")
    assert directory.stat().st_mode & 0o077 == 0
    monkeypatch.setattr("os.getuid", lambda: 4242)
    (tmp_path / "scalekd-tars-4242").mkdir()  # made by somebody else before us
    with pytest.raises(ResourceError, match="belongs to another user; name a scratch directory"):
        Tar.open(write(tmp_path / "a.tar.gz", gzip.compress(DATA)))


def test_open_raises_resource_error_when_scratch_cannot_be_used(tmp_path):
    url = write(tmp_path / "a.tar.gz", gzip.compress(DATA))
    with pytest.raises(ResourceError, match=r"cannot be copied to scratch: .*check"):
        Tar.open(url, scratch=tmp_path / "a.tar.gz")


# --- remote --------------------------------------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch):
    """A loopback web server: path -> (status, body, announced length); counts its requests."""
    answers, asked = {}, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            status, body, length = answers.get(self.path, (404, b"", 0))
            self.send_response(status)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}", answers, asked
        httpd.shutdown()
        thread.join()


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_open_fetches_once_when_tar_is_remote(tmp_path, server, pack):
    address, answers, asked = server
    body = pack(DATA)
    answers["/d/t-0.tar?v=1"] = (200, body, len(body))
    (url,) = expand_tars([f"{address}/d/t-0.tar?v=1"])
    for _ in range(2):
        tar = Tar.open(url, scratch=tmp_path)
        assert (tar.name, len(tar), tar.read(4).label) == ("t-0.tar", 5, 28)
    assert asked == ["/d/t-0.tar?v=1"]


def test_open_raises_resource_error_and_leaves_nothing_when_fetching_fails(tmp_path, server):
    address, answers, _ = server
    answers["/short.tar"] = (200, DATA[:3000], len(DATA))
    for name in ("short.tar", "missing.tar"):
        with pytest.raises(ResourceError, match=rf"{name} cannot be copied to scratch: .*exit (18|22)"):
            Tar.open(f"{address}/{name}", scratch=tmp_path)
        assert list(tmp_path.iterdir()) == []


def test_open_names_the_program_when_it_is_missing(tmp_path, server, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ResourceError, match="No such file or directory: 'curl'"):
        Tar.open(f"{server[0]}/a.tar", scratch=tmp_path)


def test_open_reads_in_place_when_url_is_a_file(tmp_path):
    write(tmp_path / "a b.tar", DATA)
    tar = Tar.open(f"file://{tmp_path}/a%20b.tar", scratch=tmp_path / "s")
    assert tar.read(1).label == 7
    assert not (tmp_path / "s").exists()


def test_open_reads_a_command_when_pipes_were_allowed(tmp_path):
    (url,) = expand_tars([f"pipe:cat {write(tmp_path / 'a.tar', DATA)}"], allow_pipe=True)
    tar = Tar.open(url, scratch=tmp_path / "s")
    assert (tar.name, tar.read(1).label) == ("a.tar", 7)
    with pytest.raises(ResourceError, match="exit 3"):
        Tar.open("pipe:exit 3", scratch=tmp_path / "s")
