"""Malformed and unusual inputs end the way docs/inputs.md says: used, quarantined with a reason, or a clear error."""

import bz2
import gzip
import http.server
import io
import json
import lzma
import os
import re
import struct
import tarfile
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from image_folders import class_samples, write_parquet
from PIL import Image
from servers import s3_server
from tiny_jobs import TinyTeacher, encode_image, noise

from feature_store import open_store
from feature_store.backends.open import open_objects
from feature_store.tools.cli import main as store_main
from teacher_service.cli import main

Members = list[tuple[str | tarfile.TarInfo, bytes]]
DOCUMENT = Path(__file__).parents[2] / "docs/inputs.md"
GOOD: Members = [("good.png", encode_image(noise())), ("good.cls", b"2")]


def _documented() -> dict[str, tuple[str, str]]:
    """Outcome and how of every input in the document's tables."""
    rows = re.findall(r"^\| (.+?) \| (used|quarantined|error) \| (.+?) \|$", DOCUMENT.read_text(), re.MULTILINE)
    return {name: (outcome, how) for name, outcome, how in rows}


def _saved(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _animated(kind: str) -> bytes:
    frames = [Image.fromarray(noise(seed=seed)) for seed in (0, 1)]
    return _saved(frames[0], kind, save_all=True, append_images=frames[1:])


def _turned() -> bytes:
    image = Image.fromarray(noise())
    exif = image.getexif()
    exif[0x0112] = 6
    return _saved(image, "JPEG", exif=exif)


def _png(side: int, depth: int, pixels: bytes) -> bytes:
    """A PNG of RGB pixels, whatever Pillow can write."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", side, side, depth, 2, 0, 0, 0)), (b"IDAT", zlib.compress(pixels)),
              (b"IEND", b"")]  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    )


def _wrong_checksum() -> bytes:
    content = bytearray(encode_image(noise()))
    content[content.index(b"IDAT") + 40] ^= 255
    return bytes(content)


def _link(name: str, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, target
    return info


def _scans(count: int) -> bytes:
    content = _saved(Image.fromarray(noise()), "JPEG", progressive=True)
    last = content[content.rindex(b"\xff\xda") : -2]
    return content[:-2] + last * (count - content.count(b"\xff\xda")) + content[-2:]


def _overlapping_tags() -> bytes:
    tags = b"".join(struct.pack("<HHLL", tag, 7, 900, 100) for tag in range(1000, 1010))
    return (b"II*\0" + struct.pack("<LH", 8, 10) + tags).ljust(2000, b"\0")


PIXELS, JPEG = encode_image(noise()), encode_image(noise(), "JPEG")
SAMPLES: dict[str, Members] = {
    "JPEG cut short": [("{}.jpg", JPEG[:-300])],
    "JPEG with bytes after its end": [("{}.jpg", JPEG + b"more" * 100)],
    "PNG with a wrong checksum inside": [("{}.png", _wrong_checksum())],
    "decompression bomb": [("{}.png", _png(13_378, 8, bytes(1000)))],  # one pixel a side above the limit
    "image of 0 bytes": [("{}.png", b"")],
    "text named .jpg": [("{}.jpg", b"<!DOCTYPE html><html>")],
    "PostScript named .png": [("{}.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")],
    "PNG named .jpg": [("{}.jpg", PIXELS)],
    "image with an unknown extension": [("{}.jxl", PIXELS)],
    "animated GIF": [("{}.gif", _animated("GIF"))],
    "animated WebP": [("{}.webp", _animated("WEBP"))],
    "animated PNG": [("{}.png", _animated("PNG"))],
    "CMYK JPEG": [("{}.jpg", encode_image(noise(), "JPEG", "CMYK"))],
    "16-bit grey PNG": [("{}.png", encode_image(noise()[..., 0].astype(np.uint16) * 256))],
    "16-bit RGB PNG": [("{}.png", _png(8, 16, (b"\0" + bytes(range(48))) * 8))],
    "floating-point TIFF": [("{}.tif", _saved(Image.new("F", (9, 9), 0.5), "TIFF"))],
    "grey with alpha": [("{}.png", encode_image(noise(), mode="LA"))],
    "RGBA": [("{}.png", encode_image(noise(), mode="RGBA"))],
    "palette": [("{}.png", encode_image(noise(), mode="P"))],
    "1-bit image": [("{}.png", encode_image(noise(), mode="1"))],
    "JPEG that EXIF wants turned": [("{}.jpg", _turned())],
    "1 x 1 pixel": [("{}.png", encode_image(noise(1, 1)))],
    "JPEG with 150 scans": [("{}.jpg", _scans(150))],
    "GIF with 70,000 comments": [("{}.gif", b"GIF89a\x08\0\x08\0\0\0\0" + b"!\xfe\x01a\0" * 70_000)],
    "PNG with 70,000 empty chunks": [("{}.png", PIXELS[:33] + b"\0\0\0\0prIv\x17\xc6\x8f\xb5" * 70_000 + PIXELS[33:])],
    "TIFF with overlapping tags": [("{}.tif", _overlapping_tags())],
    "1 x 4000 pixels": [("{}.png", encode_image(noise(1, 4000)))],
    "no cls member": [("{}.png", PIXELS), ("{}.txt", b"3")],
    "label in a json member": [("{}.png", PIXELS), ("{}.json", b'{"label": 3}')],
    "cls is a word": [("{}.png", PIXELS), ("{}.cls", b"cat")],
    "cls is negative": [("{}.png", PIXELS), ("{}.cls", b"-1")],
    "cls is empty": [("{}.png", PIXELS), ("{}.cls", b"")],
    "cls has 25 digits": [("{}.png", PIXELS), ("{}.cls", b"1" * 25)],
    "cls has 1000 bytes": [("{}.png", PIXELS), ("{}.cls", b"1" * 1000)],
    "cls with a line break after the number": [("{}.png", PIXELS), ("{}.cls", b" 3\r\n")],
    "two images": [("{}.png", PIXELS), ("{}.jpg", JPEG)],
    "label without image": [],
    "image is a symbolic link": [(_link("{}.png", "/etc/hostname"), b"")],
    "more than one dot in the names": [("{}.v1.png", PIXELS)],
    "key that leaves the folder": [("../../../tmp/{}.png", PIXELS)],
    "absolute key": [("/etc/{}.png", PIXELS)],
    "key in folders": [("train/n01440764/{}.png", PIXELS)],
    "key in Unicode": [("žluťoučký-猫-{}.png", PIXELS)],
    "key of 300 characters": [("k" * 300 + "{}.png", PIXELS)],
}


def _numbered(number: int, members: Members) -> Members:
    """A sample's members under a key of its own, with a label if they are not about labels."""
    named: Members = []
    for member, content in members:
        if isinstance(member, tarfile.TarInfo):
            named.append((_link(member.name.format(f"s{number:02}"), member.linkname), content))
        else:
            named.append((member.format(f"s{number:02}"), content))
    if any(str(member).endswith((".cls", ".txt", ".json")) for member, _ in members):
        return named
    first = named[0][0] if named else f"s{number:02}.png"
    name = first.name if isinstance(first, tarfile.TarInfo) else first
    return [*named, (f"{name.rpartition('.')[0]}.cls", b"1")]


def _write(path: Path, members: Sequence[tuple[str | tarfile.TarInfo, bytes]], **options) -> Path:
    with tarfile.open(path, "w", **options) as archive:
        for member, content in members:
            info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def _cache(folder: Path, teacher: TinyTeacher, tars: Sequence[Path], *options: str) -> int:
    return main(["cache", *map(str, tars), *teacher.arguments, "--checkpoint", str(teacher.checkpoint),
                 "--store", str(folder / "store"), "--workers", "0", "--batch-size", "4", "--tap-codec", "f16",
                 "--scratch", str(folder / "scratch"), *options])  # fmt: skip


def test_document_lists_exactly_the_inputs_that_are_tested() -> None:
    assert list(_documented()) == [*SAMPLES, *ARCHIVES, *PLACES, *LABELS, *FOLDERS, *TABLES]
    assert len(SAMPLES) + len(ARCHIVES) >= 30


def test_cache_quarantines_or_uses_every_documented_sample(
    tmp_path: Path, tiny_swin: TinyTeacher, capsys: pytest.CaptureFixture[str]
) -> None:
    members = [member for number, each in enumerate(SAMPLES.values()) for member in _numbered(number, each)]

    assert _cache(tmp_path, tiny_swin, [_write(tmp_path / "odd.tar", members)], "--views", "2", "--policy", "a2") == 0

    store = open_store(tmp_path / "store")
    keys, reasons = store.keys(0), store.quarantined(0)
    assert len(keys) == len(SAMPLES)  # every one keeps its place
    documented = _documented()
    found = {name: ("quarantined" if at in reasons else "used") for at, name in enumerate(SAMPLES)}
    assert found == {name: documented[name][0] for name in SAMPLES}
    for at, name in enumerate(SAMPLES):
        assert documented[name][1] in reasons.get(at, documented[name][1]), name
    used = [key for at, key in enumerate(keys) if at not in reasons]
    assert np.isfinite(store.source().read(store.rows(used, view=1)).taps["stage4"]).all()
    capsys.readouterr()
    assert store_main(["info", str(store.path)]) == 0
    listed = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert all(f"#{at} {keys[at]}: {reason}" in listed for at, reason in reasons.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["odd.tar", "store"]  # nothing was extracted


# --- whole tars


def _special_members(folder: Path) -> list[Path]:
    kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)
    specials: Members = []
    for number, kind in enumerate(kinds):
        info = _link(f"x{number}.png", "good.png")
        info.type = kind
        specials.append((info, b""))
    return [_write(folder / "odd.tar", [*specials, *GOOD])]


def _packed(folder: Path, compress: Callable[[bytes], bytes], cut: int = 0) -> list[Path]:
    packed = compress(_write(folder / "plain", GOOD).read_bytes())
    (folder / "odd.tar.gz").write_bytes(packed[: len(packed) - cut])
    (folder / "plain").unlink()
    return [folder / "odd.tar.gz"]


def _edited(folder: Path, change: Callable[[bytes], bytes], members: Members = GOOD) -> list[Path]:
    path = _write(folder / "odd.tar", members)
    path.write_bytes(change(path.read_bytes()))
    return [path]


def _file(folder: Path, content: bytes) -> list[Path]:
    (folder / "odd.tar").write_bytes(content)
    return [folder / "odd.tar"]


def _namesakes(folder: Path) -> list[Path]:
    for name in "ab":
        (folder / name).mkdir()
    return [
        _write(folder / "a" / "odd.tar", GOOD),
        _write(folder / "b" / "odd.tar", [("other.png", PIXELS), ("other.cls", b"1")]),
    ]


def _fifo(folder: Path) -> list[Path]:
    os.mkfifo(folder / "odd.tar")
    return [folder / "odd.tar"]


def _folder(folder: Path) -> list[Path]:
    (folder / "odd.tar").mkdir()
    return [folder / "odd.tar"]


def _sparse(folder: Path) -> list[Path]:
    """GNU tar's old form of a sparse file: type S, and its map in the header."""
    path = _write(folder / "odd.tar", [("good.png", bytes(512)), ("good.cls", b"1")], format=tarfile.GNU_FORMAT)
    content = bytearray(path.read_bytes())
    content[156:157] = b"S"
    content[386:410] = b"00000000000\x0000000001000\0"  # offset 0, 512 bytes
    content[483:495] = b"00000001000\0"
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    path.write_bytes(content)
    return [path]


def _without_end(raw: bytes) -> bytes:
    return raw.rstrip(b"\0") + bytes(512 - len(raw.rstrip(b"\0")) % 512)


ARCHIVES: dict[str, Callable[[Path], list[Path]]] = {
    "tar with links, devices, pipes and folders": _special_members,
    "tar with hidden files": lambda folder: [
        _write(folder / "odd.tar", [("d/.DS_Store", b"x"), ("._good.png", b"x"), *GOOD, (".nfs01", b"x")])
    ],
    "gzip-compressed tar": lambda folder: _packed(folder, gzip.compress),
    "bzip2-compressed tar": lambda folder: _packed(folder, bz2.compress),
    "xz-compressed tar": lambda folder: _packed(folder, lzma.compress),
    "tar without its end marker": lambda folder: _edited(folder, _without_end),
    "tars put together with cat": lambda folder: _edited(
        folder, lambda raw: _write(folder / "odd.tar", [("README", b"x")]).read_bytes() + raw
    ),
    "tar with zeros behind its end marker": lambda folder: _edited(folder, lambda raw: raw + bytes(100_000)),
    "two tars of one base name": _namesakes,
    "gzip-compressed tar cut short": lambda folder: _packed(folder, gzip.compress, 40),
    "zstd-compressed tar": lambda folder: _file(folder, b"\x28\xb5\x2f\xfd" + bytes(1000)),
    "zip archive": lambda folder: _file(folder, b"PK\x03\x04" + bytes(1000)),
    "tar cut short inside a member": lambda folder: _edited(folder, lambda raw: raw[:2000]),
    "tar with a damaged header": lambda folder: _edited(
        folder, lambda raw: raw.replace(b"good.cls", b"bad!.cls"), [*GOOD, ("z.png", PIXELS), ("z.cls", b"1")]
    ),
    "tar with other bytes behind its end marker": lambda folder: _edited(folder, lambda raw: raw + b"more"),
    "tar without members": lambda folder: [_write(folder / "odd.tar", [])],
    "tar of files without an extension": lambda folder: [_write(folder / "odd.tar", [("00001", PIXELS)])],
    "tar without labels": lambda folder: [_write(folder / "odd.tar", [("good.png", PIXELS), ("good.txt", b"a cat")])],
    "tar with class names for labels": lambda folder: [
        _write(folder / "odd.tar", [GOOD[0], ("good.cls", b"n01440764")])
    ],
    "tar of tars": lambda folder: [_write(folder / "odd.tar", [("n01440764.tar", bytes(10240))])],
    "file of 0 bytes": lambda folder: _file(folder, b""),
    "text named .tar": lambda folder: _file(folder, b"no tar at all " * 1000),
    "web page named .tar": lambda folder: _file(folder, b"<!DOCTYPE html><title>Sign in</title>" * 100),
    "Git LFS pointer named .tar": lambda folder: _file(
        folder, b"version https://git-lfs.github.com/spec/v1\noid sha256:0"
    ),
    "folder named .tar": _folder,
    "FIFO named .tar": _fifo,
    "same key twice, apart": lambda folder: [_write(folder / "odd.tar", [*GOOD, ("b.png", PIXELS), *GOOD])],
    "same member twice": lambda folder: [_write(folder / "odd.tar", [GOOD[0], *GOOD])],
    "same key in two tars": lambda folder: [_write(folder / f"{name}.tar", GOOD) for name in ("odd", "other")],
    "name that is not UTF-8": lambda folder: [
        _write(folder / "odd.tar", [("caf\xe9.png", PIXELS)], format=tarfile.USTAR_FORMAT, encoding="latin-1")
    ],
    "sparse file": _sparse,
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_cache_uses_or_refuses_every_documented_tar(
    tmp_path: Path, tiny_swin: TinyTeacher, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    outcome, how = _documented()[name]
    tars = ARCHIVES[name](tmp_path)
    before = {path.name for path in tmp_path.iterdir()}

    code = _cache(tmp_path, tiny_swin, tars)

    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    if outcome == "used":
        assert code == 0, captured.err
        store = open_store(tmp_path / "store")
        assert (store.keys(0), store.quarantined(0), store.labels(0).tolist()) == (["good"], {}, [2])
    else:
        assert code == 2
        error = captured.err.splitlines()[-1]
        assert error.startswith("teacher-service: error: ")
        assert how in error
        assert "odd.tar" in error
        assert {path.name for path in tmp_path.iterdir()} - {"scratch"} == before  # no store was begun


# --- paths and URLs


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A folder of tars, a web server of it, and a bucket: what PLACES fill in."""
    folder = tmp_path_factory.mktemp("places")
    for number, name in enumerate(("a-0.tar", "a-1.tar", "b c.tar")):
        _write(folder / name, [(f"{number}.png", PIXELS), (f"{number}.cls", b"1")])
    (folder / "login.tar").write_text("<html>log in</html>")
    (folder / "list.txt").write_text("# two\na-{0..1}.tar\n")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(folder))

        def do_GET(self):
            if "secret" not in self.path or self.headers.get("Authorization") == "Basic dTpw":
                self.path = self.path.replace("secret", "")
                return super().do_GET()
            return self.send_error(401)

        def log_message(self, *_):
            pass

    with s3_server() as new_bucket, http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}).start()
        bucket = open_objects(new_bucket())
        for name in ("a-0.tar", "a-1.tar"):
            bucket.put(f"d/{name}", (folder / name).read_bytes())
        yield {"folder": str(folder), "host": f"127.0.0.1:{server.server_port}", "bucket": bucket.url}
        server.shutdown()


PLACES: dict[str, tuple[int, str]] = {  # samples, and the arguments
    "relative path": (1, "a-0.tar"),
    "path with spaces": (1, "{folder}/b c.tar"),
    "~ in quotes": (1, "~/a-0.tar"),
    "numbers in braces": (2, "{folder}/a-{{0..1}}.tar"),
    "glob in quotes": (2, "{folder}/a-*.tar"),
    "@FILE": (2, "@list.txt"),
    "file: URL": (1, "file://{folder}/b%20c.tar"),
    "http: URL with a query": (1, "http://{host}/a-0.tar?version=1"),
    "user and password in a URL": (1, "http://u:p@{host}/secreta-0.tar"),
    "object in a bucket": (1, "{bucket}/d/a-0.tar"),
    "glob in a bucket": (2, "{bucket}/d/*.tar"),
    "pipe: with --allow-pipe": (1, "pipe:cat a-0.tar|--allow-pipe"),
    "pipe: without --allow-pipe": (0, "pipe:cat a-0.tar"),
    "pipe: whose command fails": (0, "pipe:exit 7|--allow-pipe"),
    "path of a folder": (0, "{folder}"),
    "path that is not there": (0, "none.tar"),
    "glob without a match": (0, "none-*.tar"),
    "glob on a web server": (0, "http://{host}/*.tar"),
    "@FILE that is not there": (0, "@none.txt"),
    "unknown scheme": (0, "ftp://{host}/a-0.tar"),
    "file: URL with a host": (0, "file://data/a-0.tar"),
    "http: URL that is not there": (0, "http://{host}/none.tar"),
    "http: URL that needs a login": (0, "http://{host}/secreta-0.tar"),
    "http: URL of a login page": (0, "http://{host}/login.tar"),
    "object that is not there": (0, "{bucket}/d/none.tar"),
    "the same tar twice": (0, "a-0.tar|a-0.tar"),
}


@pytest.mark.parametrize("name", PLACES)
def test_plan_uses_or_refuses_every_documented_place(
    tmp_path: Path, places: dict[str, str], tiny_swin: TinyTeacher, capsys, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (outcome, how), (samples, arguments) = _documented()[name], PLACES[name]
    monkeypatch.chdir(places["folder"])
    monkeypatch.setenv("HOME", places["folder"])
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    code = main(["plan", *arguments.format(**places).split("|"), *tiny_swin.arguments, "--json",
                 "--store", str(tmp_path / "store"), "--scratch", str(tmp_path / "scratch")])  # fmt: skip

    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    if outcome == "used":
        assert code == 0, captured.err
        assert json.loads(captured.out)["samples"] == samples
    else:
        assert (code, how in captured.err.splitlines()[-1]) in {(2, True), (3, True)}, captured.err
        assert not (tmp_path / "scratch").exists() or not list((tmp_path / "scratch").iterdir())


# --- labels, folders and parquet files

Arguments = list[str | Path]


def _labelled(folder: Path, member: str, *contents: bytes | None) -> Path:
    """A tar of a good sample for each content of its label's member; without a member for None."""
    members: Members = []
    for number, content in enumerate(contents):
        members.append((f"s{number}.png", PIXELS))
        if content is not None:
            members.append((f"s{number}.{member}", content))
    return _write(folder / "odd.tar", members)


def _classes(folder: Path, *names: str) -> Arguments:
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in names))
    return ["--classes", folder / "classes.txt"]


LABELS: dict[str, Callable[[Path], Arguments]] = {
    "no cls member, --labels optional": lambda folder: [_labelled(folder, "cls", b"2", None), "--labels", "optional"],
    "cls of -1, --labels optional": lambda folder: [_labelled(folder, "cls", b"2", b"-1"), "--labels", "optional"],
    "cls is a word, --labels optional": lambda folder: [_labelled(folder, "cls", b"2", b"cat"), "--labels", "optional"],
    "no labels at all, --labels none": lambda folder: [_labelled(folder, "cls", None, None), "--labels", "none"],
    "no labels at all, --labels optional": lambda folder: [_labelled(folder, "cls", None), "--labels", "optional"],
    "txt member, --label-field txt": lambda folder: [_labelled(folder, "txt", b"2"), "--label-field", "txt"],
    "json member, --label-field json.label": lambda folder: [
        _labelled(folder, "json", b'{"label": 2}'), "--label-field", "json.label"
    ],
    "json member without the field": lambda folder: [
        _labelled(folder, "json", b'{"label": 2}', b'{"class": 2}'), "--label-field", "json.label"
    ],
    "json member that is not JSON": lambda folder: [
        _labelled(folder, "json", b'{"label": 2}', b"{"), "--label-field", "json.label"
    ],
    "json member with a number that is no integer": lambda folder: [
        _labelled(folder, "json", b'{"label": 2}', b'{"label": 2.5}'), "--label-field", "json.label"
    ],
    "class name, --classes FILE": lambda folder: [
        _labelled(folder, "cls", b"cat"), *_classes(folder, "ant", "bee", "cat")
    ],
    "name that --classes lacks": lambda folder: [
        _labelled(folder, "cls", b"ant", b"emu"), *_classes(folder, "ant", "bee")
    ],
    "labels counted from one, --classes FILE": lambda folder: [
        _labelled(folder, "cls", b"1", b"2"), *_classes(folder, "ant", "bee")
    ],
    "label far above the classes": lambda folder: [
        _labelled(folder, "cls", b"1", b"9"), *_classes(folder, "ant", "bee")
    ],
    "--label-field json": lambda folder: [_labelled(folder, "json", b"2"), "--label-field", "json"],
    "--classes FILE that is not there": lambda folder: [
        _labelled(folder, "cls", b"2"), "--classes", folder / "none.txt"
    ],
    "--classes FILE with a name twice": lambda folder: [
        _labelled(folder, "cls", b"0"), *_classes(folder, "ant", "ant")
    ],
    "--classes FILE with an empty line": lambda folder: [
        _labelled(folder, "cls", b"0"), *_classes(folder, "ant", "", "bee")
    ],
}  # fmt: skip


def _tree(folder: Path, files: dict[str, bytes], *options: str | Path) -> Arguments:
    for name, content in files.items():
        (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "tree" / name).write_bytes(content)
    return [folder / "tree", *options]


def _with_link(folder: Path) -> Arguments:
    given = _tree(folder, {"ant/a.png": PIXELS})
    (folder / "tree" / "ant" / "b.png").symlink_to(folder / "tree" / "ant" / "a.png")
    (folder / "tree" / "ant" / "again").symlink_to(folder / "tree")
    return given


def _with_empty_class(folder: Path) -> Arguments:
    (folder / "tree" / "bee").mkdir(parents=True)
    return _tree(folder, {"ant/a.png": PIXELS})


def _not_utf8(folder: Path) -> Arguments:
    (folder / "tree" / "ant").mkdir(parents=True)
    with open(os.fsencode(folder / "tree" / "ant") + b"/caf\xe9.png", "wb") as file:  # noqa: PTH123
        file.write(PIXELS)
    return [folder / "tree"]


FOLDERS: dict[str, Callable[[Path], Arguments]] = {
    "class folders with images": lambda folder: _tree(folder, {"ant/a.png": PIXELS, "bee/b.JPEG": JPEG}),
    "folders below class folders": lambda folder: _tree(folder, {"ant/x/y/a.png": PIXELS}),
    "links to files and folders": _with_link,
    "hidden files and folders": lambda folder: _tree(
        folder, {"ant/a.png": PIXELS, ".git/x.png": b"", "ant/._a.png": b""}
    ),
    "files that are no images": lambda folder: _tree(
        folder, {"ant/a.png": PIXELS, "ant/list.csv": b"x", "README": b"x"}
    ),
    "image in a class folder that cannot be decoded": lambda folder: _tree(
        folder, {"ant/a.png": PIXELS, "ant/b.png": PIXELS[:200]}
    ),
    "images without class folders, --labels none": lambda folder: _tree(
        folder, {"a.png": PIXELS, "b.png": PIXELS}, "--labels", "none"
    ),
    "some images outside of class folders, --labels optional": lambda folder: _tree(
        folder, {"ant/a.png": PIXELS, "b.png": PIXELS}, "--labels", "optional"
    ),
    "some images outside of class folders": lambda folder: _tree(folder, {"ant/a.png": PIXELS, "b.png": PIXELS}),
    "class folder without an image": _with_empty_class,
    "class folder that --classes lacks": lambda folder: _tree(folder, {"ant/a.png": PIXELS}, *_classes(folder, "bee")),
    "two images that differ by extension only": lambda folder: _tree(folder, {"ant/a.png": PIXELS, "ant/a.jpg": JPEG}),
    "file name that is not UTF-8": _not_utf8,
    "folder without images, --input-format folder": lambda folder: _tree(
        folder, {"ant/a.txt": b"x"}, "--input-format", "folder"
    ),
    "two folders": lambda folder: [folder, *_tree(folder, {"ant/a.png": PIXELS}), "--input-format", "folder"],
    "folder that is not there": lambda folder: [folder / "none", "--input-format", "folder"],
    "--label-field with a folder": lambda folder: _tree(folder, {"ant/a.png": PIXELS}, "--label-field", "txt"),
    "--unit-samples 0": lambda folder: _tree(folder, {"ant/a.png": PIXELS}, "--unit-samples", "0"),
}


def _table(folder: Path, *labels: object, images: Sequence[bytes] | None = None, **options) -> Path:
    """A parquet file with a row for each label; null for None."""
    samples = [{"png": PIXELS} | ({} if label is None else {"cls": label}) for label in labels]
    for sample, image in zip(samples, images or (), strict=False):
        sample["png"] = image
    return write_parquet(folder / "odd.parquet", samples, **options)


def _columns(folder: Path, columns: dict) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), folder / "odd.parquet")
    return folder / "odd.parquet"


