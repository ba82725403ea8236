"""An input tar as a SampleSource.

Nothing is ever extracted, so a member's name is a key and never a path.
"""

import copy
import hashlib
import os
import tarfile
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from webdataset.gopen import rewrite_url

from feature_store.backends.local import OpenFile
from feature_store.errors import ImageError, InputError, Remedy, ResourceError, UserError
from feature_store.inputs.base import NO_LABEL, Sample, require_position, require_usable, source_notes
from feature_store.inputs.copies import local_tar
from feature_store.inputs.indexing import Indexer
from feature_store.inputs.labels import TarLabels
from feature_store.inputs.options import DEFAULT, TarOptions
from feature_store.inputs.tar_index import Keys, TarIndex
from feature_store.inputs.urls import expand_tars, local_path, tar_name

__all__ = ["Tar", "TarSample", "expand_tars", "open_tars", "tar_notes"]

CLASS_INDEXES = TarLabels()
"""Labels are class indexes in members cls."""

_MOST_OPEN = 64  # files per process; many systems let a process open fewer than a data set has tars
_TAIL = 64  # bytes at an image's end: JPEG's last coded block, PNG's checksum; beside the next header, so cheap to read


TarSample = Sample
tar_notes = source_notes

_opened: deque["weakref.ref[Tar]"] = deque()  # most recently opened tars, oldest first


class Tar:
    """One input tar, indexed once, then read at random positions.

    Its file is opened at the first read, and closed when many others were opened since. Every read names its own
    offset (pread), so threads and forked processes may share a Tar. A pickled Tar carries its index and opens the file
    again.

    Attributes:
        url: Path or URL of the tar.
        name: Last component of the URL's path.
        keys: Sample keys in webdataset's order; a sample's index here is its position.
        header_sha256: Hash over names and sizes of all regular members, in order.
        notes: Facts that the user should know: files that belong to no sample, and so on.
        problems: Reasons why samples cannot be used, by position, as far as headers tell.
    """

    def __init__(
        self,
        url: str,
        path: Path,
        index: TarIndex,
        notes: Sequence[str] = (),
        labels: TarLabels = CLASS_INDEXES,
    ) -> None:
        self.url, self.name, self.notes = url, tar_name(url), (*notes, *(f"{url}: {note}" for note in index.notes))
        self.keys, self.problems, self.header_sha256 = index.keys, index.problems, index.header_sha256
        self._spans = index.spans  # arrays: every worker process gets those of all of a data set's samples
        self._labels = labels
        self._path, self._file_size = path, path.stat().st_size

    @classmethod
    def open(cls, url: str, *, scratch: Path | None = None, labels: TarLabels = CLASS_INDEXES) -> "Tar":
        """Open one tar: with its kept index, or by reading its headers.

        Args:
            url: A path or URL from expand_tars, which checks it; no check is made here.
            scratch: Folder for copies of remote and compressed tars, kept for later runs; None for one under the
                system's temporary folder.
            labels: Where labels are; default class indexes in members cls, which every sample needs.

        Raises:
            InputError: Missing, not a tar, cut short, without samples, or with a key or member twice.
            ResourceError: The file or URL cannot be read.
        """
        (tar,) = opened_tars([url], scratch, labels)
        return tar

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, position: int) -> TarSample:
        """Image bytes and label of the sample at a position.

        Raises:
            ImageError: The sample has no usable image or label; the message is the reason to quarantine it.
            InputError: No such position, or the file changed since it was indexed.
            ResourceError: The file cannot be read.
        """
        label = self.label(position)
        return TarSample(self.keys[position], self._read(*self._spans[position, :2].tolist()), label)

    def label(self, position: int) -> int:
        """Class index of the sample at a position, without its image.

        Raises:
            ImageError: See read.
            InputError: See read.
            ResourceError: See read.
        """
        require_position(self, position)
        offset, size = self._spans[position, 2:].tolist()
        if not offset:
            return NO_LABEL
        try:
            return self._labels.index(self._read(offset, size))
        except ImageError:
            raise
        except InputError as error:
            raise InputError(f"sample {self.keys[position]!r} of {self.url}: {error}") from error

    def content_sha256(self) -> str:
        """Hash over headers, labels and image endings: differs for tars whose members only have equal names and sizes.

        Raises:
            InputError: The file changed since it was indexed.
            ResourceError: The file cannot be read.
        """
        digest = hashlib.sha256(self.header_sha256.encode())
        for position, (offset, size, *label) in enumerate(self._spans.tolist()):
            if position not in self.problems:
                tail = min(size, _TAIL)
                digest.update(self._read(*label) + b"\n" + self._read(offset + size - tail, tail))
        return digest.hexdigest()

    def arranged(self, keys: Sequence[str]) -> "Tar":
        """The same samples at the positions of these keys; a key without a sample is one that cannot be used."""
        at = {key: position for position, key in enumerate(self.keys)}
        order = [at.get(key, -1) for key in keys]
        arranged = copy.copy(self)
        arranged.keys, arranged._spans = Keys.of(keys), self._spans[order]
        lacking = {position: "it is no sample" for position, source in enumerate(order) if source < 0}
        arranged.problems = lacking | {
            position: self.problems[source] for position, source in enumerate(order) if source in self.problems
        }
        return arranged

    def close(self) -> None:
        """Close the file; the next read opens it again."""
        self.__dict__.pop("_file", None)  # closed when no thread reads from it any more

    def __enter__(self) -> "Tar":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_file"}

    def _read(self, offset: int, size: int) -> bytes:
        try:
            file = self._open_file()
            data = os.pread(file.descriptor, size, offset)
        except OSError as error:
            raise ResourceError(f"tar {self.url} cannot be read: {error}; check the disk or mount") from error
        if len(data) != size:
            raise InputError(f"tar {self.url} was cut short while in use; restore it and start again")
        return data

    def _open_file(self) -> OpenFile:
        if (file := self.__dict__.get("_file")) is not None:
            return file
        file = OpenFile(str(self._path))
        size = os.fstat(file.descriptor).st_size
        if size != self._file_size:
            raise InputError(
                f"tar {self.url} changed while in use: {self._file_size} bytes when it was indexed, {size} now; "
                "start again"
            )
        self._require_header(file)
        kept = self.__dict__.setdefault("_file", file)  # atomic: of two threads opening at once, one wins
        _opened.append(weakref.ref(self))
        while len(_opened) > _MOST_OPEN:
            with suppress(IndexError):  # another thread was faster
                if (other := _opened.popleft()()) is not None:
                    other.close()
        return kept

    def _require_header(self, file: OpenFile) -> None:
        """Refuse a file with other members than its index says, judged by the header before the last image."""
        start = int(self._spans[:, 0].max()) - tarfile.BLOCKSIZE
        try:
            if start >= 0:
                tarfile.TarInfo.frombuf(os.pread(file.descriptor, tarfile.BLOCKSIZE, start), "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise InputError(
                f"tar {self.url} has no member at byte {start}, where it had one when it was indexed: it was replaced "
                "while its size and times stayed; run `touch` on it and start again"
            ) from error


