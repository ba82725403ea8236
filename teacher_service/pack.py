"""Packs a folder or parquet files into shuffled webdataset tars."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from webdataset.writer import TarWriter

from feature_store.backends.base import PARTIAL_SUFFIX
from feature_store.backends.files import replacing, write_text
from feature_store.commits.locks import locked
from feature_store.errors import ImageError, InputError, ResourceError
from feature_store.inputs.base import NO_LABEL, SampleSource
from feature_store.inputs.open import open_sources
from feature_store.inputs.options import SourceOptions
from feature_store.tools.options import make_folder

STATE, CLASSES, LOCK = "pack.json", "classes.txt", ".lock"
_SHOWN = 3  # samples named in a report
_EXTENSIONS = {
    b"\xff\xd8": "jpg",
    b"\x89PNG": "png",
    b"GIF8": "gif",
    b"BM": "bmp",
    b"II*\0": "tif",
    b"MM\0*": "tif",
    b"P6": "ppm",
}


@dataclass(frozen=True)
class PackReport:
    """Result of packing.

    Attributes:
        out: Folder of the tars.
        tars: Tars in it.
        written: Tars this run wrote; the others existed.
        samples: Samples of the source.
        left_out: Samples that have no label although one is required, with the reason of the first ones.
        classes: File of class names; None if there are none.
    """

    out: str
    tars: int
    written: int
    samples: int
    left_out: list[str]
    classes: str | None


def pack(
    source: str,
    out: Path,
    options: SourceOptions,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> PackReport:
    """Write one tar for each unit of a source; the same source and options always give the same bytes.

    Finished tars are kept, so that an interrupted run resumes.

    Args:
        source: A class-per-folder tree, a parquet file or pattern, or a dataset folder.
        out: Folder for the tars, their class names and the record of what is packed.
        options: Options for opening the source; ``unit_samples`` go into a tar.
        progress: Called with tars that are written, and tars in all.

    Raises:
        InputError: The source cannot be used, two samples would have one key, or out is a file or holds another
            pack.
        ResourceError: A file cannot be read or written.
    """
    sources, info = open_sources([source], options)
    if info is None or info.format == "tar":
        raise InputError(f"{source} is a tar already; pack takes a folder or parquet files")
    keys = [[_tar_key(key) for key in each.keys] for each in sources]
    _require_unique(keys)
    state = {"inputs": asdict(info), "tars": [each.header_sha256 for each in sources]}
    try:
        make_folder(out, "OUT")
        with locked(out / LOCK, f"another process packs into {out}; wait for it"):
            _require_same(out, state)
            for partial in out.glob(f"*{PARTIAL_SUFFIX}"):  # of a killed run
                partial.unlink()
            missing = [unit for unit in range(len(sources)) if not _tar(out, unit).exists()]
            left_out = list[str]()
            for done, unit in enumerate(missing, len(sources) - len(missing) + 1):
                left_out += _write(_tar(out, unit), sources[unit], keys[unit])
                progress(done, len(sources))
            if info.classes:
                write_text(out / CLASSES, "".join(f"{name}\n" for name in info.classes), durable=True)
    except OSError as error:
        raise ResourceError(f"tars cannot be written to {out}: {error}; the same command resumes") from error
    classes = str(out / CLASSES) if info.classes else None
    return PackReport(str(out), len(sources), len(missing), sum(map(len, sources)), left_out, classes)


def _tar(out: Path, unit: int) -> Path:
    return out / f"{unit:06}.tar"


def report_lines(report: PackReport) -> list[str]:
    """A report as text."""
    lines = [f"{report.samples} samples in {report.tars} tars in {report.out}, {report.written} of them written now"]
    if report.left_out:
        lines.append(f"{len(report.left_out)} samples are left out: {'; '.join(report.left_out[:_SHOWN])}")
    if report.classes is not None:
        lines.append(f"class names, in order of the labels: {report.classes}")
    return lines


def _write(path: Path, source: SampleSource, keys: list[str]) -> list[str]:
    """Write a tar, whole under its name or not at all; gives the samples that are left out."""
    left_out = []
    with (
        replacing(path, durable=True) as partial,
        partial.open("wb") as file,
        TarWriter(file, encoder=False, mtime=0, format="PAX_FORMAT") as writer,  # for keys long or not ASCII
    ):
        for position, key in enumerate(keys):
            try:
                sample = source.read(position)
            except ImageError as error:
                left_out.append(f"{key}: {error}")
                continue
            label = {} if sample.label == NO_LABEL else {"cls": str(sample.label).encode()}
            writer.write({"__key__": key, **label, _extension(sample.image): sample.image})
    return left_out


def _extension(image: bytes) -> str:
    """Extension by content; readers decide by content, too."""
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return "webp"
    return next((extension for magic, extension in _EXTENSIONS.items() if image.startswith(magic)), "jpg")


def _tar_key(key: str) -> str:
    """The key in a tar, where it ends at the first dot of the file's name."""
    folder, slash, name = key.rpartition("/")
    return folder + slash + name.replace(".", "_")


def _require_unique(units: list[list[str]]) -> None:
    seen: set[str] = set()
    for key in (key for unit in units for key in unit):
        if key in seen:
            raise InputError(
                f"two samples would have key {key!r}: in tars a key ends at the first dot, so dots become _; rename one"
            )
        seen.add(key)


def _require_same(out: Path, state: dict) -> None:
    """Record what is packed; refuse a folder that holds something else."""
    record = out / STATE
    if record.exists():
        if json.loads(record.read_text()) != json.loads(json.dumps(state)):
            raise InputError(
                f"{out} holds tars of another source, seed or size, or of one that changed since; give another folder"
            )
        return
    if strangers := sorted(path.name for path in out.glob("*.tar")):
        raise InputError(f"{out} holds tars that pack did not write ({strangers[0]}); give another folder")
    write_text(record, json.dumps(state), durable=True)
