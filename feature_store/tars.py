"""Input tars: from patterns to URLs, and from a tar's position to a sample's image and label.

Names follow webdataset: which members make a sample, in which order, what its key is. Nothing is ever
extracted, so a member's name is a key and never a path.
"""

import hashlib
import os
import re
import struct
import tarfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlparse

import numpy as np
from webdataset.gopen import gopen_curl, gopen_schemes, rewrite_url
from webdataset.shardlists import expand_urls
from webdataset.tariterators import group_by_keys

from feature_store.errors import ImageError, InputError, ResourceError
from feature_store.spool import local_tar

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "ppm", "tif", "tiff", "gif"})
LABEL_EXTENSION = "cls"

_BLOCK = tarfile.BLOCKSIZE
_META = re.compile(r"__[^/]*__($|/)")  # as webdataset.tariterators.tar_file_iterator skips them
_OPENING = threading.Lock()


class TarSample(NamedTuple):
    """One sample as it lies in the tar: key, encoded image, class index."""

    key: str
    image: bytes
    label: int


class _Span(NamedTuple):
    """Where a member's bytes lie in the tar."""

    offset: int
    size: int


def expand_tars(patterns: Sequence[str], *, allow_pipe: bool = False) -> list[str]:
    """Expand patterns to tar URLs, by webdataset's rules.

    ``{000..146}`` counts, ``a::b`` joins two patterns, ``${NAME}`` is the environment variable WDS_NAME.

    Args:
        patterns: Paths and URLs (``file:``, ``http:``, ``https:``).
        allow_pipe: Also accept URLs for which webdataset starts a program: ``pipe:``, ``gs:``, ``hf:`` ...

    Raises:
        InputError: Nothing listed, a tar listed twice, a broken pattern, an unknown or forbidden scheme.
    """
    patterns = [patterns] if isinstance(patterns, str) else patterns
    urls = [url for pattern in patterns for url in _expand(pattern)]
    if not urls:
        raise InputError("no tars listed, expected at least one path or URL")
    for url in urls:
        _require_allowed(url, allow_pipe)
    if len(set(urls)) < len(urls):
        twice = next(url for url in urls if urls.count(url) > 1)
        raise InputError(f"tar {twice!r} is listed twice; list every tar once")
    return urls


def _expand(pattern: str) -> list[str]:
    try:
        return expand_urls(pattern)
    except AssertionError as error:  # how webdataset reports an unset variable
        raise InputError(f"tar pattern {pattern!r}: {error}; set it or remove it from the pattern") from error
    except ValueError as error:
        raise InputError(f"tar pattern {pattern!r} is broken: {error}; correct its braces") from error


def _require_allowed(url: str, allow_pipe: bool) -> None:
    rewritten = rewrite_url(url)  # what webdataset will really open, see its GOPEN_REWRITE
    scheme = urlparse(rewritten).scheme
    if not url:
        raise InputError("a tar pattern is empty, expected a path or URL")
    if scheme in ("", "file") or gopen_schemes.get(scheme) is gopen_curl:
        return
    if scheme not in gopen_schemes:
        raise InputError(
            f"tar {url!r} has unknown scheme {scheme!r}, expected a path or one of file, "
            f"{', '.join(sorted(gopen_schemes.keys() - {'__default__'}))}; write ./ before a path with a colon"
        )
    if not allow_pipe:
        raise InputError(
            f"tar {rewritten!r} would start a program on this machine ({scheme}: runs a command); "
            "if you trust it, allow pipes explicitly"
        )


class Tar:
    """One input tar, indexed once, then read at random positions.

    The index is picklable. The file is opened at the first read; all reads name their offset, so threads and
    forked processes may share a Tar.

    Attributes:
        url: Where the tar comes from.
        name: Last component of the URL's path.
        keys: Sample keys in webdataset's order; a sample's index here is its position.
        header_sha256: Hash over names and sizes of all regular members, in order.
    """

    def __init__(self, url: str, path: Path, file_size: int, header_sha256: str, samples: Sequence["_Sample"]) -> None:
        self.url, self.header_sha256 = url, header_sha256
        self.name = _last_component(url)
        self.keys = tuple(sample.key for sample in samples)
        self._path, self._file_size = path, file_size
        self._image_spans = np.array([sample.image or (0, 0) for sample in samples], np.int64)
        self._label_spans = np.array([sample.label or (0, 0) for sample in samples], np.int64)
        self._problems = {i: sample.problem for i, sample in enumerate(samples) if sample.problem}
        self._file: int | None = None

    @classmethod
    def open(cls, url: str, *, scratch: Path | None = None) -> "Tar":
        """Index a tar's headers.

        Args:
            url: A path or URL from expand_tars. (It is opened as it is: check foreign URLs there.)
            scratch: Directory for plain copies of remote and compressed tars, kept for the next run;
                None for one under the system's temporary directory.

        Raises:
            InputError: Missing, not a tar, cut short, empty, or with a key or member twice.
            ResourceError: The file or URL cannot be read.
        """
        path = local_tar(url, scratch)
        members = _read_members(url, path)
        samples = _group(url, members)
        if not samples:
            raise InputError(f"tar {url} holds no samples ({len(members)} files); remove it from the list")
        return cls(url, path, path.stat().st_size, _header_sha256(members), samples)

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, position: int) -> TarSample:
        """Image bytes and label of the sample at a position.

        Raises:
            ImageError: The sample lacks a usable image or label; the message is the reason.
            InputError: No such position, or the file changed since it was indexed.
            ResourceError: The file cannot be read.
        """
        if not 0 <= position < len(self):
            raise InputError(f"tar {self.url} has no position {position}, expected 0 to {len(self) - 1}")
        if position in self._problems:
            raise ImageError(self._problems[position])
        label = self._read(self._label_spans[position]).strip()
        if not label.isdigit():
            raise ImageError(f"label is {label[:20]!r}, expected a class index in decimal digits")
        return TarSample(self.keys[position], self._read(self._image_spans[position]), int(label))

    def close(self) -> None:
        """Close the file; the next read opens it again."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> "Tar":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            self.close()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_file": None}

    def _read(self, span: np.ndarray) -> bytes:
        offset, size = span.tolist()
        try:
            data = os.pread(self._opened(), size, offset)
        except OSError as error:
            raise ResourceError(f"tar {self.url} cannot be read: {error}; check the disk or mount") from error
        if len(data) != size:
            raise InputError(f"tar {self.url} was cut while in use; restore it and start again")
        return data

    def _opened(self) -> int:
        with _OPENING:
            if self._file is None:
                self._file = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
                ...
        return self._file
