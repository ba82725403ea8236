"""Data of the store benchmark: a store of Swin-L sized features, and copies of one unit by link."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from feature_store import Store, open_store
from feature_store.commits.record import CommitRecord, encode_record
from feature_store.format.layout import StoreLayout
from feature_store.format.manifest import Manifest, SplitInfo, TapInfo, TarInfo, TeacherInfo
from feature_store.format.versions import software_versions
from feature_store.views import draw_view, view_policy
from feature_store.write.unit import EncodedUnit

TOKENS, CHANNELS = 49, 1536
ROW_BYTES = TOKENS * CHANNELS * 2
STRIDE = ROW_BYTES + 4  # a row and its crc32c


def make_manifest(units: int, views: int, samples: int) -> Manifest:
    return Manifest(
        teacher=TeacherInfo("benchmark", {}, "0" * 64, (224, 224), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), 0, "float32"),
        split=SplitInfo("swin", 2, 768, (14, 14), CHANNELS, (7, 7), 0, "none"),
        blocks_sha256="0" * 64,
        taps={"stage4": TapInfo(TOKENS, CHANNELS, "f16")},
        logits_codec=None,
        policy=view_policy("rrc_flip", 224),
        seed=0,
        num_views=views,
        tars=tuple(TarInfo(f"{unit:05d}.tar", samples, f"{unit:064d}") for unit in range(units)),
        capacity=samples,
        key_width=24,
        software=software_versions(),
    )


def make_data(manifest: Manifest, unit: int) -> EncodedUnit:
    samples, views = manifest.tars[unit].samples, manifest.num_views
    rng = np.random.default_rng(unit)
    values = rng.standard_normal((views, samples, TOKENS * CHANNELS), np.float32).astype(np.float16)
    params = draw_view(manifest.policy, 0, "key", 0, (500, 375))
    return EncodedUnit(
        keys=[f"{unit:05d}/{at:06d}" for at in range(samples)],
        labels=np.zeros(samples, np.int64),
        quarantined={},
        params=[[params] * samples] * views,
        pixel_crc=np.zeros((views, samples), np.uint32),
        features={"stage4": {"": values.reshape(views, samples, TOKENS, CHANNELS)}},  # as codec f16 encodes them
    )


def make_store(path: Path, units: int, views: int, samples: int) -> Store:
    manifest = make_manifest(units, views, samples)
    store = Store.create(path, manifest, {})
    for unit in range(units):
        store.write_unit(unit, 0, make_data(manifest, unit))
    return store


def make_linked_store(path: Path, units: int, samples: int) -> Store:
    """A store of many units whose objects are the first unit's by hard link: many rows, few bytes.

    Paths, records, tables and descriptors are as many as in a real one; only the bytes repeat.
    """
    manifest = make_manifest(units, 1, samples)
    store = Store.create(path, manifest, {})
    store.write_unit(0, 0, make_data(manifest, 0))
    first = store.committed.record(0, 0)
    for unit in range(1, units):
        _link_unit(path, store.layout, first, unit)
    store.write_commit_index()
    return open_store(path)


def _link_unit(path: Path, layout: StoreLayout, first: CommitRecord, unit: int) -> None:
    tar = layout.manifest.tars[unit]
    sources, targets = layout.object_paths(0, range(1)), layout.object_paths(unit, range(1))
    proofs = {new: first.proof(old) for old, new in zip(sources, targets, strict=True)}
    for old, new in zip(sources, targets, strict=True):
        (path / new).parent.mkdir(parents=True, exist_ok=True)
        os.link(path / old, path / new)
    record = replace(first, unit=unit, tar=tar.name, tar_sha256=tar.header_sha256, objects=proofs)
    (path / record.path).write_bytes(encode_record(record))
