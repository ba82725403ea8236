"""Orphan objects: remains of interrupted writers."""

from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from feature_store.backends.base import PARTIAL_SUFFIX, ObjectStore
from feature_store.commits import index as commit_index
from feature_store.commits import locks
from feature_store.commits.locks import exclusive, lock_name
from feature_store.commits.log import load_commits
from feature_store.commits.record import FOLDER, CommitRecord, decode_record, parse_record_path
from feature_store.errors import CorruptStoreError, ResourceError, UnknownFieldError
from feature_store.format.layout import BLOCKS, StoreLayout

_METADATA = "zarr.json"


@dataclass(frozen=True)
class ObjectKind:
    """Kind of an object, from its path.

    Attributes:
        kind: ``object`` (a unit's), ``partial`` (unfinished), ``record``, ``fixed`` (belongs to every store)
            or ``foreign`` (not of this format).
        unit: Its unit, for the first three, if it has one.
    """

    kind: str
    unit: int | None = None


def classify_path(layout: StoreLayout, path: str) -> ObjectKind:
    """The kind of object a path of the store belongs to."""
    if path.endswith(PARTIAL_SUFFIX):
        whole = path.removesuffix(PARTIAL_SUFFIX).rpartition(".")[0]
        return ObjectKind("partial", classify_path(layout, whole).unit)
    if (record := parse_record_path(path)) is not None:
        return ObjectKind("record", record[0])
    if path == commit_index.PATH or path.rpartition("/")[2] == _METADATA:
        return ObjectKind("fixed")
    if path.startswith((BLOCKS, locks.FOLDER)):
        return ObjectKind("fixed")
    address = layout.address(path)
    return ObjectKind("foreign") if address is None else ObjectKind("object", address.unit)


def whole_objects(objects: ObjectStore) -> list[str]:
    """Paths of all objects but unfinished ones and locks."""
    return [path for path in objects.list() if not path.endswith(PARTIAL_SUFFIX) and not path.startswith(locks.FOLDER)]


def find_orphans(
    layout: StoreLayout, paths: Iterable[str], records: Iterable[CommitRecord], doubtful: Iterable[int | None] = ()
) -> dict[int | None, list[str]]:
    """Objects without a commit record, by unit; None for unfinished metadata.

    Args:
        layout: The store's.
        paths: Its objects.
        records: Commit records of the store.
        doubtful: Units with damaged records: what is theirs may yet count.
    """
    doubted = set(doubtful)
    by_unit: dict[int, list[CommitRecord]] = defaultdict(list)
    for record in records:
        by_unit[record.unit].append(record)
    found: dict[int | None, list[str]] = defaultdict(list)
    for path in paths:
        place = classify_path(layout, path)
        if place.kind not in ("object", "partial") or (place.unit in doubted and place.unit is not None):
            continue
        vouched = place.unit is not None and any(path in record.objects for record in by_unit.get(place.unit, ()))
        if not vouched:
            found[place.unit].append(path)
    return dict(found)


def remove(objects: ObjectStore, layout: StoreLayout) -> list[str]:
    """Delete orphan objects; returns the paths.

    A unit that a local process is writing now, or one with a damaged record, is left alone. In a bucket nothing
    tells a writer at work from a dead one: call this only while no writer runs.
    """
    removed, there = [], objects.list()
    committed, _ = load_commits(objects, layout)  # a first look: units of which nothing is left are not locked
    found = find_orphans(layout, there, committed.records)
    for unit, paths in {**{unit: [] for unit in locks.locked_units(there)}, **found}.items():
        with suppress(ResourceError, CorruptStoreError, UnknownFieldError), exclusive(objects, lock_name(unit), "busy"):
            records = [] if unit is None else read_records(objects, unit)
            for path in paths:
                if not any(path in record.objects for record in records):
                    with suppress(FileNotFoundError):
                        objects.delete(path)
                        removed.append(path)
    return sorted(removed)


def withdraw(objects: ObjectStore, unit: int) -> None:
    """Delete a unit's commit records and the objects they cover, so that it can be written again with other bytes.

    Safe to interrupt: without records the unit was never written, and its remaining objects are orphans.

    Raises:
        ResourceError: A process is writing the unit.
        CorruptStoreError: A record is damaged.
    """
    with exclusive(objects, lock_name(unit), f"another process is writing unit {unit} of {objects.url}; wait for it"):
        records = read_records(objects, unit)
        first = [commit_index.PATH, *(record.path for record in records)]  # so that none speaks for what is gone
        for paths in (first, sorted({path for record in records for path in record.objects})):
            for path in paths:
                with suppress(FileNotFoundError):
                    objects.delete(path)
            objects.sync(paths)


def read_records(objects: ObjectStore, unit: int) -> list[CommitRecord]:
    """A unit's records as they are now.

    Raises:
        CorruptStoreError: One is damaged.
    """
    paths = [path for path in objects.list(f"{FOLDER}u{unit:05d}-") if parse_record_path(path) is not None]
    return [decode_record(path, objects.get(path).tobytes()) for path in paths]
