"""Parquet files or Hugging Face dataset folders as SampleSources.

A unit is a run of rows of the row groups in seeded order, so that reading a unit decodes few row groups, each once.
Only the row group that is read is in memory.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from feature_store.errors import ImageError, InputError, Remedy
from feature_store.inputs.base import NO_LABEL
from feature_store.inputs.labels import LabelReader
from feature_store.inputs.listed import ListedUnit
from feature_store.inputs.slices import UnitSlices, shuffled
from feature_store.inputs.tables import ParquetTable, TableFile, column_images, open_table
from feature_store.inputs.tar_index import header_sha256
from feature_store.inputs.urls import local_path

IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp")
LABEL_COLUMNS = ("label", "labels", "fine_label", "cls")
MOST_GROUP_BYTES = 2 << 30
"""Images of a row group, uncompressed: it is in memory as a whole, in every decode worker."""

_SHARD = re.compile(r"(.+?)-\d{5}(-of-\d{5})?$")
_SPLIT_WORDS = {
    "train", "training", "test", "testing", "val", "valid", "validation", "dev", "holdout", "extra", "unlabeled",
    "unlabelled", "unsupervised",
}  # fmt: skip
_DIGITS = 7  # of a row's number in its key


class RowGroup(NamedTuple):
    """A row group: number of its file, its number there, first row in the file, rows, bytes of images."""

    file: int
    number: int
    first: int
    rows: int
    bytes: int


class ParquetUnit(ListedUnit):
    """Some rows of parquet or Arrow files, as one unit; see SampleSource.

    Args:
        files: All files.
        groups: Row group of each row, int32 [samples, 2]: number of the file, of the group.
        rows: Row in the file and in the group, int64 [samples, 2].
        labels: Class indexes.
        column: Column of the images.
        name: Name of the unit.
        header: Hash of listing and place.
        problems: Rows without a usable label.
        notes: Facts that the user should know.
    """

    def __init__(
        self,
        files: Sequence[TableFile],
        groups: np.ndarray,
        rows: np.ndarray,
        labels: np.ndarray,
        column: str,
        name: str,
        header: str,
        problems: dict[int, str],
        notes: Sequence[str],
    ) -> None:
        keys = [row_key(files[file], int(row)) for file, row in zip(groups[:, 0], rows[:, 0], strict=True)]
        super().__init__(Path(files[0].path).parent, name, header, keys, labels, problems=problems, notes=notes)
        self._files, self._groups, self._rows, self._column = tuple(files), groups, rows, column

    def _image(self, position: int) -> bytes:
        file, number = self._groups[position].tolist()
        values = column_images(self._files[file], number, self._column)
        value = values[int(self._rows[position, 1])].as_py()
        if isinstance(value, dict):
            value = _of_struct(value)
        if not value:
            raise ImageError("no image: the row has no bytes; embed the images in the file")
        return value


def _of_struct(value: dict[str, Any]) -> bytes | None:
    if value.get("bytes"):
        return value["bytes"]
    if path := value.get("path"):
        raise ImageError(f"no image: the row names the file {path!r} and has no bytes; embed the images in the file")
    return None


def row_key(file: TableFile, row: int) -> str:
    """Key of a row: the file's name without extension and the row's number, the same on every machine."""
    return f"{file.stem}/{row:0{_DIGITS}}"


def open_parquet(
    patterns: Sequence[str], labels: LabelReader, field: str, slices: UnitSlices
) -> tuple[list[ParquetUnit], tuple[str, ...]]:
    """Units of parquet files or a dataset folder, and the class names in their schema.

    Args:
        patterns: Files (``.parquet``, ``.arrow``), or one folder that holds them.
        labels: Whether rows need labels; its class names, if there are any, give the indexes. Integers mean the names
            of their file's schema, which may be in another order.
        field: Column of the labels; "" for the first of LABEL_COLUMNS that is there.
        slices: Division of rows into units.

    Raises:
        InputError: pyarrow is missing, no such files or columns, class names that contradict each other, or row groups
            too large to read.
        ResourceError: A file cannot be read.
    """
    files = _listed(patterns)
    column, label_column = _columns(files[0], field, labels.policy)
    classes, names = tuple(labels.classes), _class_names(files[0], label_column)
    renamed = bool(names) and len(names) == len(classes) and not set(names) & set(classes)
    classes = classes or _common_names(files, label_column)
    reader = LabelReader(labels.policy, names if renamed else classes)
    groups, values = list[RowGroup](), list[np.ndarray]()
    problems: dict[tuple[int, int], str] = {}
    for number, file in enumerate(files):
        _require_same_columns(file, column, label_column)
        groups += _row_groups(number, file, column)
        values.append(_labels(number, file, label_column, reader, problems))
    if not sum(group.rows for group in groups):
        raise InputError(f"{files[0].path} hold no rows; name files with images")
    order = shuffled([f"{files[group.file].stem}/{group.number}" for group in groups], slices.seed)
    rows = np.concatenate([_rows_of(groups[at]) for at in order])
    listing = header_sha256((f"{files[group.file].stem}/{group.number}/{group.rows}", group.bytes) for group in groups)
    content = hashlib.sha256(b"".join(each.tobytes() for each in values)).hexdigest()
    spelled = f"the schema's names ({', '.join(names[:2])}...) are taken for the classes ({', '.join(classes[:2])}...)"
    notes = [f"{files[0].path}: {spelled}, in their order"] if renamed else []
    units = []
    for number, span in enumerate(slices.of(len(rows))):
        some = rows[span.start : span.stop]
        of_unit = np.array([values[file][row] for file, row in some[:, (0, 2)].tolist()], np.int64)
        bad = {
            at: problems[file, row]
            for at, (file, row) in enumerate(some[:, (0, 2)].tolist())
            if (file, row) in problems
        }
        place = {"listing": listing, "labels": content, "seed": slices.seed, "first": span.start, "rows": len(some)}
        header = hashlib.sha256(json.dumps({**place, "classes": classes, "policy": labels.policy}).encode())
        name = f"parquet-{number:05}"
        unit = ParquetUnit(
            files,
            some[:, :2].astype(np.int32),
            some[:, 2:],
            of_unit,
            column,
            name,
            header.hexdigest(),
            bad,
            () if number else notes,
        )
        units.append(unit)
    return units, classes


def _rows_of(group: RowGroup) -> np.ndarray:
    """Rows of a group, int64 [rows, 4]: file, group, row in the file, row in the group."""
    inside = np.arange(group.rows)
    same = np.ones_like(inside)
    return np.stack([same * group.file, same * group.number, group.first + inside, inside], axis=1)


# --- listing -------------------------------------------------------------------------------------------------


def _listed(patterns: Sequence[str]) -> list[TableFile]:
    """The files in order of their names.

    Raises:
        InputError: None, or several splits of a data set.
    """
    paths = [path for pattern in patterns for path in _paths(_local(pattern))]
    files = []
    for path in paths:
        try:
            status = path.stat()
        except OSError as error:
            raise InputError(f"{path} is not there: {error.strerror}; correct the path") from error
        files.append(TableFile(str(path), path.stem, status.st_size, status.st_mtime_ns))
    files.sort(key=lambda file: file.stem)
    for file, following in pairwise(files):
        if file.stem == following.stem:
            raise InputError(f"{file.path} and {following.path} have one name, which keys are made of; rename one")
    return files


def _local(pattern: str) -> Path:
    path = local_path(pattern)
    if path is None:
        raise InputError(f"{pattern} is a URL; parquet files are read from the disks of this machine: copy it there")
    return path.expanduser()


def _paths(path: Path) -> Iterator[Path]:
    if "*" in path.name:
        found = sorted(path.parent.glob(path.name))
        if not found:
            raise InputError(f"{path} matches no file; correct it")
        yield from found
        return
    if not path.is_dir():
        yield path
        return
    if (path / "dataset_dict.json").exists():
        splits = sorted(each.name for each in path.iterdir() if each.is_dir())
        raise InputError(f"{path} holds the splits {', '.join(splits)}; name one: {path / (splits or ['train'])[0]}")
    found = sorted(each for kind in ("*.parquet", "*.arrow") for each in path.rglob(kind))
    found = [each for each in found if not each.name.startswith((".", "cache-"))]
    if not found:
        raise InputError(f"folder {path} holds no .parquet or .arrow file; name parquet files or a dataset folder")
    one_split = {split: each for each in reversed(found) if (split := _split(each.relative_to(path)))}
    if len(one_split) > 1:
        name, one = min(one_split.items())
        stems = re.sub(r"\d+(-of-\d+)?$", "*", one.stem) if name in one.stem.lower() else "*"
        raise InputError(
            f"folder {path} holds the splits {', '.join(sorted(one_split))}; name the files of one in quotes: "
            f"'{one.parent}/{stems}{one.suffix}'"
        )
    yield from found


def _split(file: Path) -> str | None:
    """The split that a file's path or name tells; None if it tells none."""
    words = [word for part in file.with_suffix("").parts for word in re.split(r"[^a-z]+", part.lower())]
    word = next((word for word in reversed(words) if word in _SPLIT_WORDS), None)
    shard = _SHARD.match(file.stem)
    return word or (shard[1] if shard else None)


