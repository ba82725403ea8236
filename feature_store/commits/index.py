"""Commit index: all commit records in one object.

It is only a cache. A record counts because its own object is there; the index merely spares reading it, and is
believed only about records that exist in the length it says. See FORMAT.md.
"""

import hashlib
import io
import json
import logging
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
from pydantic import Field, TypeAdapter

from feature_store.backends.base import ObjectStore
from feature_store.commits.checksum_table import ChecksumTable
from feature_store.commits.record import FOLDER, CommitRecord, record_path
from feature_store.format.checksums import CRC_BYTES, crc32c
from feature_store.format.layout import StoreLayout
from feature_store.format.manifest import Manifest
from feature_store.parsing import STRICT, Natural, Text, load_json, parse

_logger = logging.getLogger(__name__)

PATH = f"{FOLDER}index"
_COLUMNS = {"unit": "<u4", "first_view": "<u4", "last_view": "<u4", "bytes": "<u4", "software": "<u4"}
_PROOFS = {"sizes": "<u8", "checksums": "<u4"}

_Position = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class _Head:
    """Header of an index; see FORMAT.md."""

    __pydantic_config__ = STRICT

    store: Text
    arrays: list[Text]
    units: Natural
    tars_sha256: Text
    quarantined: dict[_Position, dict[_Position, Text]]
    software: list[dict[Text, Text]]


_HEAD = TypeAdapter(_Head)


@dataclass(frozen=True)
class CommitIndex:
    """Commit records as columns, one line per record.

    Attributes:
        layout: Of the store; its manifest has at least the tars the records are about.
        columns: Unit, first and last view, bytes of the record's object, and which of the software versions.
        proofs: Sizes and checksums of the records' objects, one record after the other.
        quarantined: Reasons by position, by line; lines without any are absent.
        software: The software versions that occur.
    """

    layout: StoreLayout
    columns: Mapping[str, np.ndarray]
    proofs: Mapping[str, np.ndarray]
    quarantined: Mapping[int, dict[int, str]]
    software: Sequence[dict[str, str]]
    _starts: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        shared, per_view = len(self.layout.per_unit), len(self.layout.per_view)
        views = self.columns["last_view"].astype(np.int64) - self.columns["first_view"] + 1
        object.__setattr__(self, "_starts", np.cumsum([0, *(shared + views * per_view)]))

    def __len__(self) -> int:
        return len(self.columns["unit"])

    @property
    def objects(self) -> int:
        """Number of objects in all records, the length of proofs."""
        return int(self._starts[-1])

    def paths(self) -> list[str]:
        """Path of each record."""
        return list(map(record_path, *(self.columns[name].tolist() for name in ("unit", "first_view", "last_view"))))

    def covers(self, unit: int, views: range) -> bool:
        """Whether a record of these views is in it."""
        place = {"unit": unit, "first_view": views.start, "last_view": views.stop - 1}
        return bool(np.logical_and.reduce([self.columns[name] == value for name, value in place.items()]).any())

    def record(self, line: int) -> CommitRecord:
        """The record of a line."""
        unit, first, last, software = (
            int(self.columns[name][line]) for name in ("unit", "first_view", "last_view", "software")
        )
        manifest, views = self.layout.manifest, range(first, last + 1)
        tar = manifest.tars[unit]
        span = slice(self._starts[line], self._starts[line + 1])
        return CommitRecord(
            store=manifest.identity(),
            unit=unit,
            first_view=first,
            last_view=last,
            tar=tar.name,
            tar_sha256=tar.header_sha256,
            samples=tar.samples,
            quarantined=self.quarantined.get(line, {}),
            objects=ChecksumTable(self.layout, unit, views, self.proofs["sizes"][span], self.proofs["checksums"][span]),
            software=self.software[software],
        )

    def encode(self) -> bytes:
        """The index's object: an npz file, then its crc32c."""
        units = int(self.columns["unit"].max()) + 1 if len(self) else 0
        head = {
            "store": self.layout.manifest.identity(),
            "arrays": _array_paths(self.layout),
            "units": units,
            "tars_sha256": _tars_sha256(self.layout.manifest, units),
            "quarantined": self.quarantined,
            "software": self.software,
        }
        file = io.BytesIO()
        arrays = {"head": np.frombuffer(json.dumps(head).encode(), np.uint8), **self.columns, **self.proofs}
        np.savez(file, allow_pickle=False, **arrays)
        payload = file.getvalue()
        return payload + crc32c(payload).to_bytes(CRC_BYTES, "little")


