"""From tar patterns to URLs, and from a URL to a plain tar on this machine."""

import bz2
import contextlib
import gzip
import hashlib
import lzma
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlparse
from urllib.request import url2pathname

from webdataset.gopen import gopen, gopen_curl, gopen_schemes, rewrite_url
from webdataset.shardlists import expand_urls

from feature_store.errors import InputError, ResourceError

_DECOMPRESSORS: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
}


def expand_tars(patterns: Sequence[str], *, allow_pipe: bool = False) -> list[str]:
    """Expand patterns to tar URLs, by webdataset's rules.

    ``{000..146}`` counts, ``a::b`` joins two patterns, ``${NAME}`` is the environment variable WDS_NAME.

    Args:
        patterns: Paths and URLs (``file:``, ``http:``, ``https:``, ``sftp:``...).
        allow_pipe: Also accept URLs for which webdataset starts a program: ``pipe:``, ``gs:``, ``hf:``...

    Raises:
        InputError: Nothing listed, a tar listed twice, a broken pattern, an unknown or forbidden scheme.
    """
    patterns = [patterns] if isinstance(patterns, str) else patterns
    urls = [url for pattern in patterns for url in _expand(pattern)]
    if not urls:
        raise InputError("no tars are listed, expected at least one path or URL; name the input tars")
    for url in urls:
        _require_allowed(url, allow_pipe)
    if len(set(urls)) < len(urls):
        twice = next(url for url in urls if urls.count(url) > 1)
        raise InputError(f"tar {twice} is listed twice, expected each tar once; correct the list")
    return urls


def _expand(pattern: str) -> list[str]:
    try:
        urls = expand_urls(pattern)
    except AssertionError as error:  # how webdataset reports an unset variable
        raise InputError(f"tar pattern {pattern!r}: {error}; set it or take it out of the pattern") from error
    except ValueError as error:
        raise InputError(f"tar pattern {pattern!r} is broken: {error}; correct its braces") from error
    if "" in urls:
        raise InputError(f"tar pattern {pattern!r} names an empty path; correct it")
    return urls


def _require_allowed(url: str, allow_pipe: bool) -> None:
    """Refuse what would start a program, judged by what webdataset opens in the end (see its GOPEN_REWRITE)."""
    rewritten = rewrite_url(url)
    scheme = urlparse(rewritten).scheme
    if scheme in ("", "file") or gopen_schemes.get(scheme) is gopen_curl:
        return
    if scheme not in gopen_schemes:
        known = ", ".join(sorted(gopen_schemes.keys() - {"__default__"}))
        raise InputError(
            f"tar {url} has unknown scheme {scheme!r}, expected a path or one of file, {known}; "
            "write ./ before a path with a colon"
        )
    if not allow_pipe:
        raise InputError(
            f"tar {rewritten} would start a program ({scheme}: runs a command on this machine); "
            "if you trust it, allow pipe URLs explicitly"
        )


def tar_name(url: str) -> str:
    """Last component of the URL's path."""
    path = urlparse(url).path if urlparse(url).scheme in ("file", "http", "https") else url
    return path.rstrip("/").rsplit("/", 1)[-1]


def local_tar(url: str, scratch: Path | None) -> Path:
    """Path of the tar, uncompressed, on this machine: the file itself, or a copy if it is not that already.

    Args:
        url: A path or URL from expand_tars.
        scratch: Where copies go; None for a directory of this user under the system's temporary one.

    Raises:
        InputError: Missing, a directory, or damaged compressed data.
        ResourceError: It cannot be fetched, read or copied.
    """
    path = _local_path(url)
    if path is None:
        _require_allowed(url, allow_pipe=True)
        path = copy_once(url, url, scratch, lambda: gopen(url))
    decompress = _decompressor(url, path)
    if decompress is None:
        return path
    stat = path.stat()
    version = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} decompressed"
    return copy_once(url, version, scratch, lambda: _decompressing(url, path, decompress))


def _local_path(url: str) -> Path | None:
    parsed = urlparse(url)
    if parsed.scheme == "file":
        return Path(url2pathname(parsed.path))
    return Path(url) if parsed.scheme == "" else None


def _decompressor(url: str, path: Path) -> Callable[..., Any] | None:
    """What decompresses the file, by its first bytes (not its name); None for an uncompressed one."""
    try:
        with path.open("rb") as file:
            head = file.read(6)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise InputError(f"tar {url} is not there: {error.strerror}; correct the path") from error
    except OSError as error:
        raise ResourceError(f"tar {url} cannot be read: {error}; check permissions and disk") from error
    return next((opener for magic, opener in _DECOMPRESSORS.items() if head.startswith(magic)), None)


@contextlib.contextmanager
def _decompressing(url: str, path: Path, decompress: Callable[..., Any]) -> Iterator[Any]:
    try:
        with decompress(path) as stream:
            yield stream
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        if getattr(error, "errno", None) is not None:  # the disk's trouble, not the data's
            raise
        raise InputError(f"tar {url} is cut short or damaged: {error}; fetch or make it again") from error


def copy_once(url: str, version: str, scratch: Path | None, source: Callable[[], Any]) -> Path:
    """The scratch file of this version of the tar; made unless an earlier run left it.

    Args:
        url: The tar, for messages.
        version: Names the copy: the same one is made only once.
        scratch: As for local_tar.
        source: Opens what is copied, as a context of a readable stream.

    Raises:
        ResourceError: It cannot be copied.
    """
    try:
        directory = _default_scratch() if scratch is None else scratch
        directory.mkdir(parents=True, exist_ok=True)
        copy = directory / f"{hashlib.sha256(version.encode()).hexdigest()[:32]}.tar"
        if not copy.exists():
            with _whole_or_nothing(copy) as file, source() as stream:  # a failed command says so when closed
                shutil.copyfileobj(stream, file, 1 << 20)
    except OSError as error:
        raise ResourceError(
            f"tar {url} cannot be copied to scratch: {error}; check the URL, the network and the disk"
        ) from error
    return copy


@contextlib.contextmanager
def _whole_or_nothing(target: Path) -> Iterator[IO[bytes]]:
    """A file that appears under its name only when all of it is on disk."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f"{target.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(target)
    finally:
        Path(name).unlink(missing_ok=True)


def _default_scratch() -> Path:
    directory = Path(tempfile.gettempdir()) / f"scalekd-tars-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    if directory.stat().st_uid != os.getuid():
        raise ResourceError(f"{directory} belongs to another user; name a scratch directory")
    return directory
