"""File types recognised by their first bytes."""

import bz2
import gzip
import lzma
import tarfile
from collections.abc import Callable
from typing import Any

HEAD_BYTES = tarfile.BLOCKSIZE  # a tar's first header
_SHOWN = 40  # bytes of a foreign file in a message

_DECOMPRESSORS: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
}
_UNPACK = "decompress it with `{} FILE` and give the result"
_OTHERS = {
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", _UNPACK.format("zstd -d")),
    b"\x04\x22\x4d\x18": ("compressed with lz4", _UNPACK.format("lz4 -d")),
    b"\x1f\x9d": ("compressed with compress", _UNPACK.format("uncompress")),
    b"LZIP": ("compressed with lzip", _UNPACK.format("lzip -d")),
    b"\x5d\0\0": ("compressed with lzma", _UNPACK.format("unlzma")),
    b"PK": ("a zip archive", "unpack it and make a tar of its files"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "unpack it and make a tar of its files"),
    b"Rar!": ("a rar archive", "unpack it and make a tar of its files"),
    b"PAR1": ("a Parquet file", "give the input format parquet"),
    b"version https://git-lfs": ("a Git LFS pointer, not the file itself", "fetch the file with `git lfs pull`"),
}


def decompressor(head: bytes) -> Callable[..., Any] | None:
    """The function that opens a compressed file, chosen by its first bytes; None for other files."""
    return next((opener for magic, opener in _DECOMPRESSORS.items() if head.startswith(magic)), None)


def foreign_content(head: bytes) -> str:
    """Why a file that begins with these HEAD_BYTES is not a tar, with a remedy; "" for a tar or a compressed file."""
    if decompressor(head) is not None or (head and not head.strip(b"\0")):  # zeros: a tar without members
        return ""
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        what, remedy = _described(head)
        return f"it is {what}; {remedy}"
    return ""


def _described(head: bytes) -> tuple[str, str]:
    """Type of a file that is not a tar, and the remedy."""
    for magic, description in _OTHERS.items():
        if head.startswith(magic):
            return description
    if not head:
        return "empty (0 bytes)", "fetch or make it again"
    text = head[:_SHOWN].decode("utf-8", "replace")
    if text.lstrip("\ufeff \t\r\n").startswith("<"):
        return f"a web page or XML ({text!a}), perhaps a login or error page", "correct the URL or log in"
    if text.replace("\n", " ").replace("\t", " ").replace("\r", " ").isprintable() and "\ufffd" not in text:
        return f"text ({text!a})", "name a tar of images and labels; a list of tars is given as @FILE"
    if len(head) < HEAD_BYTES:
        return f"cut short ({len(head)} bytes)", "fetch or make it again"
    return f"something else (first bytes {head[:8].hex(' ')})", "name a tar of images and labels"
