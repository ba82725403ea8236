"""From tars through teachers of every family into a store, and what a store without logits says of itself."""

from pathlib import Path

import pytest
import torch
from tiny_jobs import cache_config, make_teacher, write_tars

from feature_store import RowId, open_store
from teacher_service.cache.job import cache
from teacher_service.plan.sizes import plan

_SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
TEACHERS = {
    "beitv2_large_patch16_224": {**_SMALL, "num_classes": 4},
    "eva02_large_patch14_448": {**_SMALL, "num_classes": 4},
    "vit_large_patch14_reg4_dinov2": _SMALL,
    "vit_large_patch16_dinov3": _SMALL,
}


@pytest.mark.parametrize("name", TEACHERS)
def test_cached_rows_and_blocks_belong_together_whatever_the_family(tmp_path: Path, name: str) -> None:
    teacher = make_teacher(tmp_path, name, TEACHERS[name])
    tars = write_tars(tmp_path, 4)
    config = cache_config(tars, teacher, tmp_path / "store", tap_codec="f32", taps=("stage4", "stage3"))
    promised = plan(config)

    cache(config)

    store = open_store(config.store)
    assert promised.taps.keys() == store.manifest.taps.keys() == {"stage4", "stage3", "stage3_prefix"}
    batch = store.source().read([RowId(0, position, 0) for position in range(4)])
    taps = {tap: torch.from_numpy(values) for tap, values in batch.taps.items()}
    with torch.no_grad():
        joined = store.later_blocks()(taps["stage3"], taps["stage3_prefix"])
    torch.testing.assert_close(joined, taps["stage4"], rtol=1e-3, atol=1e-4)  # the job's batches may be other ones
    classifier = TEACHERS[name].get("num_classes")
    assert (store.manifest.logits_codec is None) == (batch.logits is None) == (classifier is None)
    assert any(path.name == "logits" for path in config.store.iterdir()) == (classifier is not None)
