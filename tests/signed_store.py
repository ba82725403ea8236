"""Changes a store's manifest and records and signs them anew, so that hashes and checksums agree with the nonsense."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from feature_store.format.checksums import crc32c
from feature_store.format.manifest import fingerprint_of

GROWTH = ("num_views", "tars", "software", "licence")


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def sign(
    store: Path,
    manifest: Callable[[dict], Any] = lambda stated: None,
    record: Callable[[dict], Any] = lambda stated: None,
) -> None:
    """Apply changes to the manifest, and to the records of unit 0."""
    root = json.loads((store / "zarr.json").read_text())
    stated = root["attributes"]["manifest"]
    manifest(stated)
    root["attributes"]["manifest_sha256"] = fingerprint_of(stated)
    (store / "zarr.json").write_text(json.dumps(root))
    identity = fingerprint_of({name: value for name, value in stated.items() if name not in GROWTH})
    for path in sorted(store.glob("commits/u*.json")):
        stored = json.loads(path.read_text())
        del stored["record_crc32c"]
        stored["store"] = identity
        if path.name.startswith("u00000"):
            record(stored)
        path.write_bytes(_canonical({**stored, "record_crc32c": crc32c(_canonical(stored))}))


def write_index(store: Path, payload: bytes) -> None:
    """Put a commit index of any content there, with its right crc32c."""
    (store / "commits/index").write_bytes(payload + struct.pack("<I", crc32c(payload)))
