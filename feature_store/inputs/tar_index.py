"""The index of a tar: which members make its samples and where their bytes lie, by webdataset's rules."""

import hashlib
import re
import struct
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from webdataset.tariterators import base_plus_ext, group_by_keys

from feature_store.errors import InputError
from feature_store.inputs.headers import Headers, Member, Span, read_headers

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "ppm", "tif", "tiff", "gif"})
LABEL_EXTENSION = "cls"
_LONGEST_LABEL = 64  # bytes; a longer member is no class index
_SHOWN = 8  # members listed in a sample's problem
_NAMED = 3  # files named in a note

_META = re.compile(r"__[^/]*__($|/)")  # members that webdataset's tar_file_iterator skips
HIDDEN_FILES = re.compile(  # what systems leave in folders: .DS_Store, ._name of macOS's tar, .nfs0001
    r"(^|.*/)(\.[^/]*\Z|Thumbs\.db\Z|desktop\.ini\Z|(__MACOSX|\.AppleDouble|\.ipynb_checkpoints|@eaDir)/)", re.DOTALL
)


class SampleIndex(NamedTuple):
    """One sample: its key, where its image and label lie, and why it cannot be used, if so."""

    key: str
    image: Span
    label: Span
    problem: str


class TarIndex(NamedTuple):
    """What a tar holds.

    Attributes:
        samples: In webdataset's order.
        header_sha256: Hash over names and sizes of all regular members in order.
        notes: What the user should know: members that belong to no sample, and so on.
    """

    samples: list[SampleIndex]
    header_sha256: str
    notes: list[str]


def index_tar(url: str, path: Path) -> TarIndex:
    """Read all headers of an uncompressed tar.

    Args:
        url: What to call it in errors.
        path: Where it lies.

    Raises:
        InputError: Not a tar, cut short, damaged, without samples, or with a key or member twice.
        ResourceError: The file cannot be read.
    """
    headers = read_headers(url, path)
    members, notes = _of_samples(headers)
    samples = _group(url, members)
    if headers.damage:
        whole = sum(not sample.problem for sample in samples)
        raise InputError(f"tar {url} {headers.damage}; {whole} whole samples come before; fetch or make the tar again")
    if not samples:
        found = "".join(f"; {note}" for note in notes)
        raise InputError(f"tar {url} holds no samples ({len(headers.members)} files){found}; take it off the list")
    _require_unique_keys(url, samples)
    return TarIndex(samples, _header_sha256(headers.members), [f"{url}: {note}" for note in notes])


def _of_samples(headers: Headers) -> tuple[list[Member], list[str]]:
    """The members that belong to samples, and what to say of the others."""
    members = [member for member in headers.members if not _is_meta(member.name)]
    hidden = [member.name for member in members if HIDDEN_FILES.match(member.name)]
    members = [member for member in members if not HIDDEN_FILES.match(member.name)]
    keyless = [member.name for member in members if base_plus_ext(member.name)[0] is None]
    notes = [
        _counted(names, what)
        for names, what in (
            (hidden, "hidden files are skipped"),
            (keyless, "files without an extension belong to no sample"),
            (headers.others, "links, devices and pipes are skipped"),
        )
        if names
    ]
    if headers.archives > 1:
        notes.append(f"it is {headers.archives} tars one after another; all are read, as by tar -i")
    if not headers.has_end_mark and not headers.damage:
        notes.append("it has no end mark, so it may be cut short; all its members are whole")
    return members, notes


def _counted(names: Sequence[str], what: str) -> str:
    return f"{len(names)} {what} ({_some([repr(name) for name in names[: _NAMED + 1]], _NAMED)})"


def _some(names: Sequence[str], count: int) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def _group(url: str, members: Sequence[Member]) -> list[SampleIndex]:
    files = ({"fname": member.name, "data": member.span, "__url__": url} for member in members)
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
    extensions = [extension for extension in sample if not extension.startswith("__")]
    found = _some(extensions, _SHOWN)
    if not images:
        reason = f"no image: members are {found}, expected one of {', '.join(sorted(IMAGE_EXTENSIONS))}"
        if any(extension.rpartition(".")[2] in IMAGE_EXTENSIONS for extension in extensions):
            reason += "; a key ends at the first dot of the file's name: rename the files so that it is the only one"
        return reason
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
