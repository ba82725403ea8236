"""Scratch copies of remote or compressed tars, one per version."""

import contextlib
import hashlib
import lzma
import os
import re
import shutil
import stat
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlparse

from webdataset.gopen import gopen, rewrite_url

from feature_store.backends.base import PARTIAL_SUFFIX
from feature_store.backends.bucket import RemoteObjects
from feature_store.backends.files import replacing
from feature_store.commits.locks import locked
from feature_store.errors import InputError, ResourceError
from feature_store.inputs.contents import HEAD_BYTES, decompressor, foreign_content
from feature_store.inputs.urls import BUCKETS, WEB, bucket_key, local_path
from feature_store.inputs.web import UnreachableError, open_web

PAUSES = (1, 2, 4, 8, 15)  # seconds before each further try of a web server
_CHUNK = 1 << 20
_BUCKET_CHUNK = 32 << 20  # of one request to a bucket
_FIRST = 64 << 10  # first bytes of a web tar, part of its version: some servers send neither entity tag nor time


def local_tar(url: str, scratch: Path | None) -> tuple[Path, list[str]]:
    """Path of a tar as an uncompressed local file; remote or compressed tars are copied to scratch.

    Args:
        url: A path or URL from expand_tars.
        scratch: Folder for copies; None for a folder of this user under the system's temporary folder.

    Returns:
        The path, and notes for the user.

    Raises:
        InputError: Missing, not a tar, a folder, or damaged compressed data.
        ResourceError: It cannot be fetched, read or copied.
    """
    url, notes = rewrite_url(url), list[str]()
    path = local_path(url)
    if path is None:
        path, notes = _fetched(url, scratch)
    decompress = decompressor(_head(url, path))
    if decompress is None:
        return path, notes
    source = path.stat()
    version = f"{path.resolve()} {source.st_size} {source.st_mtime_ns} decompressed"
    with _told(url):
        unpacked = copy_once(url, version, scratch, lambda file: _decompress(url, path, decompress, file))
    return unpacked, notes


