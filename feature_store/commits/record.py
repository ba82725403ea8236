"""Commit records: they alone make a unit's rows readable."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any

import numpy as np
from pydantic import Field, TypeAdapter

from feature_store.backends.base import ObjectStore
from feature_store.errors import CommittedError, CorruptStoreError, InputError, MismatchError, Remedy, UnknownFieldError
from feature_store.format.checksums import crc32c
from feature_store.format.manifest import Manifest
from feature_store.parsing import STRICT, Count, Natural, Text, Unsigned32, load_json, parse

FOLDER = "commits/"
_REMEDY = "remove it, then write its unit again"
_NAME = re.compile(r"u(\d{5,})-v(\d+)-(\d+)\.json")


@dataclass(frozen=True)
class ObjectChecksum:
    """Length of one written object, and the crc32c it ends with; see ``checksums.object_checksum``."""

    bytes: Natural
    crc32c: Unsigned32


@dataclass(frozen=True)
class CommitRecord:
    """One commit: a unit's views with the checksums of their objects.

    Attributes:
        store: Identity of the manifest it was written under.
        unit: The unit.
        first_view: First view written.
        last_view: Last view written, inclusive.
        tar: Name of the unit's tar.
        tar_sha256: The tar's ``header_sha256``.
        samples: Samples in the tar, quarantined ones included.
        quarantined: Reason per position of a sample that could not be used.
        objects: Proof per object path.
        software: Versions of the software that wrote it.
    """

    __pydantic_config__ = STRICT

    store: Text
    unit: Natural
    first_view: Natural
    last_view: Natural
    tar: Text
    tar_sha256: Text
    samples: Count
    quarantined: dict[Annotated[int, Field(ge=0)], Text]
    objects: Mapping[Text, ObjectChecksum]
    software: dict[Text, Text]

    @property
    def path(self) -> str:
        """Path of the record: ``commits/u<unit>-v<first>-<last>.json``."""
        return record_path(self.unit, self.first_view, self.last_view)

    @property
    def views(self) -> range:
        """Views it proves."""
        return range(self.first_view, self.last_view + 1)

    @property
    def readable(self) -> np.ndarray:
        """Positions that hold features, ascending: int64; those of quarantined samples are left out."""
        return np.setdiff1d(np.arange(self.samples), list(self.quarantined))

    def rows(self, view: int) -> np.ndarray:
        """Addresses of the readable rows of one view in position order: int64 [n, 3]."""
        readable = self.readable
        return np.column_stack([np.full(len(readable), self.unit), readable, np.full(len(readable), view)])

    def proof(self, path: str) -> ObjectChecksum:
        """Length and checksum of one of its objects.

        Raises:
            CorruptStoreError: It does not list the object.
        """
        try:
            return self.objects[path]
        except KeyError:
            raise _damaged(f"commit record {self.path} does not list object {path}") from None

    def require_of(self, manifest: Manifest) -> None:
        """Refuse a record that is not about this store and its tar.

        Raises:
            MismatchError: Another store's, or another tar's.
            CorruptStoreError: It is about a unit or view the store does not have.
        """
        if self.store != manifest.identity():
            raise self._foreign("store", manifest.identity(), self.store, "another store")
        if self.unit >= len(manifest.tars) or self.last_view >= manifest.num_views:
            raise CorruptStoreError(
                f"commit record {self.path} is about units or views that the manifest does not have "
                f"({len(manifest.tars)} units, {manifest.num_views} views); restore zarr.json, or grow the store again"
            )
        tar = manifest.tars[self.unit]
        if (self.tar_sha256, self.samples) != (tar.header_sha256, tar.samples):
            raise self._foreign("tar", (tar.header_sha256, tar.samples), (self.tar_sha256, self.samples), "another tar")

    def _foreign(self, field: str, expected: Any, got: Any, origin: str) -> MismatchError:
        remedy = f"this record comes from {origin}; {_REMEDY}"
        where = f"{field} of {self.path}"
        error = MismatchError(where, expected=expected, got=got, where="the manifest", remedy=remedy)
        error.remedy = Remedy.REWRITE_UNIT
        return error


_RECORD = TypeAdapter(CommitRecord)


def record_path(unit: int, first_view: int, last_view: int) -> str:
    """Path of a commit record."""
    return f"{FOLDER}u{unit:05d}-v{first_view}-{last_view}.json"


def parse_record_path(path: str) -> tuple[int, int, int] | None:
    """Unit, first and last view a record's path names; None if it is no record's path."""
    match = _NAME.fullmatch(path.removeprefix(FOLDER))
    return (int(match[1]), int(match[2]), int(match[3])) if match else None


def encode_record(record: CommitRecord) -> bytes:
    """A record's bytes: canonical JSON that carries its own checksum."""
    body = {field.name: getattr(record, field.name) for field in fields(record)}
    body["quarantined"] = {str(position): reason for position, reason in record.quarantined.items()}
    body["objects"] = {path: {"bytes": p.bytes, "crc32c": p.crc32c} for path, p in record.objects.items()}
    return _canonical({**body, "record_crc32c": crc32c(_canonical(body))})


def decode_record(path: str, raw: bytes) -> CommitRecord:
    """Inverse of encode_record.

    Raises:
        CorruptStoreError: Damaged, nonsense, or not the record of its path.
        UnknownFieldError: Written by a newer release.
    """
    try:
        body = load_json(raw)
        if body.pop("record_crc32c") != crc32c(_canonical(body)):
            raise _damaged(f"commit record {path} is damaged: its checksum does not match")
        record = parse(_RECORD, body, f"commit record {path}")
    except UnknownFieldError:
        raise
    except InputError as error:
        raise _damaged(str(error)) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(f"commit record {path} is damaged: {error}") from error
    if record.path != path:
        raise _damaged(f"commit record {path} is misnamed: it is {record.path}")
    if beyond := [position for position in record.quarantined if position >= record.samples]:
        raise _damaged(
            f"commit record {path} is not valid: quarantined position {beyond[0]} of {record.samples} samples"
        )
    return record


def write_commit(objects: ObjectStore, record: CommitRecord) -> None:
    """Publish a record, durably; the unit counts from here on.

    Raises:
        CommittedError: Another writer published one first; it stays.
    """
    try:
        objects.put(record.path, encode_record(record), new=True)
    except FileExistsError:
        raise already_committed(record.unit, record.tar, record.path) from None
    objects.sync([record.path])


def already_committed(unit: int, tar: str, path: str) -> CommittedError:
    """Error of a writer whose views another writer has committed."""
    return CommittedError(
        f"unit {unit} ({tar}) is committed already by {path}, another writer's; nothing was overwritten; continue with "
        "the next unit"
    )


def _damaged(message: str) -> CorruptStoreError:
    return CorruptStoreError(f"{message}; {_REMEDY}", remedy=Remedy.REWRITE_UNIT)


def _canonical(body: dict[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
