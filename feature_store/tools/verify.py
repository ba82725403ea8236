"""Verification of a whole store."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from feature_store.backends.base import ObjectStore
from feature_store.backends.open import open_objects
from feature_store.commits import index as commit_index
from feature_store.commits.locks import is_held
from feature_store.commits.log import CommitLog, RecordProblem, load_store
from feature_store.commits.orphans import classify_path, find_orphans, read_records
from feature_store.commits.record import CommitRecord
from feature_store.commits.root import ROOT
from feature_store.errors import UnknownFieldError, UserError
from feature_store.format.layout import BLOCKS, StoreLayout
from feature_store.parsing import load_json
from feature_store.processes import become_worker
from feature_store.read.blocks import blocks_sha256, read_blocks
from feature_store.tools.unit_check import Finding, UnitCheck, UnitChecks
from feature_store.write.create import metadata

_ROOT = b'{"zarr_format": 3, "node_type": "group"}'  # its attributes are the manifest, which was read
_UNUSED = "consolidated_metadata"


@dataclass(frozen=True)
class Report:
    """Result of a verification.

    Attributes:
        store: Where the store is.
        quick: Whether contents were left out: only records, metadata, and objects' existence and length.
        units: Units with a committed view.
        records: Commit records.
        objects: Objects compared with their proofs.
        bytes: Bytes of those.
        findings: Faults; empty for an undamaged store.
        foreign: Files that are not of this format; they do no harm.
        missing_views: Views that were never committed, by unit; not a fault, but still to be written.
    """

    store: str
    quick: bool
    units: int = 0
    records: int = 0
    objects: int = 0
    bytes: int = 0
    findings: list[Finding] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    missing_views: dict[int, list[int]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


@dataclass(frozen=True)
class _Scan:
    """A store's listing and records, read once."""

    objects: ObjectStore
    layout: StoreLayout
    sizes: dict[str, int]
    committed: CommitLog
    problems: list[RecordProblem]