def build_index(layout: StoreLayout, records: Sequence[tuple[CommitRecord, int]]) -> CommitIndex:
    """An index over records and the bytes of their objects; those with unusual objects are left out."""
    packed = [(record, size) for record, size in records if isinstance(record.objects, ChecksumTable)]
    software: list[dict[str, str]] = []
    for record, _ in packed:
        if record.software not in software:
            software.append(record.software)
    rows = [
        (record.unit, record.first_view, record.last_view, size, software.index(record.software))
        for record, size in packed
    ]
    table = np.array(rows, np.int64).reshape(len(rows), len(_COLUMNS))
    proofs = [record.objects for record, _ in packed]
    return CommitIndex(
        layout,
        {name: table[:, at].astype(dtype) for at, (name, dtype) in enumerate(_COLUMNS.items())},
        {name: _join([getattr(proof, name) for proof in proofs], dtype) for name, dtype in _PROOFS.items()},
        {line: record.quarantined for line, (record, _) in enumerate(packed) if record.quarantined},
        software,
    )


def is_whole(raw: bytes) -> bool:
    """Whether an index ends with the crc32c of the rest: what it holds may still be anything."""
    payload, checksum = raw[:-CRC_BYTES], raw[-CRC_BYTES:]
    return bool(payload) and crc32c(payload) == int.from_bytes(checksum, "little")


def decode_index(raw: bytes, layout: StoreLayout) -> CommitIndex | None:
    """Inverse of CommitIndex.encode; None if it is damaged or no index of this store, which is logged."""
    if not is_whole(raw):
        return None
    try:
        return _decode(raw[:-CRC_BYTES], layout)
    except Exception as error:  # noqa: BLE001 - zip and npy files of any content fail in any way; it is only a cache
        _logger.warning("%s is ignored, the records are read instead: %s", PATH, error)
        return None


def _decode(payload: bytes, layout: StoreLayout) -> CommitIndex:
    """A whole index.

    Raises:
        Exception: Of any kind, if it is not an index of this store.
    """
    _require_no_bomb(payload)
    manifest = layout.manifest
    with np.load(io.BytesIO(payload), allow_pickle=False) as file:
        arrays = {name: file[name] for name in ("head", *_COLUMNS, *_PROOFS)}
    head = parse(_HEAD, load_json(arrays.pop("head").tobytes()), "its head")
    if head.store != manifest.identity() or head.tars_sha256 != _tars_sha256(manifest, head.units):
        raise ValueError("it is another store's, or about tars this one does not have")
    if head.arrays != _array_paths(layout):
        raise ValueError("it is about other arrays than the store has")
    columns, proofs = ({name: arrays[name] for name in group} for group in (_COLUMNS, _PROOFS))
    for name, dtype in {**_COLUMNS, **_PROOFS}.items():
        if arrays[name].dtype != dtype or arrays[name].ndim != 1:
            raise ValueError(f"its column {name} is {arrays[name].dtype} {list(arrays[name].shape)}, expected {dtype}")
    if len({len(column) for column in columns.values()}) > 1:
        raise ValueError("its columns differ in length")
    bounds = {
        "unit": min(head.units, len(manifest.tars)),
        "last_view": manifest.num_views,
        "software": len(head.software),
    }
    for name, bound in bounds.items():
        if len(columns[name]) and columns[name].max() >= bound:
            raise ValueError(f"its column {name} has {columns[name].max()}, expected less than {bound}")
    if (columns["first_view"] > columns["last_view"]).any():
        raise ValueError("it has a record whose last view comes before its first")
    index = CommitIndex(layout, columns, proofs, head.quarantined, head.software)
    for name, proof in proofs.items():
        if len(proof) != index.objects:
            raise ValueError(f"its column {name} has {len(proof)} entries, expected {index.objects}")
    for line, reasons in head.quarantined.items():
        if max(reasons, default=0) >= manifest.tars[columns["unit"][line]].samples:
            raise ValueError(f"it has a quarantined position {max(reasons)} beyond its tar")
    return index


def _require_no_bomb(payload: bytes) -> None:
    """Members are stored as they are, so they take no more memory than the object itself."""
    with zipfile.ZipFile(io.BytesIO(payload)) as file:
        members = file.infolist()
    if any(m.compress_type != zipfile.ZIP_STORED for m in members) or sum(m.file_size for m in members) > len(payload):
        raise ValueError("it has compressed members")


def write_index(objects: ObjectStore, layout: StoreLayout, records: Sequence[CommitRecord]) -> int:
    """Write the whole index again; returns how many records it covers."""
    sizes = objects.sizes(FOLDER)
    index = build_index(layout, [(record, sizes[record.path]) for record in records if record.path in sizes])
    objects.put(PATH, index.encode())
    objects.sync([PATH])
    return len(index)


def _array_paths(layout: StoreLayout) -> list[str]:
    return [spec.path for spec in (*layout.per_unit, *layout.per_view)]


def _join(parts: Sequence[np.ndarray], dtype: str) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *parts]).astype(dtype)


def _tars_sha256(manifest: Manifest, units: int) -> str:
    """Hash of what the index leaves out of records because the manifest has it."""
    tars = [[tar.name, tar.samples, tar.header_sha256] for tar in manifest.tars[:units]]
    return hashlib.sha256(json.dumps(tars, separators=(",", ":")).encode()).hexdigest()