def _splits(folder: Path) -> Arguments:
    for name in ("train-00000-of-00001", "test-00000-of-00001"):
        write_parquet(folder / f"{name}.parquet", class_samples(2))
    return [folder]


def _dataset_dict(folder: Path) -> Arguments:
    (folder / "odd" / "train").mkdir(parents=True)
    (folder / "odd" / "dataset_dict.json").write_text("{}")
    return [folder / "odd", "--input-format", "parquet"]


def _namesake_tables(folder: Path) -> Arguments:
    return [write_parquet(folder / name / "odd.parquet", class_samples(2)) for name in "ab"]


TABLES: dict[str, Callable[[Path], Arguments]] = {
    "columns image {bytes, path} and label": lambda folder: [_table(folder, 2, 0)],
    "binary column of images": lambda folder: [_columns(folder, {"image": [PIXELS], "label": [2]})],
    "labels in another column, --label-field NAME": lambda folder: [
        _columns(folder, {"image": [PIXELS], "target": [2]}), "--label-field", "target"
    ],
    "class names as labels, --classes FILE": lambda folder: [
        _columns(folder, {"image": [PIXELS], "label": ["bee"]}), *_classes(folder, "ant", "bee")
    ],
    "row without bytes": lambda folder: [_table(folder, 2, 1, images=[PIXELS, b""])],
    "row whose label is null": lambda folder: [_table(folder, 2, None)],
    "row whose label is null, --labels optional": lambda folder: [_table(folder, 2, None), "--labels", "optional"],
    "row whose label is -1": lambda folder: [_table(folder, 2, -1)],
    "no column of labels, --labels none": lambda folder: [_columns(folder, {"image": [PIXELS]}), "--labels", "none"],
    "no column of labels": lambda folder: [_columns(folder, {"image": [PIXELS]})],
    "no column of images": lambda folder: [_columns(folder, {"text": ["x"], "label": [2]})],
    "paths instead of images": lambda folder: [_columns(folder, {"image": ["a.png"], "label": [2]})],
    "label above the schema's class names": lambda folder: [_table(folder, 0, 2, names=("ant", "bee"))],
    "no rows": lambda folder: [_table(folder)],
    "file that is no parquet": lambda folder: [_named(folder, "odd.parquet", b"<html>")],
    "parquet file cut short": lambda folder: [_cut(_table(folder, 2, 0))],
    "Arrow file that is none": lambda folder: [_named(folder, "odd.arrow", b"x" * 100)],
    "parquet file that is not there": lambda folder: [folder / "odd.parquet"],
    "glob of parquet files without a match": lambda folder: [folder / "odd-*.parquet"],
    "two parquet files of one name": _namesake_tables,
    "folder with several splits": _splits,
    "dataset folder with several splits": _dataset_dict,
    "folder without tables, --input-format parquet": lambda folder: [folder, "--input-format", "parquet"],
    "URL of a parquet file": lambda folder: ["https://host/odd.parquet"],
}  # fmt: skip


def _named(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def _cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-200])
    return path


@pytest.mark.parametrize("name", [*LABELS, *FOLDERS, *TABLES])
def test_cache_ends_as_documented_for_every_source(
    tmp_path: Path, tiny_swin: TinyTeacher, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    outcome, how = _documented()[name]
    (tmp_path / "given").mkdir()
    arguments = ({**LABELS, **FOLDERS, **TABLES})[name](tmp_path / "given")

    code = _cache(tmp_path, tiny_swin, [], *map(str, arguments))

    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    if outcome == "error":
        assert code == 2
        error = captured.err.splitlines()[-1]
        assert error.startswith("teacher-service: error: ")
        assert how in error
        assert not (tmp_path / "store").exists()
    else:
        assert code == 0, captured.err
        reasons = open_store(tmp_path / "store").quarantined(0)
        assert len(reasons) == (outcome == "quarantined")
        assert all(how in reason for reason in reasons.values())
