"""CommitLog: which rows of a store may be read."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from feature_store.backends.base import ObjectStore
from feature_store.commits import index as commit_index
from feature_store.commits.checksum_table import pack_checksums
from feature_store.commits.index import CommitIndex
from feature_store.commits.record import FOLDER, CommitRecord, decode_record, parse_record_path
from feature_store.commits.root import read_manifest
from feature_store.errors import CorruptStoreError, InputError, QuarantinedError, Remedy, UncommittedError, UserError
from feature_store.format.addressing import RowId
from feature_store.format.layout import StoreLayout

_logger = logging.getLogger(__name__)

_NONE = -1
_BATCH = 512


class CommitLog:
    """The committed rows of a store, by its commit records.

    Records in the commit index stay packed there until they are asked for.
    """

    def __init__(self, layout: StoreLayout, records: Iterable[CommitRecord] = ()) -> None:
        self._layout, self._manifest = layout, layout.manifest
        self._lines = np.full((len(self._manifest.tars), self._manifest.num_views), _NONE, np.int32)
        self._index: CommitIndex | None = None
        self._records: dict[int, CommitRecord] = {}
        self._next_line = 0
        for record in records:
            self.add(record)

    def add(self, record: CommitRecord) -> None:
        """Add a record.

        Raises:
            MismatchError: It is about another store or tar.
            CorruptStoreError: Another record covers the same view.
        """
        record.require_of(self._manifest)
        taken = self._lines[record.unit, record.views]
        if (taken != _NONE).any():
            other = self._record(int(taken.max()))
            raise CorruptStoreError(
                f"{other.path} and {record.path} cover the same view; remove one of them",
                remedy=Remedy.REWRITE_UNIT,
            )
        packed = pack_checksums(self._layout, record.unit, record.views, record.objects)
        self._records[self._next_line] = replace(record, objects=packed)
        self._lines[record.unit, record.views] = self._next_line
        self._next_line += 1

    def replace(self, record: CommitRecord) -> None:
        """Add a record in place of records of the same views that were removed.

        Raises:
            MismatchError: It is about another store or tar.
        """
        lines = self._lines[record.unit]
        lines[np.isin(lines, lines[record.views])] = _NONE
        self.add(record)

    def add_indexed(self, index: CommitIndex, present: np.ndarray) -> None:
        """Add the records of an index that are present; call it before any other record is added.

        Raises:
            CorruptStoreError: Two of them cover the same view.
        """
        columns = {name: index.columns[name].astype(np.int64) for name in ("unit", "first_view", "last_view")}
        lines = np.flatnonzero(present)
        counts = (columns["last_view"] - columns["first_view"] + 1)[lines]
        line = np.repeat(lines, counts)
        within = np.arange(len(line)) - np.repeat(np.cumsum(counts) - counts, counts)
        units, views = columns["unit"][line], columns["first_view"][line] + within
        self._lines[units, views] = line
        self._index, self._next_line = index, len(index)
        if self.places != len(line):
            raise CorruptStoreError(f"two records in {commit_index.PATH} cover the same view")

    @property
    def records(self) -> list[CommitRecord]:
        """All records, by unit and first view."""
        used = self._lines[self._lines != _NONE]
        changes = np.flatnonzero(np.diff(used, prepend=_NONE))
        return [self._record(line) for line in used[changes].tolist()]

    @property
    def units(self) -> list[int]:
        """Units with at least one committed view, ascending."""
        return np.flatnonzero((self._lines != _NONE).any(axis=1)).tolist()

    @property
    def complete_units(self) -> int:
        """Number of units with all views committed."""
        return int(np.count_nonzero((self._lines != _NONE).all(axis=1)))

    @property
    def places(self) -> int:
        """Number of committed (unit, view) pairs."""
        return int(np.count_nonzero(self._lines != _NONE))

    def views(self, unit: int) -> set[int]:
        """Committed views of a unit."""
        if not 0 <= unit < len(self._lines):
            return set()
        return set(np.flatnonzero(self._lines[unit] != _NONE).tolist())

    def missing_views(self) -> dict[int, list[int]]:
        """Views that are not committed, by unit, where there are any."""
        units, views = np.nonzero(self._lines == _NONE)
        some, starts = np.unique(units, return_index=True)
        parts = np.split(views, starts[1:]) if len(some) else []
        return {unit: part.tolist() for unit, part in zip(some.tolist(), parts, strict=True)}

    def record(self, unit: int, view: int) -> CommitRecord:
        """The commit record of a unit's view.

        Raises:
            InputError: No such unit.
            UncommittedError: None does.
        """
        self._manifest.require_unit(unit)
        line = self._lines[unit, view] if 0 <= view < self._manifest.num_views else _NONE
        if line == _NONE:
            raise UncommittedError(
                f"view {view} of unit {unit} ({self._manifest.tars[unit].name}) was never committed; "
                f"committed views of this unit: {sorted(self.views(unit)) or 'none'}; "
                "write its missing views",
                remedy=Remedy.FINISH_STORE,
            )
        return self._record(int(line))

    def require(self, row: RowId) -> None:
        """Refuse a row that holds no features.

        Raises:
            UncommittedError: It has no commit record.
            QuarantinedError: Its sample was quarantined.
        """
        record = self.record(row.unit, row.view)
        if not 0 <= row.position < record.samples:
            raise UncommittedError(f"{row} does not exist: unit {row.unit} has {record.samples} samples ({record.tar})")
        if row.position in record.quarantined:
            raise QuarantinedError(
                f"{row} has no features: its sample was quarantined ({record.quarantined[row.position]}); "
                "leave it out, or fix the tar and write its unit again",
                remedy=Remedy.RETRY_QUARANTINED,
            )

    def is_indexed(self, unit: int, views: range) -> bool:
        """Whether the commit index, as it was when the store was opened, has a record of this name."""
        return self._index is not None and self._index.covers(unit, views)

    def _record(self, line: int) -> CommitRecord:
        if line not in self._records:
            assert self._index is not None  # only its lines are not in the dictionary from the start
            self._records[line] = self._index.record(line)
        return self._records[line]


@dataclass(frozen=True)
class RecordProblem:
    """A damaged or foreign commit record, its error, and the unit in its name, if any."""

    path: str
    unit: int | None
    error: UserError


def load_store(objects: ObjectStore, *, use_index: bool = True) -> tuple[StoreLayout, CommitLog, list[RecordProblem]]:
    """A store's layout, and what load_commits gives.

    Raises:
        InputError: Not a store of this format.
        CorruptStoreError: Its manifest is damaged.
    """
    layout = StoreLayout(read_manifest(objects))
    committed, problems = load_commits(objects, layout, use_index=use_index)
    if problems:
        layout = StoreLayout(read_manifest(objects))  # the store may have grown before the records were listed
        committed, problems = load_commits(objects, layout, use_index=use_index)
    return layout, committed, problems


def load_commits(
    objects: ObjectStore, layout: StoreLayout, *, use_index: bool = True
) -> tuple[CommitLog, list[RecordProblem]]:
    """The commit log of a store, with the records that are damaged or foreign.

    The commit index spares reading the records that it covers and that are there in the length it says.
    """
    if not objects.lists:
        return _indexed_alone(objects, layout), []
    sizes = objects.sizes(FOLDER)
    committed, problems = CommitLog(layout), []
    paths = {path for path in sizes if path.endswith(".json")}
    if use_index and commit_index.PATH in sizes and (index := _read_index(objects, layout)) is not None:
        names = index.paths()
        claimed = index.columns["bytes"].tolist()
        present = np.array([sizes.get(path) == size for path, size in zip(names, claimed, strict=True)], bool)
        try:
            committed.add_indexed(index, present)
            paths -= {path for path, there in zip(names, present, strict=True) if there}
        except CorruptStoreError:
            committed = CommitLog(layout)
    ordered = sorted(paths, key=lambda path: (parse_record_path(path) or (-1,), path))
    for path, found in zip(ordered, _read_all(objects, ordered), strict=True):
        try:
            if isinstance(found, UserError):
                raise found
            if found is not None:
                committed.add(found)
        except UserError as error:
            problems.append(RecordProblem(path, (parse_record_path(path) or (None,))[0], error))
    return committed, problems


def _indexed_alone(objects: ObjectStore, layout: StoreLayout) -> CommitLog:
    """The commit log from the commit index alone; records published since are not seen."""
    index = _read_index(objects, layout)
    if index is None:
        raise InputError(
            f"{objects.url} cannot be listed and has no commit index of this store in {commit_index.PATH}; call "
            "Store.write_commit_index() where it can be written, then publish it again"
        )
    committed = CommitLog(layout)
    committed.add_indexed(index, np.ones(len(index), bool))
    return committed


def _read_all(objects: ObjectStore, paths: Sequence[str]) -> Iterator[CommitRecord | UserError | None]:
    """Records by path, several reads in flight, few records in memory."""
    with ThreadPoolExecutor(objects.in_flight) as pool:
        for start in range(0, len(paths), _BATCH):
            yield from pool.map(lambda path: _read(objects, path), paths[start : start + _BATCH])


def _read(objects: ObjectStore, path: str) -> CommitRecord | UserError | None:
    """A record, its error, or None if it was removed since it was listed."""
    try:
        return decode_record(path, objects.get(path).tobytes())
    except FileNotFoundError:
        return None
    except UserError as error:
        return error


def _read_index(objects: ObjectStore, layout: StoreLayout) -> CommitIndex | None:
    try:
        return commit_index.decode_index(objects.get(commit_index.PATH).tobytes(), layout)
    except FileNotFoundError:
        return None
    except CorruptStoreError as error:
        _logger.warning("%s is ignored, the records are read instead: %s", commit_index.PATH, error)
        return None