def _head(url: str, path: Path) -> bytes:
    """First bytes of a file, which are those of a tar or of a compressed file."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise InputError(f"tar {url} is a folder; name the tars in it: {url.rstrip('/')}/*.tar")
        if not stat.S_ISREG(mode):  # to open a FIFO would wait for its writer
            raise InputError(f"tar {url} is not a regular file; write a program's output as pipe:COMMAND")
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        what = "tar" if ".tar" in path.name else "file or folder"
        raise InputError(f"{what} {url} is not there: {error.strerror}; correct the path") from error
    except OSError as error:
        raise ResourceError(f"tar {url} cannot be read: {error}; check permissions and disk") from error
    _require_tar(url, head)
    return head


def _require_tar(url: str, head: bytes) -> None:
    if reason := foreign_content(head[:HEAD_BYTES]):
        raise InputError(f"{url} is not a tar: {reason}")


def _decompress(url: str, path: Path, decompress: Callable[..., Any], file: IO[bytes]) -> None:
    try:
        with decompress(path) as stream:
            head = stream.read(HEAD_BYTES)
            _require_tar(url, head)
            file.write(head)
            shutil.copyfileobj(stream, file, _CHUNK)
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        if getattr(error, "errno", None) is not None:  # an error of the disk, not of the data
            raise
        raise InputError(f"tar {url} is cut short or damaged: {error}; fetch or make it again") from error


# --- fetching ------------------------------------------------------------------------------------------------


def _fetched(url: str, scratch: Path | None) -> tuple[Path, list[str]]:
    """A copy of the current version; if the server cannot be reached, the last copy, with a note."""
    scheme = urlparse(url).scheme
    with _told(url):
        if scheme in BUCKETS:
            return _from_bucket(url, scratch), []
        if scheme not in (*WEB, "hf"):
            return copy_once(url, "", scratch, lambda file: _run_program(url, file)), []
        kept = _kept(url, scratch)
        try:
            return _with_retries(lambda: _from_web(url, scratch), () if kept else PAUSES), []
        except UnreachableError as error:
            if kept is None:
                raise
            return kept, [f"{error}; the copy fetched earlier is used"]


def _with_retries(fetch: Callable[[], Path], pauses: Sequence[float]) -> Path:
    for pause in pauses:
        try:
            return fetch()
        except UnreachableError:
            time.sleep(pause)
    return fetch()


def _from_web(url: str, scratch: Path | None) -> Path:
    with open_web(url) as (version, size, stream):
        first = stream.read(_FIRST)
        _require_tar(url, first)

        def write(file: IO[bytes]) -> None:
            file.write(first)
            shutil.copyfileobj(stream, file, _CHUNK)
            if size is not None and file.tell() != size:
                raise UnreachableError(f"tar {url} was cut short: {file.tell()} of {size} bytes came; try again later")

        return copy_once(url, f"{version} {hashlib.sha256(first).hexdigest()}", scratch, write)


def _from_bucket(url: str, scratch: Path | None) -> Path:
    bucket, key = bucket_key(url)
    objects = RemoteObjects(bucket)
    try:
        _require_tar(url, objects.get_range(key, 0, HEAD_BYTES).tobytes())
        version = objects.version(key)
        return copy_once(url, version, scratch, lambda file: copy_object(objects, key, version, file))
    except FileNotFoundError as error:
        raise InputError(f"tar {url} is not there; correct the URL") from error


def copy_object(objects: RemoteObjects, key: str, version: str, file: IO[bytes]) -> None:
    """Copy an object of a known version.

    Raises:
        ResourceError: It was replaced while it was copied.
    """
    while part := objects.get_range(key, file.tell(), _BUCKET_CHUNK).tobytes():
        file.write(part)
        if len(part) < _BUCKET_CHUNK:
            break
    if objects.version(key) != version:
        raise ResourceError(f"{objects.url}/{key} was replaced while it was fetched; start again")


def _run_program(url: str, file: IO[bytes]) -> None:
    """Copy the output of a URL's program, whose version is unknown."""
    try:
        with gopen(url) as stream:  # a failed command says so when closed
            head = stream.read(HEAD_BYTES)
            file.write(head)
            shutil.copyfileobj(stream, file, _CHUNK)
    except OSError as error:
        if (status := re.search(r": exit (\d+) \(read\)", str(error))) is None:
            raise
        raise ResourceError(
            f"the program that reads tar {url} ended with exit code {status[1]}; run it by hand"
        ) from error
    _require_tar(url, head)


@contextlib.contextmanager
def _told(url: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ResourceError(
            f"tar {url} cannot be copied to scratch: {error}; check the URL, the network and the disk"
        ) from error


# --- the scratch folder --------------------------------------------------------------------------------------


def copy_once(url: str, version: str, scratch: Path | None, write: Callable[[IO[bytes]], None]) -> Path:
    """Path of the copy of one version of a tar; written only if it does not exist yet.

    Args:
        url: The tar.
        version: Identifies the content; there is one copy per version.
        scratch: As for local_tar.
        write: Writes the content to an open file.

    Raises:
        OSError: The scratch folder cannot be used.
    """
    directory = _scratch(scratch)
    directory.mkdir(parents=True, exist_ok=True)
    copy = directory / f"{_digest(url)}-{_digest(version)}.tar"
    if not copy.exists():
        with locked(directory / f"{copy.name}.lock"):  # of several processes one fetches, the others wait
            if not copy.exists():
                _write_whole(copy, write)
    return copy


def _write_whole(target: Path, write: Callable[[IO[bytes]], None]) -> None:
    """Write a file that appears under its name only when all of it is on disk."""
    for left in target.parent.glob(f"{target.name}.*{PARTIAL_SUFFIX}"):  # by a killed process: the lock is ours
        left.unlink(missing_ok=True)
    with replacing(target, durable=True) as partial, partial.open("wb") as file:
        write(file)


def _kept(url: str, scratch: Path | None) -> Path | None:
    """The newest copy of any version of the tar."""
    found = _scratch(scratch).glob(f"{_digest(url)}-*.tar")
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _scratch(scratch: Path | None) -> Path:
    if scratch is not None:
        return scratch
    directory = Path(tempfile.gettempdir()) / f"scalekd-tars-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    status = directory.lstat()  # a link to a folder of this user's may be another user's
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise ResourceError(f"{directory} is a link or belongs to another user; name a scratch directory")
    return directory
