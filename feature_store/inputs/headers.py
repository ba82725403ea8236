"""Reads the headers of a tar."""

import os
import tarfile
from pathlib import Path
from typing import IO, NamedTuple

from feature_store.errors import InputError, ResourceError

_BROKEN = (tarfile.TarError, ValueError, OverflowError)  # what tarfile raises for damaged headers
_CHUNK = 1 << 20


class Span(NamedTuple):
    """Position of a member's content in the tar, in bytes."""

    offset: int
    size: int


class Member(NamedTuple):
    """One regular file of the tar."""

    name: str
    span: Span


class Headers(NamedTuple):
    """Content of a tar's headers.

    Attributes:
        members: Regular files, in order, up to the end or the first damage.
        others: Names of links, devices and pipes, which hold no content.
        archives: Tars in the file: more than one if it was put together with ``cat``.
        damage: Kind and place of the first damage; "" if there is none.
        has_end_mark: Whether zeros follow the last member, as tar programs write them.
    """

    members: list[Member]
    others: list[str]
    archives: int
    damage: str
    has_end_mark: bool


def read_headers(url: str, path: Path) -> Headers:
    """Read all headers of an uncompressed tar, also those behind an end mark, as ``tar -i`` does.

    Args:
        url: Name of the tar in errors.
        path: The file.

    Raises:
        InputError: Not a tar, or a member that cannot be used.
        ResourceError: The file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return _read_archives(url, file)
    except OSError as error:
        raise ResourceError(f"tar {url} cannot be read: {error}; check the disk or mount") from error


def _read_archives(url: str, file: IO[bytes]) -> Headers:
    members: list[Member] = []
    others: list[str] = []
    size, start, archives = file.seek(0, os.SEEK_END), 0, 0
    while True:
        end, damage = _read_archive(url, file, start, members, others)
        if damage:
            whole = [member for member in members if sum(member.span) <= size]
            return Headers(whole, others, archives, damage, has_end_mark=False)
        archives += 1
        following = _first_byte(file, end)
        if following is None:
            return Headers(members, others, archives, "", has_end_mark=end < size)
        start = following - following % tarfile.BLOCKSIZE


def _read_archive(url: str, file: IO[bytes], start: int, members: list[Member], others: list[str]) -> tuple[int, str]:
    """Append the members of one archive; gives its end and its damage ("" for none)."""
    file.seek(start)
    try:
        archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 - the file is the caller's to close
    except _BROKEN as error:
        if start:
            return start, _foreign_tail(file, start)
        raise InputError(f"{url} is not a tar: {error}; name a tar of images and labels") from error
    try:
        for info in archive:
            if info.size < 0:
                return start, f"is damaged: member {info.name!r} has size {info.size}"
            if info.isreg():
                members.append(_member(url, info))
            elif not info.isdir():
                others.append(info.name)
    except _BROKEN as error:
        return start, f"is cut short or damaged: {error} at byte {file.seek(0, os.SEEK_END)}"
    return archive.offset, _tail_damage(file, start, archive.offset)


def _tail_damage(file: IO[bytes], start: int, end: int) -> str:
    """Damage in the bytes where tarfile stopped reading; it stops silently at a bad header."""
    file.seek(end)
    block = file.read(tarfile.BLOCKSIZE)
    if not block.strip(b"\0"):
        return ""  # an end-of-archive block, or nothing: writers that are killed between members leave that
    if start and start == end:
        return _foreign_tail(file, start)
    if len(block) < tarfile.BLOCKSIZE:
        return f"is cut short in the header at byte {end}"
    return f"is damaged in the header at byte {end}"


def _foreign_tail(file: IO[bytes], start: int) -> str:
    size = file.seek(0, os.SEEK_END)
    return (
        f"has {size - start} bytes behind its end mark, from byte {start} on, that are no tar: cut them off "
        f"(truncate -s {start} FILE) if they are not wanted"
    )


def _first_byte(file: IO[bytes], start: int) -> int | None:
    """Position of the next nonzero byte; None if only zeros follow."""
    file.seek(start)
    while chunk := file.read(_CHUNK):
        if stripped := chunk.lstrip(b"\0"):
            return start + len(chunk) - len(stripped)
        start += len(chunk)
    return None


def _member(url: str, info: tarfile.TarInfo) -> Member:
    if info.sparse is not None:
        raise InputError(f"tar {url} stores {info.name!r} as a sparse file; make it again without sparse files")
    try:
        info.name.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"tar {url} has a name that is not UTF-8: {info.name!r}; rename that file") from error
    return Member(info.name, Span(info.offset_data, info.size))
