"""Class-per-folder trees of image files as SampleSources.

The rules are those of torchvision's ImageFolder: sorted names of class folders are the classes, all image files below
one belong to it. A sample's key is its path in the tree without its extension, as in a tar of the tree.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from feature_store.errors import InputError, Remedy, ResourceError
from feature_store.inputs.base import NO_LABEL
from feature_store.inputs.labels import LabelReader
from feature_store.inputs.listed import ListedUnit
from feature_store.inputs.slices import UnitSlices, shuffled
from feature_store.inputs.tar_index import HIDDEN_FILES, Keys, header_sha256

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"})  # ImageFolder's
_SHOWN = 3  # names listed in a message


class ImageFile(NamedTuple):
    """An image of a tree: path in it (with /), bytes, class index."""

    path: str
    size: int
    label: int


class FolderUnit(ListedUnit):
    """Some images of a tree, as one unit; see SampleSource.

    Args:
        root: The tree.
        files: The images.
        name: Name of the unit.
        header: Hash of the listing and of the slice's place in it.
        notes: Facts about the tree.
    """

    def __init__(self, root: Path, files: Sequence[ImageFile], name: str, header: str, notes: Sequence[str]) -> None:
        labels = np.array([file.label for file in files], np.int64)
        super().__init__(root, name, header, [_key(file.path) for file in files], labels, notes=notes)
        self._root, self._paths = str(root), Keys.of([file.path for file in files])
        self._sizes = np.array([file.size for file in files], np.int64)

    def _image(self, position: int) -> bytes:
        path = os.path.join(self._root, self._paths[position])  # noqa: PTH118 - once per sample
        try:
            with open(path, "rb") as file:  # noqa: PTH123
                data = file.read()
        except FileNotFoundError as error:
            raise InputError(f"{path} is gone since the folder was listed; restore it and start again") from error
        except OSError as error:
            raise ResourceError(f"{path} cannot be read: {error}; check permissions and disk") from error
        if len(data) != self._sizes[position]:
            raise InputError(
                f"{path} changed since the folder was listed: it had {self._sizes[position]} bytes, it has "
                f"{len(data)}; restore it and start again"
            )
        return data


def open_folder(root: Path, labels: LabelReader, slices: UnitSlices) -> tuple[list[FolderUnit], tuple[str, ...]]:
    """Units of a tree, and its class names.

    Args:
        root: The tree.
        labels: Whether images need a class folder; its class names, if there are any, are the only ones accepted.
        slices: Division of images into units.

    Raises:
        InputError: No images, images outside of class folders, an empty or unknown class, or a key twice.
        ResourceError: A folder cannot be read.
    """
    files, classes, notes = _listed(root, labels)
    _require_unique(root, files)
    order = shuffled([_key(file.path) for file in files], slices.seed)
    listing = header_sha256((file.path, file.size) for file in files)
    units = []
    for number, span in enumerate(slices.of(len(files))):
        some = [files[at] for at in order[span.start : span.stop]]
        place = {
            "listing": listing,
            "classes": classes,
            "seed": slices.seed,
            "first": span.start,
            "labels": labels.policy,
        }
        header = hashlib.sha256(json.dumps(place).encode() + header_sha256(file[:2] for file in some).encode())
        units.append(FolderUnit(root, some, f"folder-{number:05}", header.hexdigest(), notes if not number else ()))
    return units, classes


def _listed(root: Path, labels: LabelReader) -> tuple[list[ImageFile], tuple[str, ...], list[str]]:
    """All images, sorted by path; class names; notes."""
    found, hidden, others = list[tuple[str, int]](), list[str](), list[str]()
    for path, size in _walk(root, hidden):
        extension = os.path.splitext(path)[1].lower()  # noqa: PTH122
        if extension in EXTENSIONS:
            found.append((path, size))
        else:
            others.append(path)
    if not found:
        raise InputError(
            f"folder {root} holds no image ({', '.join(sorted(EXTENSIONS))}) among its {len(others)} files; name a "
            "folder of class folders with images"
        )
    found.sort()
    files, classes = _with_labels(root, found, labels)
    notes = [
        f"{root}: {len(names)} {what} ({', '.join(map(repr, sorted(names)[:_SHOWN]))}{', ...' * (len(names) > _SHOWN)})"
        for names, what in (
            (hidden, "hidden files and folders are skipped"),
            (others, "files are no images and are skipped"),
        )
        if names
    ]
    return files, classes, notes


def _with_labels(
    root: Path, found: Sequence[tuple[str, int]], labels: LabelReader
) -> tuple[list[ImageFile], tuple[str, ...]]:
    if labels.policy == "none":
        return [ImageFile(path, size, NO_LABEL) for path, size in found], tuple(labels.classes)
    folders = _class_folders(root)
    loose = [path for path, _ in found if "/" not in path]
    if loose and labels.policy == "required":
        raise InputError(
            f"folder {root} holds {len(loose)} images outside of class folders, the first {loose[0]}; move each into "
            "the folder of its class, or open it with labels optional or none",
            remedy=Remedy.LABELS,
        )
    used = {path.split("/", 1)[0] for path, _ in found}
    if not labels.classes and (empty := [name for name in folders if name not in used]):
        raise InputError(
            f"folder {root} has {len(empty)} class folders without an image, the first {empty[0]!r}: they would shift "
            "the class indexes; remove them, or name all classes",
            remedy=Remedy.LABELS,
        )
    classes = tuple(labels.classes) or tuple(folders)
    if unknown := [name for name in folders if name not in set(classes)]:
        raise InputError(
            f"folder {root} has the class folder {unknown[0]!r}, which is none of the {len(classes)} classes listed; "
            "correct the list or the folder"
        )
    index = {name: at for at, name in enumerate(classes)}
    return [
        ImageFile(path, size, index[path.split("/", 1)[0]] if "/" in path else NO_LABEL) for path, size in found
    ], classes


def _class_folders(root: Path) -> list[str]:
    with os.scandir(root) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not _is_hidden(entry.name))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or any(HIDDEN_FILES.match(each) for each in (name, f"{name}/"))


def _walk(root: Path, hidden: list[str]) -> Iterator[tuple[str, int]]:
    """Path below a tree and bytes of every regular file; links are followed, each folder is entered once."""
    left, seen = [("", str(root))], set[tuple[int, int]]()
    while left:
        prefix, folder = left.pop()
        try:
            status = os.stat(folder)  # noqa: PTH116
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                for entry in entries:
                    if _is_hidden(entry.name):
                        hidden.append(prefix + entry.name)
                    elif entry.is_dir():
                        left.append((f"{prefix}{entry.name}/", entry.path))
                    elif entry.is_file():
                        yield _utf8(prefix + entry.name, root), entry.stat().st_size
        except OSError as error:
            raise ResourceError(f"folder {folder} cannot be read: {error}; check permissions and disk") from error


def _utf8(path: str, root: Path) -> str:
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"folder {root} has a name that is not UTF-8: {path!r}; rename that file") from error
    return path


def _key(path: str) -> str:
    return os.path.splitext(path)[0]  # noqa: PTH122


def _require_unique(root: Path, files: Sequence[ImageFile]) -> None:
    key, count = Counter(_key(file.path) for file in files).most_common(1)[0]
    if count > 1:
        names = ", ".join(file.path for file in files if _key(file.path) == key)
        raise InputError(
            f"folder {root} has {count} images with key {key!r} ({names}), expected one; rename or remove the others: "
            "keys are paths without extension"
        )
