"""Repair of a damaged or interrupted store."""

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from feature_store.backends.base import ObjectStore
from feature_store.backends.open import open_objects
from feature_store.commits import index as commit_index
from feature_store.commits import orphans as orphans
from feature_store.commits.locks import exclusive, lock_name
from feature_store.commits.log import load_commits
from feature_store.commits.record import parse_record_path
from feature_store.commits.root import ROOT, read_manifest
from feature_store.format.layout import StoreLayout
from feature_store.read.blocks import read_blocks
from feature_store.tools.unit_check import Finding
from feature_store.tools.verify import Report, verify
from feature_store.write.create import metadata

DAMAGE = ("missing", "damaged", "record")  # fixed by writing the unit again


@dataclass(frozen=True)
class Repair:
    """Actions of a repair, done or planned.

    Attributes:
        store: Where the store is.
        done: Whether anything was changed; false for a dry run.
        orphans: Objects of interrupted writers: deleted.
        metadata: Metadata of groups and arrays: written again.
        damaged: Commit records that cover damaged objects, and damaged records: kept, unless dropping was asked for.
        dropped: Those that were (or would be) removed, so that their units are written again.
        redo: Units and views to write again with the same ``teacher-service cache`` command.
        beyond_repair: Faults that writing again does not fix: unreadable disks, repeated keys, the later blocks, the
            root, records of a newer release.
    """

    store: str
    done: bool
    orphans: list[str] = field(default_factory=list)
    metadata: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    redo: dict[int, list[int]] = field(default_factory=dict)
    beyond_repair: list[Finding] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


def repair(
    url: str | Path,
    *,
    apply: bool = False,
    drop_damaged: bool = False,
    quick: bool = False,
    workers: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Repair:
    """Verify a store, then delete orphan objects, and write metadata and the commit index again.

    Committed data that is good is never touched. In a bucket, run it only while no writer does.

    Args:
        url: The store.
        apply: Apply the repairs; otherwise only list them.
        drop_damaged: Also remove the records that cover damaged objects, and damaged records.
        quick: Look for damage by existence and length only.
        workers: Processes.
        progress: Called with units done and in all.

    Raises:
        InputError: Not a store.
        CorruptStoreError: Its manifest is damaged.
    """
    report = verify(url, quick=quick, workers=workers, progress=progress)
    objects = open_objects(url)
    layout = StoreLayout(read_manifest(objects))
    damaged = _damaged_records(report)
    rewritten = [find.path for find in report.findings if find.kind == "metadata" and find.path != ROOT]
    plan = Repair(
        store=report.store,
        done=apply,
        orphans=[finding.path for finding in report.findings if finding.kind == "orphan"],
        metadata=rewritten,
        damaged=damaged,
        dropped=damaged if drop_damaged else [],
        redo=_redo(report, damaged),
        beyond_repair=[
            finding
            for finding in report.findings
            if finding.kind in ("blocks", "unreadable", "keys", "newer")
            or (finding.kind == "metadata" and finding.path == ROOT)
        ],
    )
    return _apply(objects, layout, plan) if apply else plan


def _apply(objects: ObjectStore, layout: StoreLayout, plan: Repair) -> Repair:
    changed = [*plan.metadata, *plan.dropped]
    with suppress(FileNotFoundError):
        objects.delete(commit_index.PATH)  # first, so that it never speaks for a record that is gone
        changed.append(commit_index.PATH)
    if plan.metadata:
        known = metadata(layout.manifest, _tensors(objects, plan))
        for path in plan.metadata:
            objects.put(path, known[path])
    for path in plan.dropped:
        _drop(objects, path)
    objects.sync(changed)
    removed = orphans.remove(objects, layout)
    committed, _ = load_commits(objects, layout)
    commit_index.write_index(objects, layout, committed.records)
    return Repair(**{**plan.__dict__, "orphans": removed})


def _tensors(objects: ObjectStore, plan: Repair) -> dict[str, np.ndarray]:
    """The later blocks, unless they are what is damaged."""
    return {} if any(finding.kind == "blocks" for finding in plan.beyond_repair) else read_blocks(objects)


def _drop(objects: ObjectStore, path: str) -> None:
    """Remove a record; its objects are orphans from here on."""
    place = parse_record_path(path)
    refusal = f"the unit of {path} is being written; try again later"
    with exclusive(objects, lock_name(place[0] if place else None), refusal), suppress(FileNotFoundError):
        objects.delete(path)


def _damaged_records(report: Report) -> list[str]:
    found = {finding.record or finding.path for finding in report.findings if finding.kind in DAMAGE}
    return sorted(found)


def _redo(report: Report, damaged: Iterable[str]) -> dict[int, list[int]]:
    redo = {unit: set(views) for unit, views in report.missing_views.items()}
    for path in damaged:
        if (place := parse_record_path(path)) is not None:
            unit, first, last = place
            redo.setdefault(unit, set()).update(range(first, last + 1))
    return {unit: sorted(views) for unit, views in sorted(redo.items())}
