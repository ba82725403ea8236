"""Writes tests/golden/store_v1, a small store of format version 1, and the values it must read as.

Run it only while version 1 is not released; from then on the store is kept as it is, and every later version reads it:

    python tests/golden/make_store_v1.py

It has what the format knows: two taps in different codecs, logits, RandAugment parameters, a quarantined sample, views
and a tar appended later, records with one and with two views, records inside the commit index and outside of it.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from feature_store import Store, open_store
from feature_store.format.codecs.bound import bind_codecs, calibrated
from feature_store.format.manifest import Manifest, SplitInfo, TapInfo, TarInfo, TeacherInfo
from feature_store.read.blocks import blocks_sha256
from feature_store.views import draw_view, view_policy
from feature_store.write.unit import EncodedUnit

HERE = Path(__file__).parent
STORE, EXPECTED = HERE / "store_v1", HERE / "store_v1.json"
TAPS = {"stage4": (4, 8, "int8"), "stage3": (9, 6, "f32+zstd")}
CLASSES = 5
TARS = (("a.tar", 4), ("b.tar", 3), ("c.tar", 2))
SOFTWARE = {"python": "3.11", "scalekd-cache": "0.1.0"}
BLOCKS = {
    "norm.weight": np.linspace(0.5, 1.5, 8, dtype=np.float32),
    "norm.bias": np.zeros(8, np.float32),
    "index": np.arange(6).reshape(2, 3),
}


def main() -> None:
    """Write the store step by step, as a user would who lets it grow, and what it reads as."""
    shutil.rmtree(STORE, ignore_errors=True)
    small = calibrated(manifest(views=2, tars=2), {name: values(name, 0, 0) for name in TAPS})
    store = Store.create(STORE, small, BLOCKS)
    store.write_unit(0, 0, unit_data(small, 0, range(2)))
    store.write_unit(1, 0, unit_data(small, 1, range(1), {1: "truncated JPEG"}))
    store.write_commit_index()
    large = replace(small, num_views=3, tars=manifest(views=3, tars=3).tars)
    store = store.grow(large)
    store.write_unit(1, 1, unit_data(large, 1, range(1, 3), {1: "truncated JPEG"}))
    store.write_unit(2, 0, unit_data(large, 2, range(2)))
    EXPECTED.write_text(json.dumps(contents(open_store(STORE)), indent=1))


def manifest(views: int, tars: int) -> Manifest:
    """With room to grow: key width and capacity are larger than needed."""
    return Manifest(
        teacher=TeacherInfo("test_vit", {"depth": 2}, "0" * 64, (16, 16), (0.5,) * 3, (0.2,) * 3, CLASSES, "float32"),
        split=SplitInfo("vit", 1, 6, (3, 3), 8, (2, 2), 0, "none"),
        blocks_sha256=blocks_sha256(BLOCKS),
        taps={name: TapInfo(*tap) for name, tap in TAPS.items()},
        logits_codec="f16",
        policy=view_policy("a2", 16),
        seed=5,
        num_views=views,
        tars=tuple(TarInfo(name, samples, f"{unit}" * 64) for unit, (name, samples) in enumerate(TARS[:tars])),
        capacity=5,
        key_width=12,
        software=SOFTWARE,
        licence="made up",
    )


def unit_data(of: Manifest, unit: int, views: range, quarantined: dict[int, str] | None = None) -> EncodedUnit:
    """Values by formula."""
    quarantined = quarantined or {}
    keys = [f"é{unit}/{position}" for position in range(TARS[unit][1])]
    return EncodedUnit(
        keys=keys,
        labels=np.array([-1 if i in quarantined else (unit + i) % CLASSES for i in range(len(keys))]),
        quarantined=quarantined,
        params=[
            [
                None if i in quarantined else draw_view(of.policy, of.seed, key, view, (40, 30))
                for i, key in enumerate(keys)
            ]
            for view in views
        ],
        pixel_crc=np.array([[1000 * unit + 100 * view + i for i in range(len(keys))] for view in views], np.uint32),
        features={
            name: codec.encode(np.stack([values(name, unit, view) for view in views]))
            for name, codec in bind_codecs(of).items()
        },
    )


def values(name: str, unit: int, view: int) -> np.ndarray:
    """Smooth numbers, other ones for each array, unit and view: float32 [n, ...]."""
    shape = (TARS[unit][1], *(TAPS[name][:2] if name in TAPS else (CLASSES,)))
    count = int(np.prod(shape))
    return np.sin(np.arange(count) * 0.37 + unit + 10 * view + len(name)).astype(np.float32).reshape(shape)


def contents(store: Store) -> dict:
    """Everything the store says, as JSON; floats exactly, as hexadecimal bytes."""
    units = {}
    for unit in store.committed.units:
        views = {}
        for view in sorted(store.committed_views(unit)):
            (batch,) = store.source().iter_unit(unit, view)
            params = [None if p is None else vars(p) for p in store.view_params(unit, view)]
            views[str(view)] = {
                "rows": [list(row) for row in batch.rows],
                "taps": {name: np.asarray(tap, "<f4").tobytes().hex() for name, tap in sorted(batch.taps.items())},
                "logits": np.asarray(batch.logits, "<f4").tobytes().hex(),
                "params": json.loads(json.dumps(params)),
                "pixel_crc": store.pixel_crcs(unit, view).tolist(),
            }
        units[str(unit)] = {
            "keys": store.keys(unit),
            "labels": store.labels(unit).tolist(),
            "quarantined": {str(position): reason for position, reason in store.quarantined(unit).items()},
            "views": views,
        }
    return {"manifest": store.manifest.to_dict(), "units": units}


if __name__ == "__main__":
    main()
