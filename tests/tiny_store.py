"""A small store without a teacher: a manifest, unit data by formula, and a store holding them."""

from pathlib import Path

import numpy as np

from feature_store.format.addressing import RowId
from feature_store.format.codecs.bound import bind_codecs
from feature_store.format.manifest import Manifest, SplitInfo, TapInfo, TarInfo, TeacherInfo
from feature_store.format.versions import software_versions
from feature_store.read.blocks import blocks_sha256
from feature_store.store import Store
from feature_store.views import draw_view, view_policy
from feature_store.write.unit import EncodedUnit

SAMPLES = (5, 3, 4)
TOKENS, CHANNELS, CLASSES, VIEWS = 4, 6, 3, 2
BLOCKS = {"norm.weight": np.arange(6, dtype=np.float32), "norm.bias": np.zeros(6, np.float32)}


def tiny_manifest(*, policy: str = "a2", codec: str = "f16", seed: int = 3, views: int = VIEWS) -> Manifest:
    return Manifest(
        teacher=TeacherInfo("test_vit", {}, "0" * 64, (8, 8), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), CLASSES, "float32"),
        split=SplitInfo("vit", 1, CHANNELS, (2, 2), CHANNELS, (2, 2), 0, "none"),
        blocks_sha256=blocks_sha256(BLOCKS),
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


def encoded(manifest: Manifest, **values: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
    """Values [V, n, ...] by name as a store of this manifest holds them."""
    return {name: codec.encode(values[name]) for name, codec in bind_codecs(manifest).items()}


def unit_data(
    manifest: Manifest, unit: int, *, views: int | None = None, quarantined: dict[int, str] | None = None
) -> EncodedUnit:
    views = manifest.num_views if views is None else views
    quarantined = quarantined or {}
    rng = np.random.default_rng(unit)
    samples = manifest.tars[unit].samples
    keys = [f"key/{unit}-{position}" for position in range(samples)]
    return EncodedUnit(
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
        features=encoded(
            manifest,
            stage4=rng.standard_normal((views, samples, TOKENS, CHANNELS)).astype(np.float32),
            logits=rng.standard_normal((views, samples, CLASSES)).astype(np.float32),
        ),
    )


def view_data(
    manifest: Manifest, unit: int, views: range, quarantined: dict[int, str] | None = None, salt: int = 0
) -> EncodedUnit:
    """Like unit_data for any range of views; what a view holds depends on nothing but unit, view and salt."""
    quarantined = quarantined or {}
    samples = manifest.tars[unit].samples
    keys = [f"key/{unit}-{position}" for position in range(samples)]
    rngs = [np.random.default_rng([unit, view, salt]) for view in views]
    shape = (samples, TOKENS, CHANNELS)
    return EncodedUnit(
        keys=keys,
        labels=(np.arange(samples) + unit) % CLASSES,
        quarantined=quarantined,
        params=[
            [
                None if i in quarantined else draw_view(manifest.policy, manifest.seed, key, view, (40, 30))
                for i, key in enumerate(keys)
            ]
            for view in views
        ],
        pixel_crc=np.stack([rng.integers(0, 2**32, samples, dtype=np.uint32) for rng in rngs]),
        features=encoded(
            manifest,
            stage4=np.stack([rng.standard_normal(shape).astype(np.float32) for rng in rngs]),
            logits=np.stack([rng.standard_normal((samples, CLASSES)).astype(np.float32) for rng in rngs]),
        ),
    )


def everything(store: Store) -> tuple:
    """All values a trainer can get from a store, comparable."""
    units = store.committed.units
    views = [(unit, view) for unit in units for view in sorted(store.committed_views(unit))]
    rows = [
        RowId(unit, i, view)
        for unit, view in views
        for i in range(store.manifest.tars[unit].samples)
        if i not in store.quarantined(unit)
    ]
    batch = store.source().read(rows)
    per_unit = [(store.keys(unit), store.labels(unit).tolist(), store.quarantined(unit)) for unit in units]
    per_view = [(store.view_params(*place), store.pixel_crcs(*place).tolist()) for place in views]
    logits = None if batch.logits is None else batch.logits.tobytes()
    return batch.rows.tolist(), batch.taps["stage4"].tobytes(), logits, per_unit, per_view


def tiny_store(path: Path, manifest: Manifest | None = None, units: tuple[int, ...] = (0, 1, 2), **data) -> Store:
    manifest = manifest or tiny_manifest()
    store = Store.create(path, manifest, BLOCKS)
    for unit in units:
        store.write_unit(unit, 0, unit_data(manifest, unit, **data))
    return store
