"""What a store holds, for people and programs."""

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from feature_store.commits import CommitRecord

if TYPE_CHECKING:
    from feature_store.store import Store


def summarise(store: "Store") -> dict[str, Any]:
    """JSON summary: the manifest's claims and what commit records prove of them."""
    manifest, records = store.manifest, store.committed.records
    return {
        "path": str(store.path),
        "format_version": manifest.format_version,
        "fingerprint": manifest.fingerprint(),
        "teacher": manifest.to_dict()["teacher"],
        "split": manifest.to_dict()["split"],
        "policy": manifest.to_dict()["policy"],
        "seed": manifest.seed,
        "views": manifest.num_views,
        "taps": manifest.to_dict()["taps"],
        "logits_codec": manifest.logits_codec,
        "units": len(manifest.tars),
        "capacity": manifest.capacity,
        "samples": sum(tar.samples for tar in manifest.tars),
        "committed_units": sum(
            store.committed_views(unit) == set(range(manifest.num_views)) for unit in range(len(manifest.tars))
        ),
        "committed_rows": sum((record.samples - len(record.quarantined)) * len(record.views) for record in records),
        "bytes": sum(proof.bytes for record in records for proof in record.objects.values()),
        "objects": sum(len(record.objects) for record in records),
        "quarantined": [entry for record in _first_views(records) for entry in _quarantined(store, record)],
        "software": manifest.software,
        "licence": manifest.licence,
    }


def print_summary(summary: dict[str, Any], console: Console) -> None:
    """Human form of a summary."""
    teacher, split = summary["teacher"], summary["split"]
    table = Table(show_header=False, title=summary["path"], title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in {
        "teacher": f"{teacher['name']} {teacher['model_kwargs'] or ''}".strip(),
        "weights sha256": teacher["weights_sha256"],
        "later blocks": f"{split['family']}, {split['depth']} blocks, grid {_hw(split['input_grid'])} x "
        f"{split['input_dim']} -> {_hw(split['output_grid'])} x {split['output_dim']}, prefix {split['prefix']}",
        "taps": ", ".join(f"{n} [{t['tokens']}, {t['channels']}] {t['codec']}" for n, t in summary["taps"].items()),
        "logits": f"{teacher['num_classes']} classes {summary['logits_codec']}" if summary["logits_codec"] else "none",
        "views": f"{summary['views']} by policy {summary['policy']['name']}, {_hw(summary['policy']['size'])} px, "
        f"seed {summary['seed']}",
        "units": f"{summary['committed_units']} of {summary['units']} complete",
        "rows": f"{summary['committed_rows']:,} committed of {summary['samples'] * summary['views']:,}",
        "size": f"{summary['bytes'] / 1e6:,.1f} MB in {summary['objects']:,} objects",
        "quarantined": str(len(summary["quarantined"])),
        "fingerprint": summary["fingerprint"],
        "licence": summary["licence"] or "not stated",
    }.items():
        table.add_row(name, value)
    console.print(table)
    for entry in summary["quarantined"]:
        console.print(
            f"quarantined: {entry['tar']} #{entry['position']} {entry['key']}: {entry['reason']}",
            markup=False,
        )


def _first_views(records: list[CommitRecord]) -> list[CommitRecord]:
    return list({record.unit: record for record in reversed(records)}.values())[::-1]


def _quarantined(store: "Store", record: CommitRecord) -> list[dict[str, Any]]:
    if not record.quarantined:
        return []
    keys = store.keys(record.unit)
    return [
        {
            "unit": record.unit,
            "tar": record.tar,
            "position": position,
            "key": keys[position],
            "reason": reason,
        }
        for position, reason in record.quarantined.items()
    ]


def _hw(size: list[int]) -> str:
    return f"{size[0]}x{size[1]}"
