"""Summary of a store."""

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal
from rich.table import Table

from feature_store.commits.checksum_table import total_bytes
from feature_store.commits.record import CommitRecord, ObjectChecksum
from feature_store.format.layout import BLOCKS
from feature_store.tools.terminal import Console

if TYPE_CHECKING:
    from feature_store.store import Store
    from feature_store.tools.repair import Repair
    from feature_store.tools.verify import Report


def summarise(store: "Store") -> dict[str, Any]:
    """JSON summary: the manifest's claims and what commit records prove of them."""
    manifest, records = store.manifest, store.committed.records
    described = replace(manifest, tars=()).to_dict()
    repeated = _repeated(store, records)
    return {
        "path": store.objects.url,
        "format_version": manifest.format_version,
        "fingerprint": manifest.fingerprint(),
        "teacher": described["teacher"],
        "split": described["split"],
        "policy": described["policy"],
        "seed": manifest.seed,
        "views": manifest.num_views,
        "view_encoding": manifest.view_encoding,
        "taps": {  # without the codecs' statistics: thousands of numbers
            name: {"tokens": tap.tokens, "channels": tap.channels, "codec": tap.codec}
            for name, tap in manifest.taps.items()
        },
        "logits_codec": manifest.logits_codec,
        "units": len(manifest.tars),
        "capacity": manifest.capacity,
        "samples": sum(tar.samples for tar in manifest.tars),
        "committed_units": store.committed.complete_units,
        "committed_rows": sum((record.samples - len(record.quarantined)) * len(record.views) for record in records),
        "bytes": sum(total_bytes(record.objects) for record in records) - sum(proof.bytes for proof in repeated),
        "objects": sum(len(record.objects) for record in records) - len(repeated),
        "blocks_bytes": sum(store.objects.sizes(BLOCKS).values()) if store.objects.lists else None,
        "quarantined": [
            entry
            for unit in sorted({record.unit for record in records if record.quarantined})
            for entry in _quarantined(store, unit)
        ],
        "software": manifest.software,
        "licence": manifest.licence,
    }


def print_summary(summary: dict[str, Any], console: Console) -> None:
    """Human form of a summary."""
    teacher, split, blocks = summary["teacher"], summary["split"], summary["blocks_bytes"]
    table = Table(show_header=False, title=summary["path"], title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in {
        "teacher": f"{teacher['name']} {teacher['model_kwargs'] or ''}".strip(),
        "weights sha256": teacher["weights_sha256"],
        "later blocks": _later_blocks(split),
        "taps": ", ".join(f"{n} [{t['tokens']}, {t['channels']}] {t['codec']}" for n, t in summary["taps"].items()),
        "logits": f"{teacher['num_classes']} classes {summary['logits_codec']}" if summary["logits_codec"] else "none",
        "views": f"{summary['views']} by policy {summary['policy']['name']}, {_hw(summary['policy']['size'])} px, "
        f"seed {summary['seed']}" + (f", materialised as {encoding}" if (encoding := summary["view_encoding"]) else ""),
        "units": f"{summary['committed_units']} of {summary['units']} complete",
        "rows": f"{summary['committed_rows']:,} committed of {summary['samples'] * summary['views']:,}",
        "size": f"{decimal(summary['bytes'])} committed in {summary['objects']:,} objects",
        "size of later blocks": "not known: a web server cannot list them" if blocks is None else decimal(blocks),
        "quarantined": str(len(summary["quarantined"])),
        "fingerprint": summary["fingerprint"],
        "licence": summary["licence"] or "not stated",
    }.items():
        table.add_row(name, value)
    console.print(table)
    for entry in summary["quarantined"]:
        console.print(
            f"quarantined: {entry['tar']} #{entry['position']} {entry['key']}: {entry['reason']}",
        )


def print_report(report: "Report", console: Console) -> None:
    """Human form of a verification."""
    what = "existence and length" if report.quick else "every byte"
    console.print(
        f"{report.store}: {report.units} units, {report.records} records, {report.objects:,} objects, "
        f"{decimal(report.bytes)}; compared {what}",
    )
    for finding in report.findings:
        console.print(f"{_unit(finding.unit)} {finding.kind}: {finding.path}: {finding.message}")
    if report.foreign:
        console.print(f"not of this format, no harm: {', '.join(report.foreign)}")
    if report.missing_views:
        console.print(f"still to be written: {len(report.missing_views)} units")
    console.print("sound" if not report.findings else f"{len(report.findings)} findings")


def print_repair(repair: "Repair", console: Console) -> None:
    """Human form of a repair."""
    deleted, removed, rewritten = (
        ("deleted", "removed", "rewrote") if repair.done else ("would delete", "would remove", "would rewrite")
    )
    kept = [path for path in repair.damaged if path not in repair.dropped]
    for what, paths in ((deleted, repair.orphans), (rewritten, repair.metadata), (removed, repair.dropped)):
        for path in paths:
            console.print(f"{what} {path}")
    for path in kept:
        console.print(f"damaged, kept: {path}; --drop-damaged removes it so that it is written again")
    for finding in repair.beyond_repair:
        console.print(f"cannot be repaired here: {finding.path}: {finding.message}")
    for unit, views in repair.redo.items():
        console.print(f"write again: unit {unit}, views {', '.join(map(str, views))}")
    if not repair.done:
        console.print("nothing was changed; --yes applies it")


def _unit(unit: int | None) -> str:
    return "store" if unit is None else f"unit {unit}"


def _repeated(store: "Store", records: list[CommitRecord]) -> list[ObjectChecksum]:
    """Proofs of objects without views that an earlier record of the same unit gave already."""
    later = [record for before, record in pairwise(records) if before.unit == record.unit]
    return [record.proof(spec.object_path(record.unit)) for record in later for spec in store.layout.per_unit]


def _quarantined(store: "Store", unit: int) -> list[dict[str, Any]]:
    reasons = store.quarantined(unit)
    keys, tar = store.keys(unit), store.manifest.tars[unit].name
    return [
        {"unit": unit, "tar": tar, "position": position, "key": keys[position], "reason": reason}
        for position, reason in reasons.items()
    ]


def _hw(size: list[int]) -> str:
    return f"{size[0]}x{size[1]}"


def _later_blocks(split: dict[str, Any]) -> str:
    final = f"{_hw(split['output_grid'])} x {split['output_dim']}"
    if not split["depth"]:
        return f"none: TPP is off with this teacher, a {split['family']}; final map {final}"
    taken = f"{_hw(split['input_grid'])} x {split['input_dim']}"
    return f"{split['family']}, {split['depth']} blocks, grid {taken} -> {final}, prefix {split['prefix']}"