def open_tars(patterns: Sequence[str], options: TarOptions = DEFAULT, labels: TarLabels = CLASS_INDEXES) -> list[Tar]:
    """Open tars by path, pattern or URL; at least one of their samples can be used.

    Raises:
        InputError: No tar, one that cannot be used, or none of all samples has an image and a label.
        ResourceError: A file or URL cannot be read.
    """
    tars = list(opened_tars(expand_tars(patterns, allow_pipe=options.allow_pipe), options.scratch, labels))
    where = f"one member {labels.rule.member} with" if labels.rule.member else "no label, or"
    require_usable(
        tars,
        "tars",
        f"Give every sample one image and {where} its class index in decimal digits, or say which labels they have",
        Remedy.LABELS,
    )
    return tars


def opened_tars(urls: Sequence[str], scratch: Path | None, labels: TarLabels = CLASS_INDEXES) -> Iterator[Tar]:
    """Open tars in order, many indexed in parallel; an error is that of the first one that cannot be used."""
    begun = deque[_Begun]()
    with Indexer(labels.rule) as indexer:
        for url in urls:
            try:
                begun.append(_begin(url, scratch, indexer, labels))
            except UserError:
                yield from (each.tar() for each in begun)
                raise
            while begun and begun[0].indexed.done():
                yield begun.popleft().tar()
        yield from (each.tar() for each in begun)


def _begin(url: str, scratch: Path | None, indexer: Indexer, labels: TarLabels) -> "_Begun":
    path, notes = local_path(rewrite_url(url)), list[str]()
    if path is None or (index := indexer.kept(path)) is None:
        path, notes = local_tar(url, scratch)
        index = indexer.submit(url, path)
    return _Begun(url, path, notes, index, labels)


class _Begun(NamedTuple):
    """A tar that is being indexed."""

    url: str
    path: Path
    notes: list[str]
    indexed: "Future[TarIndex]"
    labels: TarLabels

    def tar(self) -> Tar:
        """The tar, as soon as it is indexed."""
        try:
            return Tar(self.url, self.path, self.indexed.result(), self.notes, self.labels)
        except InputError:
            if self.path != local_path(self.url):
                self.path.unlink(missing_ok=True)  # a copy: the next run fetches it anew
            raise
