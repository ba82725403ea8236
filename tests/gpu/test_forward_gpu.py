"""The GPU's path through the pipeline; run with `pytest -m gpu`, left out otherwise."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_jobs import TinyTeacher, cache_config, with_options, write_tars

from feature_store import RowId, open_store
from feature_store.teacher.model import load_teacher
from teacher_service.cache.forward import Forward
from teacher_service.cache.job import cache
from teacher_service.cache.stage_timer import StageTimer

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("compiled", [False, True])
def test_forward_gives_on_a_gpu_what_it_gives_on_a_cpu(tiny_swin: TinyTeacher, compiled: bool) -> None:
    load = {"checkpoint": tiny_swin.checkpoint, "model_kwargs": tiny_swin.model_kwargs}
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (70, 32, 32, 3), np.uint8))
    expected = load_teacher(tiny_swin.name, **load)(pixels)
    timer = StageTimer()
    forward = Forward(load_teacher(tiny_swin.name, **load, device="cuda"), ["stage4"], 32, timer, compile=compiled)

    found = [forward(pixels.pin_memory()) for _ in range(4)]  # several under way at once

    for outputs in found:
        arrays = outputs.arrays()
        np.testing.assert_allclose(arrays["stage4"], expected.taps["stage4"], rtol=1e-2, atol=1e-2)
        np.testing.assert_allclose(arrays["logits"], expected.logits, rtol=1e-2, atol=1e-2)
    assert all(timer.times().busy[stage] > 0 for stage in ("transfer", "forward", "copy out"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_cache_writes_on_a_gpu_what_it_writes_on_a_cpu(tmp_path: Path, tiny_swin: TinyTeacher, dtype: str) -> None:
    on_cpu = cache_config(write_tars(tmp_path, 9, 5), tiny_swin, tmp_path / "cpu", views=2, workers=1)
    on_gpu = with_options(on_cpu, store=tmp_path / "gpu", device="cuda", compute_dtype=dtype)

    cache(on_cpu)
    cache(on_gpu)

    rows = [
        RowId(unit, position, view) for unit, count in ((0, 9), (1, 5)) for position in range(count) for view in (0, 1)
    ]
    one, two = (open_store(config.store).source().read(rows).taps["stage4"] for config in (on_cpu, on_gpu))
    np.testing.assert_allclose(one.astype(np.float32), two.astype(np.float32), atol=0.1)
