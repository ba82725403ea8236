"""The commit index: all commit records in one object, so that opening a large store stays fast.

It is only a cache. A record counts because its own object is there; the index merely spares reading it, and is
believed only about records that exist in the length it says. See FORMAT.md.
"""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from feature_store.commits.proofs import PackedProofs, ProofOrder
from feature_store.commits.record import FOLDER, CommitRecord, record_path
from feature_store.layout import crc32c
from feature_store.manifest import Manifest
from feature_store.objects.local import ObjectStore

PATH = f"{FOLDER}index"
_COLUMNS = {"unit": "<u4", "first_view": "<u4", "last_view": "<u4", "bytes": "<u4", "software": "<u4"}
_PROOFS = {"sizes": "<u8", "checksums": "<u4"}
_CRC_BYTES = 4


@dataclass(frozen=True)
class CommitIndex:
    """Commit records as columns, one line per record.

    Attributes:
        manifest: Of the store; has at least the tars the records are about.
        columns: Unit, first and last view, bytes of the record's object, and which of the software versions.
        proofs: Sizes and checksums of the records' objects, one record after the other.
        quarantined: Reasons by position, by line; lines without any are absent.
        software: The software versions that occur.
    """

    manifest: Manifest
    columns: Mapping[str, np.ndarray]
    proofs: Mapping[str, np.ndarray]
    quarantined: Mapping[int, dict[int, str]]
    software: Sequence[dict[str, str]]
    _order: ProofOrder = field(init=False)
    _starts: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        order = ProofOrder(self.manifest)
        views = self.columns["last_view"].astype(np.int64) - self.columns["first_view"] + 1
        object.__setattr__(self, "_order", order)
        object.__setattr__(self, "_starts", np.cumsum([0, *(order.shared + views * order.per_view)]))

    def __len__(self) -> int:
        return len(self.columns["unit"])

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
        tar, views = self.manifest.tars[unit], range(first, last + 1)
        span = slice(self._starts[line], self._starts[line + 1])
        return CommitRecord(
            store=self.manifest.identity(),
            unit=unit,
            first_view=first,
            last_view=last,
            tar=tar.name,
            tar_sha256=tar.header_sha256,
            samples=tar.samples,
            quarantined=self.quarantined.get(line, {}),
            objects=PackedProofs(self._order, unit, views, self.proofs["sizes"][span], self.proofs["checksums"][span]),
            software=self.software[software],
        )

    def encode(self) -> bytes:
        """The index's object: an npz file, then its crc32c."""
        units = int(self.columns["unit"].max()) + 1 if len(self) else 0
        head = {
            "store": self.manifest.identity(),
            "arrays": self._order.arrays,
            "units": units,
            "tars_sha256": _tars_sha256(self.manifest, units),
            "quarantined": self.quarantined,
            "software": self.software,
        }
        file = io.BytesIO()
        arrays = {"head": np.frombuffer(json.dumps(head).encode(), np.uint8), **self.columns, **self.proofs}
        np.savez(file, allow_pickle=False, **arrays)
        payload = file.getvalue()
        return payload + crc32c(payload).to_bytes(_CRC_BYTES, "little")


def build_index(manifest: Manifest, records: Sequence[tuple[CommitRecord, int]]) -> CommitIndex:
    """An index over records and the bytes of their objects; those with unusual objects are left out."""
    packed = [(record, size) for record, size in records if isinstance(record.objects, PackedProofs)]
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
        manifest,
        {name: table[:, at].astype(dtype) for at, (name, dtype) in enumerate(_COLUMNS.items())},
        {name: _join([getattr(proof, name) for proof in proofs], dtype) for name, dtype in _PROOFS.items()},
        {line: record.quarantined for line, (record, _) in enumerate(packed) if record.quarantined},
        software,
    )


def decode_index(raw: bytes, manifest: Manifest) -> CommitIndex | None:
    """Inverse of CommitIndex.encode; None if it is damaged, another store's, or not about these tars."""
    payload, checksum = raw[:-_CRC_BYTES], raw[-_CRC_BYTES:]
    if not payload or crc32c(payload) != int.from_bytes(checksum, "little"):
        return None
    with np.load(io.BytesIO(payload), allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    head: dict[str, Any] = json.loads(arrays["head"].tobytes())
    if head["units"] > len(manifest.tars) or arrays["last_view"].max(initial=0) >= manifest.num_views:
        return None
    expected = {
        "store": manifest.identity(),
        "arrays": ProofOrder(manifest).arrays,
        "tars_sha256": _tars_sha256(manifest, head["units"]),
    }
    if any(head[name] != value for name, value in expected.items()):
        return None
    return CommitIndex(
        manifest,
        {name: arrays[name] for name in _COLUMNS},
        {name: arrays[name] for name in _PROOFS},
        {
            int(line): {int(position): reason for position, reason in reasons.items()}
            for line, reasons in head["quarantined"].items()
        },
        head["software"],
    )


def write_index(objects: ObjectStore, manifest: Manifest, records: Sequence[CommitRecord]) -> int:
    """Write the index anew; returns how many records it covers."""
    sizes = objects.sizes(FOLDER)
    index = build_index(manifest, [(record, sizes[record.path]) for record in records if record.path in sizes])
    objects.put(PATH, index.encode())
    objects.sync([PATH])
    return len(index)


def _join(parts: Sequence[np.ndarray], dtype: str) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *parts]).astype(dtype)


def _tars_sha256(manifest: Manifest, units: int) -> str:
    """Hash of what the index leaves out of records because the manifest has it."""
    tars = [[tar.name, tar.samples, tar.header_sha256] for tar in manifest.tars[:units]]
    return hashlib.sha256(json.dumps(tars, separators=(",", ":")).encode()).hexdigest()
