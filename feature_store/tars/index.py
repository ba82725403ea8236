"""The index of a tar: which members make its samples and where their bytes lie, by webdataset's rules."""

import hashlib
import os
import re
import struct
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple

from webdataset.tariterators import group_by_keys

from feature_store.errors import InputError, ResourceError

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "ppm", "tif", "tiff", "gif"})
LABEL_EXTENSION = "cls"
_LONGEST_LABEL = 64  # bytes; a longer member is no class index

_BROKEN = (tarfile.TarError, ValueError, OverflowError)  # what tarfile raises for damaged headers
_META = re.compile(r"__[^/]*__($|/)")  # members that webdataset's tar_file_iterator skips


class Span(NamedTuple):
    """Where a member's content lies in the tar, in bytes."""

    offset: int
    size: int


class Member(NamedTuple):
    """One regular file of the tar."""

    name: str
    span: Span


class SampleIndex(NamedTuple):
    """One sample: its key, where its image and label lie, and why it cannot be used, if so."""

    key: str
    image: Span
    label: Span
    problem: str


def index_tar(url: str, path: Path) -> tuple[list[SampleIndex], str]:
    """Read all headers of an uncompressed tar.

    Args:
        url: What to call it in errors.
        path: Where it lies.

    Returns:
        Its samples in webdataset's order, and the hash over names and sizes of all regular members in order.

    Raises:
        InputError: Not a tar, cut short, damaged, without samples, or with a key or member twice.
        ResourceError: The file cannot be read.
    """
    try:
        with path.open("rb") as file:
            members, damage = _read_headers(url, file)
    except OSError as error:
        raise ResourceError(f"tar {url} cannot be read: {error}; check the disk or mount") from error
    samples = _group(url, members)
    if damage:
        whole = sum(not sample.problem for sample in samples)
        raise InputError(f"tar {url} {damage}; {whole} whole samples come before; fetch or make the tar again")
    if not samples:
        raise InputError(f"tar {url} holds no samples ({len(members)} files); take it off the list")
    _require_unique_keys(url, samples)
    return samples, _header_sha256(members)


def _read_headers(url: str, file: IO[bytes]) -> tuple[list[Member], str]:
    """Regular members up to the end or the first damage, and what the damage is ("" for none)."""
    members: list[Member] = []
    try:
        archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 - the file is the caller's to close
    except _BROKEN as error:
        raise InputError(f"{url} is not a tar: {error}; name a tar of images and labels") from error
    try:
        for info in archive:
            if info.size < 0:
                return members, f"is damaged: member {info.name!r} has size {info.size}"
            if info.isreg():
                members.append(_member(url, info))
    except _BROKEN as error:
        end = file.seek(0, os.SEEK_END)
        whole = [member for member in members if sum(member.span) <= end]
        return whole, f"is cut short or damaged: {error} at byte {end}"
    return members, _tail_damage(file, archive.offset)


def _tail_damage(file: IO[bytes], end: int) -> str:
    """What is wrong with the bytes where tarfile stopped reading; it stops silently at a bad header."""
    file.seek(end)
    block = file.read(tarfile.BLOCKSIZE)
    if not block.strip(b"\0"):
        return ""  # an end-of-archive block, or nothing: writers that are killed between members leave that
    if len(block) < tarfile.BLOCKSIZE:
        return f"is cut short in the header at byte {end}"
    return f"is damaged in the header at byte {end}"


def _member(url: str, info: tarfile.TarInfo) -> Member:
    if info.sparse is not None:
        raise InputError(f"tar {url} stores {info.name!r} as a sparse file; make it again without sparse files")
    try:
        info.name.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"tar {url} has a name that is not UTF-8: {info.name!r}; rename that file") from error
    return Member(info.name, Span(info.offset_data, info.size))


def _group(url: str, members: Sequence[Member]) -> list[SampleIndex]:
    files = (
        {"fname": member.name, "data": member.span, "__url__": url} for member in members if not _is_meta(member.name)
    )
    try:
        return [_sample_index(sample) for sample in group_by_keys(files)]
    except ValueError as error:  # its first argument is webdataset's text, the others are objects of its own
        raise InputError(f"tar {url} has a member twice: {error.args[0]}; make the tar again") from error


def _is_meta(name: str) -> bool:
    return _META.match(name) is not None or ("/" not in name and name.startswith("__") and name.endswith("__"))


def _sample_index(sample: dict[str, Span]) -> SampleIndex:
    images = [extension for extension in sample if extension in IMAGE_EXTENSIONS]
    label = sample.get(LABEL_EXTENSION, Span(0, 0))
    image = sample[images[0]] if images else Span(0, 0)
    return SampleIndex(str(sample["__key__"]), image, label, _problem(sample, images, label))


def _problem(sample: dict[str, Span], images: Sequence[str], label: Span) -> str:
    found = ", ".join(extension for extension in sample if not extension.startswith("__"))
    if not images:
        return f"no image: members are {found}, expected one of {', '.join(sorted(IMAGE_EXTENSIONS))}"
    if len(images) > 1:
        return f"{len(images)} images ({', '.join(images)}), expected one"
    if LABEL_EXTENSION not in sample:
        return f"no label: members are {found}, expected one {LABEL_EXTENSION}"
    if label.size > _LONGEST_LABEL:
        return f"label has {label.size} bytes, expected a class index in decimal digits"
    return ""


def _require_unique_keys(url: str, samples: Sequence[SampleIndex]) -> None:
    key, count = Counter(sample.key for sample in samples).most_common(1)[0]
    if count > 1:
        raise InputError(
            f"tar {url} has {count} samples with key {key!r}, expected one; "
            "give every sample its own name and write a sample's members one after another"
        )


def _header_sha256(members: Sequence[Member]) -> str:
    digest = hashlib.sha256()
    for name, (_, size) in members:
        encoded = name.encode()
        digest.update(struct.pack("<QQ", len(encoded), size) + encoded)
    return digest.hexdigest()
