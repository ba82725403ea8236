"""Opens what a command was given as SampleSources, one per unit."""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple, cast

from feature_store.errors import ImageError, InputError
from feature_store.format.manifest import InputInfo
from feature_store.inputs.base import SampleSource, require_usable
from feature_store.inputs.folder import EXTENSIONS, open_folder
from feature_store.inputs.labels import LabelReader, Labels, TarLabels, read_classes
from feature_store.inputs.options import DEFAULT, InputFormat, SourceOptions, TarOptions
from feature_store.inputs.parquet import open_parquet
from feature_store.inputs.slices import UnitSlices
from feature_store.inputs.tar import open_tars
from feature_store.inputs.tar_index import HIDDEN_FILES
from feature_store.inputs.urls import local_path

TABLES = (".parquet", ".arrow")
PLAIN_TARS = InputInfo("tar", "required")
"""Options of a store whose manifest records none."""
_LABELS_READ = 2_000  # of tars with class names, when they are opened
_LOOKED_AT = 10_000  # files of a folder, to recognise what it holds


class OpenedSources(NamedTuple):
    """Sources, one per unit, and what a store keeps of how they were opened (None for tars with plain labels)."""

    sources: list[SampleSource]
    info: InputInfo | None


def open_sources(
    patterns: Sequence[str], options: TarOptions = DEFAULT, *, written: InputInfo | None = None
) -> OpenedSources:
    """Open tars, a folder or parquet files; at least one of their samples can be used.

    Args:
        patterns: Paths, patterns and URLs of tars; or a folder; or parquet files.
        options: Options for opening them; of TarOptions, with a store or for plain tars.
        written: Options of a store's sources: they are opened in the same way; other options are ignored.

    Raises:
        InputError: The input cannot be used; names the reason.
        ResourceError: A file or URL cannot be read.
    """
    info = written or _info(patterns, options)
    if info.format == "tar":
        labels = TarLabels.of(cast(Labels, info.labels), info.label_field or None, info.classes)
        tars = list[SampleSource](open_tars(patterns, options, labels))
        if info.classes and written is None:
            _require_known_labels(tars)
        return OpenedSources(tars, None if info == PLAIN_TARS else info)
    reader = LabelReader(cast(Labels, info.labels), info.classes)
    slices = UnitSlices(info.unit_samples, info.shuffle_seed)
    if info.format == "folder":
        units, classes = open_folder(_only_folder(patterns), reader, slices)
    else:
        units, classes = open_parquet(patterns, reader, info.label_field, slices)
    require_usable(units, "units", "Give images that can be decoded, and each its label")
    return OpenedSources(list(units), info if written else replace(info, classes=classes))


def _require_known_labels(sources: Sequence[SampleSource]) -> None:
    """Read some labels, spread over all sources, before a job starts: one above the classes is an error."""
    total = sum(map(len, sources))
    places = ((source, position) for source in sources for position in range(len(source)))
    for source, position in islice(places, 0, None, max(1, total // _LABELS_READ)):
        with suppress(ImageError):
            source.label(position)


def _info(patterns: Sequence[str], options: TarOptions) -> InputInfo:
    if not isinstance(options, SourceOptions):
        options = SourceOptions(allow_pipe=options.allow_pipe, scratch=options.scratch)
    kind = recognised(patterns) if options.input_format == "auto" else options.input_format
    classes = () if options.classes is None else read_classes(options.classes)
    if kind == "tar":
        return InputInfo("tar", options.labels, options.label_field or "", classes)
    if kind == "folder" and options.label_field is not None:
        raise InputError(
            f"label_field is {options.label_field!r}, expected none with a folder: its class folders are the labels"
        )
    return InputInfo(
        kind, options.labels, options.label_field or "", classes, options.unit_samples, options.shuffle_seed
    )


def recognised(patterns: Sequence[str]) -> InputFormat:
    """Kind of input by names alone: the first image, table or tar found decides the kind of a folder."""
    suffixes = {Path(pattern).suffix.lower() for pattern in patterns}
    if suffixes and suffixes <= set(TABLES):
        return "parquet"
    folders = [path for pattern in patterns if (path := _folder(pattern)) is not None]
    for path in islice(_files(folders[0]), _LOOKED_AT) if folders else ():
        suffix = os.path.splitext(path)[1].lower()  # noqa: PTH122
        if suffix == ".tar":
            return "tar"  # which says that its tars are to be named
        if suffix in TABLES:
            return "parquet"
        if suffix in EXTENSIONS:
            return "folder"
    return "tar"


def _folder(pattern: str) -> Path | None:
    try:
        path = local_path(pattern)
        path = None if path is None else path.expanduser()
        return path if path is not None and path.is_dir() else None
    except (ValueError, RuntimeError, OSError):  # no URL, no such user, a pattern too long for a name
        return None


def _files(root: Path) -> Iterator[str]:
    """Names of files in a folder, then of those below."""
    for _, folders, names in os.walk(root):
        folders.sort()
        yield from (name for name in sorted(names) if not HIDDEN_FILES.match(name))


def _only_folder(patterns: Sequence[str]) -> Path:
    folder = _folder(patterns[0]) if patterns else None
    if len(patterns) != 1 or folder is None:
        given = ", ".join(patterns) or "nothing"
        raise InputError(
            f"input format folder takes one folder that is there, got {given}; give the folder of class folders"
        )
    return folder
