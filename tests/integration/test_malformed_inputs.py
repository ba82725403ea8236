"""Malformed and unusual inputs end the way docs/inputs.md says: used, quarantined with a reason, or a clear error."""

import gzip
import io
import re
import struct
import tarfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_jobs import TinyTeacher, encode_image, noise

from feature_store import open_store
from feature_store.cli import main as store_main
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
    "1 x 4000 pixels": [("{}.png", encode_image(noise(1, 4000)))],
    "no cls member": [("{}.png", PIXELS), ("{}.txt", b"3")],
    "cls is a word": [("{}.png", PIXELS), ("{}.cls", b"cat")],
    "cls is negative": [("{}.png", PIXELS), ("{}.cls", b"-1")],
    "cls is empty": [("{}.png", PIXELS), ("{}.cls", b"")],
    "cls has 25 digits": [("{}.png", PIXELS), ("{}.cls", b"1" * 25)],
    "cls has 1000 bytes": [("{}.png", PIXELS), ("{}.cls", b"1" * 1000)],
    "cls with a line break after the number": [("{}.png", PIXELS), ("{}.cls", b" 3\r\n")],
    "two images": [("{}.png", PIXELS), ("{}.jpg", JPEG)],
    "label without image": [],
    "image is a symbolic link": [(_link("{}.png", "/etc/hostname"), b"")],
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
    if any(str(member).endswith((".cls", ".txt")) for member, _ in members):
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
    assert list(_documented()) == [*SAMPLES, *ARCHIVES]
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


def _gzipped(folder: Path, cut: int = 0) -> list[Path]:
    packed = gzip.compress(_write(folder / "plain", GOOD).read_bytes())
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
    "gzip-compressed tar": _gzipped,
    "tar without its end marker": lambda folder: _edited(folder, _without_end),
    "gzip-compressed tar cut short": lambda folder: _gzipped(folder, 40),
    "tar cut short inside a member": lambda folder: _edited(folder, lambda raw: raw[:2000]),
    "tar with a damaged header": lambda folder: _edited(
        folder, lambda raw: raw.replace(b"good.cls", b"bad!.cls"), [*GOOD, ("z.png", PIXELS), ("z.cls", b"1")]
    ),
    "tar without members": lambda folder: [_write(folder / "odd.tar", [])],
    "file of 0 bytes": lambda folder: _file(folder, b""),
    "text named .tar": lambda folder: _file(folder, b"no tar at all " * 1000),
    "folder named .tar": _folder,
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