def _columns(file: TableFile, field: str, policy: str) -> tuple[str, str | None]:
    """Columns of images and labels."""
    schema = open_table(file).schema
    image = next((name for name in IMAGE_COLUMNS if name in schema.names), None)
    if image is None or not _holds_images(schema.field(image).type):
        raise InputError(
            f"{file.path} has no column of images: expected {', '.join(IMAGE_COLUMNS)} of binary values or "
            f"structs {{bytes, path}}, got {', '.join(f'{each.name} ({each.type})' for each in schema)}; "
            "rename the column"
        )
    if policy == "none":
        return image, None
    label = field or next((name for name in LABEL_COLUMNS if name in schema.names), None)
    if label is None or label not in schema.names:
        if policy == "optional" and not field:
            return image, None
        raise InputError(
            f"{file.path} has no column {label or ' or '.join(LABEL_COLUMNS)}, got {', '.join(schema.names)}; name "
            "the column of labels, or open it with labels none",
            remedy=Remedy.LABELS,
        )
    return image, label


def _holds_images(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _class_names(file: TableFile, label: str | None) -> tuple[str, ...]:
    """Names of a ClassLabel column, as the datasets library writes them into a schema."""
    try:
        feature = json.loads((open_table(file).schema.metadata or {})[b"huggingface"])["info"]["features"][label]
        names = feature.get("names") or feature["feature"]["names"]
        return tuple(map(str, names))
    except (KeyError, TypeError, ValueError, AttributeError):
        return ()


def _require_same_columns(file: TableFile, image: str, label: str | None) -> None:
    lacking = {image, *([] if label is None else [label])} - set(open_table(file).schema.names)
    if lacking:
        raise InputError(f"{file.path} lacks the column {min(lacking)} of the other files; name files of one data set")


def _row_groups(number: int, file: TableFile, column: str) -> list[RowGroup]:
    found, first = [], 0
    opened = open_table(file)
    for at, (rows, size) in enumerate(opened.groups(column)):
        if size > MOST_GROUP_BYTES and isinstance(opened, ParquetTable):
            raise InputError(
                f"row group {at} of {file.path} holds {size:,} bytes of images, at most {MOST_GROUP_BYTES:,} are read "
                "at once; write the file again with smaller row groups (row_group_size=100)"
            )
        found.append(RowGroup(number, at, first, rows, size))
        first += rows
    return found


def _labels(
    number: int, file: TableFile, column: str | None, reader: LabelReader, problems: dict[tuple[int, int], str]
) -> np.ndarray:
    """Class indexes of a file's rows; NO_LABEL, and a problem, for rows whose label cannot be used."""
    opened = open_table(file)
    if column is None:
        return np.full(opened.rows, NO_LABEL, np.int64)
    values = opened.column(column)
    names = _class_names(file, column)  # the meaning of this file's integers
    indexes = _indexes_of_names(file, names, reader.classes)
    reader = LabelReader(reader.policy, names) if names else reader
    found = np.empty(len(values), np.int64)
    for row, value in enumerate(values):
        try:
            found[row] = reader.index(value)
        except ImageError as error:
            found[row], problems[number, row] = NO_LABEL, str(error)
        except InputError as error:
            raise InputError(f"row {row} of {file.path}, column {column}: {error}") from error
    return np.where(found == NO_LABEL, NO_LABEL, indexes[found]) if names else found


def _common_names(files: Sequence[TableFile], column: str | None) -> tuple[str, ...]:
    """Class names of the files' schemas, in the order of the first one.

    Raises:
        InputError: Some have names and some have none.
    """
    names = {file: _class_names(file, column) for file in files}
    if lacking := [file for file in files if not names[file]]:
        if named := [file for file in files if names[file]]:
            raise InputError(
                f"{lacking[0].path} has no class names in the schema of column {column}, expected those of "
                f"{named[0].path}; list the classes with --classes, or write the file again"
            )
        return ()
    return names[files[0]]


def _indexes_of_names(file: TableFile, names: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """Class index of each name of a file's schema.

    Raises:
        InputError: A name that is none of the classes.
    """
    indexes = {name: index for index, name in enumerate(classes)}
    absent = [name for name in names if name not in indexes]
    if absent:
        raise InputError(
            f"{file.path} has the class {absent[0]!r} in its schema, expected one of the {len(classes)} classes "
            f"({', '.join(classes[:2])}...); give --classes with the schema's names in the order of the classes, or "
            "write the file again"
        )
    return np.array([indexes[name] for name in names], np.int64)
