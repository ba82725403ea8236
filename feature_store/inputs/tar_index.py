"""Index of a tar's samples, grouped by webdataset's rules.

webdataset itself is not imported: it imports torch, which takes a process that indexes tars seconds.
"""

import hashlib
import re
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np

from feature_store.errors import InputError
from feature_store.inputs.headers import Headers, Member, Span, read_headers

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "ppm", "tif", "tiff", "gif"})
LABEL_EXTENSION = "cls"
_SHOWN = 8  # members listed in a sample's problem
_NAMED = 3  # files named in a note
_NOWHERE = Span(0, 0)

_META = re.compile(r"__[^/]*__($|/)")  # members that webdataset's tar_file_iterator skips
_KEY = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # webdataset's base_plus_ext: key and extension
HIDDEN_FILES = re.compile(  # what systems leave in folders: .DS_Store, ._name of macOS's tar, .nfs0001
    r"(^|.*/)(\.[^/]*\Z|Thumbs\.db\Z|desktop\.ini\Z|(__MACOSX|\.AppleDouble|\.ipynb_checkpoints|@eaDir)/)", re.DOTALL
)


class Keys(Sequence[str]):
    """Sample keys in one buffer: about 20 bytes a key, where a tuple of strings takes 80.

    Args:
        text: All keys in UTF-8, one after the other.
        ends: Where each key ends in the text, uint32 [samples].
    """

    def __init__(self, text: bytes, ends: np.ndarray) -> None:
        self.text, self.ends = text, ends

    @classmethod
    def of(cls, keys: Sequence[str]) -> "Keys":
        """The same keys in one buffer."""
        encoded = [key.encode() for key in keys]
        return cls(b"".join(encoded), np.cumsum([len(key) for key in encoded], dtype="<u4"))

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, position: int) -> str: ...

    @overload
    def __getitem__(self, position: slice) -> tuple[str, ...]: ...

    def __getitem__(self, position: int | slice) -> str | tuple[str, ...]:
        if isinstance(position, slice):
            return tuple(self)[position]
        at = range(len(self))[position]
        return self.text[int(self.ends[at - 1]) if at else 0 : int(self.ends[at])].decode()

    def __iter__(self) -> Iterator[str]:
        start = 0
        for end in self.ends.tolist():
            yield self.text[start:end].decode()
            start = end

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return repr(tuple(self))


class LabelRule(NamedTuple):
    """Which member of a sample holds its label.

    Attributes:
        member: Its extension; "" where no labels are read.
        required: Whether a sample without it cannot be used.
        most_bytes: A longer member is no label.
    """

    member: str = LABEL_EXTENSION
    required: bool = True
    most_bytes: int = 64


CLASS_INDEX = LabelRule()


class TarIndex(NamedTuple):
    """Samples of a tar, in webdataset's order.

    Attributes:
        keys: Sample keys.
        spans: Offset and size of the image, offset and size of the label, in bytes, int64 [samples, 4]; 0 where there
            is none.
        problems: Reasons why samples cannot be used, by position.
        header_sha256: Hash over names and sizes of all regular members in order.
        notes: Facts about the tar that the user should know: members that belong to no sample, and so on.
    """

    keys: Keys
    spans: np.ndarray
    problems: dict[int, str]
    header_sha256: str
    notes: list[str]


def index_tar(url: str, path: Path, rule: LabelRule = CLASS_INDEX) -> TarIndex:
    """Read all headers of an uncompressed tar.

    Args:
        url: Name of the tar in errors.
        path: The file.
        rule: Where labels are.

    Raises:
        InputError: Not a tar, cut short, damaged, without samples, or with a key or member twice.
        ResourceError: The file cannot be read.
    """
    headers = read_headers(url, path)
    members, notes = _of_samples(headers)
    samples = _group(url, members)
    problems = {i: problem for i, (_, files) in enumerate(samples) if (problem := _problem(files, rule))}
    if headers.damage:
        whole = len(samples) - len(problems)
        raise InputError(f"tar {url} {headers.damage}; {whole} whole samples come before; fetch or make the tar again")
    if not samples:
        found = "".join(f"; {note}" for note in notes)
        raise InputError(f"tar {url} holds no samples ({len(headers.members)} files){found}; take it off the list")
    keys = [key for key, _ in samples]
    _require_unique_keys(url, keys)
    spans = np.array([_spans(files, rule.member) for _, files in samples], "<i8")
    return TarIndex(
        Keys.of(keys), spans, problems, header_sha256((name, size) for name, (_, size) in headers.members), notes
    )


def _of_samples(headers: Headers) -> tuple[list[Member], list[str]]:
    """Members that belong to samples, and notes about the others."""
    members = [member for member in headers.members if not _is_meta(member.name)]
    hidden = [member.name for member in members if HIDDEN_FILES.match(member.name)]
    members = [member for member in members if not HIDDEN_FILES.match(member.name)]
    keyless = [member.name for member in members if not _KEY.match(member.name)]
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


def _group(url: str, members: Sequence[Member]) -> list[tuple[str, dict[str, Span]]]:
    """Samples: key, and the spans of its files by extension. Consecutive members with one key are one sample."""
    samples: list[tuple[str, dict[str, Span]]] = []
    for name, span in members:
        if (match := _KEY.match(name)) is None:
            continue
        key, extension = match[1], match[2].lower()
        if not samples or samples[-1][0] != key:
            samples.append((key, {}))
        if extension in samples[-1][1]:
            raise InputError(f"tar {url} has a member twice: {name}: duplicate file name; make the tar again")
        samples[-1][1][extension] = span
    return samples


def _is_meta(name: str) -> bool:
    return _META.match(name) is not None or ("/" not in name and name.startswith("__") and name.endswith("__"))


def _spans(files: dict[str, Span], label: str) -> tuple[int, ...]:
    image = next((span for extension, span in files.items() if extension in IMAGE_EXTENSIONS), _NOWHERE)
    return *image, *files.get(label, _NOWHERE)


def _problem(files: dict[str, Span], rule: LabelRule) -> str:
    """Why a sample cannot be used; "" if it can, as far as headers tell."""
    images = [extension for extension in files if extension in IMAGE_EXTENSIONS]
    found = _some(list(files), _SHOWN)
    if not images:
        reason = f"no image: members are {found}, expected one of {', '.join(sorted(IMAGE_EXTENSIONS))}"
        if any(extension.rpartition(".")[2] in IMAGE_EXTENSIONS for extension in files):
            reason += "; a key ends at the first dot of the file's name: rename the files so that it is the only one"
        return reason
    if len(images) > 1:
        return f"{len(images)} images ({', '.join(images)}), expected one"
    if rule.member not in files:
        return f"no label: members are {found}, expected one {rule.member}" if rule.required else ""
    if (size := files[rule.member].size) > rule.most_bytes:
        return f"label has {size} bytes, expected a class index in decimal digits"
    return ""


def _require_unique_keys(url: str, keys: Sequence[str]) -> None:
    key, count = Counter(keys).most_common(1)[0]
    if count > 1:
        raise InputError(
            f"tar {url} has {count} samples with key {key!r}, expected one; "
            "give every sample its own name and write a sample's members one after another"
        )


def header_sha256(members: Iterable[tuple[str, int]]) -> str:
    """Hash over names and sizes of files, in order."""
    digest = hashlib.sha256()
    for name, size in members:
        encoded = name.encode()
        digest.update(struct.pack("<QQ", len(encoded), size) + encoded)
    return digest.hexdigest()