def verify(
    url: str | Path,
    *,
    quick: bool = False,
    workers: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Check every byte that a store's commit records cover.

    Args:
        url: The store.
        quick: Leave contents out: a matter of seconds, but bit rot stays unseen.
        workers: Processes.
        progress: Called with units done and in all.

    Raises:
        InputError: Not a store.
        CorruptStoreError: Its manifest is damaged.
    """
    objects = open_objects(url)
    layout, committed, problems = load_store(objects, use_index=False)
    scan = _Scan(objects, layout, objects.sizes(), committed, problems)
    units = committed.units
    checks = []
    for check in _checks(scan, units, quick, workers):
        checks.append(check)
        progress(len(checks), len(units))
    tensors, about_blocks = _blocks(scan)
    about_index, foreign_index = _index(scan)
    findings = [
        *_metadata(scan, tensors),
        *about_blocks,
        *_records(scan),
        *about_index,
        *(finding for check in checks for finding in check.findings),
        *_repeated_keys(checks),
        *_orphans(scan),
    ]
    return Report(
        store=objects.url,
        quick=quick,
        units=len(units),
        records=len(committed.records),
        objects=sum(check.objects for check in checks),
        bytes=sum(check.bytes for check in checks),
        findings=findings,
        foreign=[*foreign_index, *_foreign(scan)],
        missing_views=committed.missing_views(),
    )


def _checks(scan: _Scan, units: Sequence[int], quick: bool, workers: int) -> Iterator[UnitCheck]:
    records: dict[int, list[CommitRecord]] = defaultdict(list)
    for record in scan.committed.records:
        records[record.unit].append(record)
    if quick or workers <= 1 or len(units) <= 1:
        checks = UnitChecks(scan.objects, scan.layout, scan.sizes if quick else None)
        yield from (checks.check(records[unit]) for unit in units)
        return
    with ProcessPoolExecutor(
        min(workers, len(units)), get_context("spawn"), _start_worker, (scan.objects, scan.layout)
    ) as pool:
        yield from pool.map(_check_in_worker, (records[unit] for unit in units), chunksize=1)


_worker: UnitChecks  # of a worker process


def _start_worker(objects: ObjectStore, layout: StoreLayout) -> None:
    global _worker
    become_worker()
    _worker = UnitChecks(objects, layout)


def _check_in_worker(records: Sequence[CommitRecord]) -> UnitCheck:
    return _worker.check(records)


def _metadata(scan: _Scan, tensors: Mapping[str, np.ndarray] | None) -> Iterator[Finding]:
    """Groups and arrays must be what the manifest, and the later blocks' tensors if known, make them."""
    for path, expected in {**metadata(scan.layout.manifest, tensors or {}), ROOT: _ROOT}.items():
        if tensors is None and path.startswith(BLOCKS):
            continue
        try:
            got = load_json(scan.objects.get(path).tobytes())
        except FileNotFoundError:
            yield Finding("metadata", path, "it is missing; `feature-store repair --yes` writes it again")
            continue
        except (ValueError, OSError, UserError) as error:
            yield Finding("metadata", path, f"it cannot be read: {error}; `feature-store repair --yes` writes it again")
            continue
        if not isinstance(got, dict):
            got = {}
        wanted = json.loads(expected)
        for group in (got, wanted):
            if group.get(_UNUSED, "") is None:  # as zarr before 3.1.6 writes it
                del group[_UNUSED]
        wrong = sorted(name for name in wanted if name not in got or got[name] != wanted[name])
        wrong += [] if path == ROOT else sorted(got.keys() - wanted.keys())
        if wrong == ["shape"] and _is_larger(got["shape"], wanted["shape"]):
            yield Finding("growth", path, "the store was growing when its writer died; run the same command again")
        elif wrong:
            yield Finding(
                "metadata",
                path,
                f"{', '.join(wrong)}: not what the manifest says; `feature-store repair --yes` writes it again",
            )


def _is_larger(got: Any, wanted: list[int]) -> bool:
    numbers = isinstance(got, list) and len(got) == len(wanted) and all(isinstance(n, int) for n in got)
    return numbers and all(has >= least for has, least in zip(got, wanted, strict=True))


def _blocks(scan: _Scan) -> tuple[dict[str, np.ndarray] | None, list[Finding]]:
    """The later blocks; none, and why, if they are not the manifest's."""
    where, remedy = BLOCKS.rstrip("/"), "restore the folder from a copy, or write the store again"
    try:
        tensors = read_blocks(scan.objects)
    except (UserError, OSError) as error:
        return None, [Finding("blocks", where, f"the later blocks cannot be read: {error}")]
    if (got := blocks_sha256(tensors)) != scan.layout.manifest.blocks_sha256:
        return None, [
            Finding("blocks", where, f"sha256 {got}, the manifest says {scan.layout.manifest.blocks_sha256}; {remedy}")
        ]
    return tensors, []


def _records(scan: _Scan) -> Iterator[Finding]:
    """Damaged or foreign records."""
    for problem in scan.problems:
        kind = "newer" if isinstance(problem.error, UnknownFieldError) else "record"
        yield Finding(kind, problem.path, str(problem.error), problem.unit)


def _index(scan: _Scan) -> tuple[list[Finding], list[str]]:
    """Findings about the commit index; its path if it is whole, but of another store or format."""
    if commit_index.PATH not in scan.sizes:
        return [], []
    remedy = "harmless: readers ignore it; `feature-store repair --yes` writes it again"
    try:
        raw = scan.objects.get(commit_index.PATH).tobytes()
    except (OSError, UserError) as error:
        return [Finding("index", commit_index.PATH, f"it cannot be read: {error}; {remedy}")], []
    if not commit_index.is_whole(raw):
        return [Finding("index", commit_index.PATH, f"it is damaged; {remedy}")], []
    index = commit_index.decode_index(raw, scan.layout)
    if index is None:
        return [], [commit_index.PATH]
    lines = {path: line for line, path in enumerate(index.paths())}
    return [
        Finding("index", commit_index.PATH, f"it differs from {record.path}; {remedy}", record.unit)
        for record in scan.committed.records
        if (line := lines.get(record.path)) is not None
        and index.columns["bytes"][line] == scan.sizes.get(record.path)
        and index.record(line) != record
    ], []


def _repeated_keys(checks: Iterable[UnitCheck]) -> Iterator[Finding]:
    parts = [(check.unit, check.keys) for check in checks if len(check.keys)]
    if not parts:
        return
    keys = np.concatenate([keys for _, keys in parts])
    flat = np.ascontiguousarray(keys).view(f"V{keys.shape[1]}").reshape(-1)
    units = np.repeat([unit for unit, _ in parts], [len(keys) for _, keys in parts])
    _, first, inverse = np.unique(flat, return_index=True, return_inverse=True)
    for at in np.flatnonzero(first[inverse] != np.arange(len(flat))):
        key, unit = bytes(keys[at]).rstrip(b"\0").decode(errors="replace"), int(units[at])
        other = int(units[first[inverse[at]]])
        yield Finding(
            "keys", f"key/c/{unit}", f"sample key {key!r} is in unit {other} too; rename it and redo one", unit
        )


def _orphans(scan: _Scan) -> Iterator[Finding]:
    doubtful = [problem.unit for problem in scan.problems]
    found = find_orphans(scan.layout, scan.sizes, scan.committed.records, doubtful)
    for unit, paths in found.items():
        if is_held(scan.objects, unit):
            continue  # not left over: its writer is at work
        for path in find_orphans(scan.layout, sorted(paths), _records_now(scan, unit)).get(unit, ()):
            yield Finding("orphan", path, "no commit record covers it; `feature-store repair --yes` deletes it", unit)


def _records_now(scan: _Scan, unit: int | None) -> list[CommitRecord]:
    """A unit's records, those committed since the scan included."""
    return [] if unit is None else read_records(scan.objects, unit)


def _foreign(scan: _Scan) -> list[str]:
    known = {f"{path}/zarr.json" for path in scan.layout.arrays}
    return sorted(
        path
        for path in scan.sizes
        if classify_path(scan.layout, path).kind == "foreign"
        or (path.endswith("/zarr.json") and path not in known and not _is_group(path))
    )


def _is_group(path: str) -> bool:
    return path in ("taps/zarr.json", "view/zarr.json", "teacher/zarr.json") or path.startswith(BLOCKS)
