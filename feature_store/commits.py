"""Commit records: the proof that a unit is whole, and the only thing that makes its rows readable."""

import itertools
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import google_crc32c

from feature_store.errors import CorruptStoreError, MismatchError
from feature_store.objects import sync_directories, write_object

FOLDER = "commits"
_REMEDY = "delete the record and run the same `teacher-service cache` command: it rewrites only that unit"
_NAME = re.compile(r"u(\d+)-v(\d+)-(\d+)\.json")


@dataclass(frozen=True)
class ObjectProof:
    """Length and crc32c of one written object."""

    bytes: int
    crc32c: int


@dataclass(frozen=True)
class CommitRecord:
    """What one commit vouches for.

    Attributes:
        store: Fingerprint of the manifest it was written under.
        unit: The unit.
        first_view: First view written.
        last_view: Last view written, inclusive.
        tar: Name of the unit's tar.
        samples: Samples in the tar, quarantined ones included.
        quarantined: Reason per position of a sample that could not be used.
        objects: Proof per object path.
        software: Versions of what wrote it.
    """

    store: str
    unit: int
    first_view: int
    last_view: int
    tar: str
    samples: int
    quarantined: dict[int, str]
    objects: dict[str, ObjectProof]
    software: dict[str, str]

    @property
    def path(self) -> str:
        """Where the record lives: ``commits/u<unit>-v<first>-<last>.json``."""
        return f"{FOLDER}/u{self.unit:05d}-v{self.first_view}-{self.last_view}.json"

    @property
    def views(self) -> range:
        """Views it vouches for."""
        return range(self.first_view, self.last_view + 1)

    def proof(self, path: str) -> ObjectProof:
        """Length and checksum of one of its objects.

        Raises:
            CorruptStoreError: It does not list the object.
        """
        if path not in self.objects:
            raise CorruptStoreError(f"commit record {self.path} does not list object {path}; {_REMEDY}")
        return self.objects[path]


def write_commit(root: Path, record: CommitRecord) -> None:
    """Publish a record, durably; the unit counts from here on."""
    body = json.loads(json.dumps(asdict(record)))
    write_object(root, record.path, _canonical({**body, "record_crc32c": _crc(body)}))
    sync_directories(root, [record.path])


def read_commits(root: Path, fingerprint: str) -> list[CommitRecord]:
    """All records of a store, by unit and first view.

    Args:
        root: The store.
        fingerprint: Of its manifest.

    Raises:
        MismatchError: A record was written under another manifest.
        CorruptStoreError: A record is damaged, misnamed, or vouches for what another one already does.
    """
    records = [_read(root, file) for file in sorted((root / FOLDER).glob("*.json"))]
    records.sort(key=lambda record: (record.unit, record.first_view))
    for record in records:
        if record.store != fingerprint:
            raise MismatchError(
                f"store of {record.path}",
                expected=fingerprint,
                got=record.store,
                where="the manifest",
                remedy=f"this record comes from another store; {_REMEDY}",
            )
    for before, after in itertools.pairwise(records):
        if before.unit == after.unit and after.first_view <= before.last_view:
            raise CorruptStoreError(f"{before.path} and {after.path} vouch for the same view; remove one of them")
    return records


def _read(root: Path, file: Path) -> CommitRecord:
    where = file.relative_to(root).as_posix()
    try:
        body = json.loads(file.read_bytes())
        if body.pop("record_crc32c") != _crc(body):
            raise CorruptStoreError(f"commit record {where} is damaged: its checksum does not match; {_REMEDY}")
        body["quarantined"] = {int(position): reason for position, reason in body["quarantined"].items()}
        body["objects"] = {path: ObjectProof(**proof) for path, proof in body["objects"].items()}
        record = CommitRecord(**body)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptStoreError(f"commit record {where} is damaged: {error}; {_REMEDY}") from error
    if record.path != where or not _NAME.fullmatch(file.name):
        raise CorruptStoreError(f"commit record {where} is misnamed: it is {record.path}; {_REMEDY}")
    return record


def _canonical(body: dict[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


def _crc(body: dict[str, Any]) -> int:
    return google_crc32c.value(_canonical(body))
