"""A small store without a teacher: a manifest, unit data by formula, and a store holding them."""

from pathlib import Path

import numpy as np

from feature_store.manifest import Manifest, SplitInfo, TapInfo, TarInfo, TeacherInfo
from feature_store.store import Store
from feature_store.versions import software_versions
from feature_store.views import draw_view, view_policy
from feature_store.writer import UnitData

SAMPLES = (5, 3, 4)
TOKENS, CHANNELS, CLASSES, VIEWS = 4, 6, 3, 2


def tiny_manifest(*, policy: str = "a2", codec: str = "f16", seed: int = 3, views: int = VIEWS) -> Manifest:
    return Manifest(
        teacher=TeacherInfo("test_vit", {}, "0" * 64, (8, 8), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), CLASSES, "float32"),
        split=SplitInfo("vit", 1, CHANNELS, (2, 2), CHANNELS, (2, 2), 0, "none"),
        blocks_sha256="1" * 64,
        taps={"stage4": TapInfo(TOKENS, CHANNELS, codec)},
        logits_codec=codec,
        policy=view_policy(policy, 8),
        seed=seed,
        num_views=views,
        tars=tuple(TarInfo(f"tar-{unit}.tar", n, f"{unit}" * 64) for unit, n in enumerate(SAMPLES)),
        capacity=max(SAMPLES),
        key_width=16,
        software=software_versions(),
    )


def unit_data(
    manifest: Manifest, unit: int, *, views: int | None = None, quarantined: dict[int, str] | None = None
) -> UnitData:
    views = manifest.num_views if views is None else views
    quarantined = quarantined or {}
    rng = np.random.default_rng(unit)
    samples = manifest.tars[unit].samples
    keys = [f"key/{unit}-{position}" for position in range(samples)]
    return UnitData(
        keys=keys,
        labels=rng.integers(0, CLASSES, samples),
        quarantined=quarantined,
        params=[
            [
                None if i in quarantined else draw_view(manifest.policy, manifest.seed, key, view, (40, 30))
                for i, key in enumerate(keys)
            ]
            for view in range(views)
        ],
        pixel_crc=rng.integers(0, 2**32, (views, samples), dtype=np.uint32),
        taps={"stage4": rng.standard_normal((views, samples, TOKENS, CHANNELS)).astype(np.float32)},
        logits=rng.standard_normal((views, samples, CLASSES)).astype(np.float32),
    )


def tiny_store(path: Path, manifest: Manifest | None = None, units: tuple[int, ...] = (0, 1, 2), **data) -> Store:
    manifest = manifest or tiny_manifest()
    store = Store.create(path, manifest, {})
    with store.locked_for_writing():
        for unit in units:
            store.write_unit(unit, 0, unit_data(manifest, unit, **data))
    return store
