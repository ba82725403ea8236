from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_jobs import TinyTeacher, make_config, write_tars

from feature_store.errors import InputError
from feature_store.format.layout import StoreLayout
from feature_store.format.manifest import Manifest
from feature_store.inputs.tar import Tar
from teacher_service.cache import encode as rows_module
from teacher_service.cache.decode import Task, ViewBatch
from teacher_service.cache.encode import UnitEncoder
from teacher_service.config import PlanConfig
from teacher_service.plan.survey import job_manifest, outline_teacher


@pytest.fixture
def manifest(tmp_path: Path, tiny_swin: TinyTeacher) -> Manifest:
    """Two views of five samples, taps [4, 64], four classes, f16."""
    tars = write_tars(tmp_path, 5)
    config = make_config(
        PlanConfig, tars=tars, teacher=tiny_swin.name, model_kwargs=tiny_swin.model_kwargs, views=2, tap_codec="f16"
    )
    outline = outline_teacher(config.teacher)
    return job_manifest(config, [Tar.open(tars[0])], outline)


def _batch(start: int, count: int, quarantined: dict[int, str] | None = None) -> ViewBatch:
    return ViewBatch(
        task=Task(0, range(2)),
        start=start,
        labels=np.arange(start, start + count),
        quarantined=quarantined or {},
        params=[[None] * count for _ in range(2)],
        pixel_crc=np.array([[100 * view + i for i in range(start, start + count)] for view in range(2)], np.uint32),
        pixels=torch.zeros(count, 2, 1, 1, 3, dtype=torch.uint8),
    )


def _outputs(start: int, count: int) -> dict[str, np.ndarray]:
    """Teacher outputs in batch order, sample-major, each filled with 10 * position + view."""
    codes = np.array([10 * i + view for i in range(start, start + count) for view in range(2)], np.float32)
    taps = {"stage4": np.broadcast_to(codes[:, None, None], (len(codes), 4, 64))}
    return taps | {"logits": np.repeat(codes[:, None], 4, axis=1)}


@pytest.mark.parametrize("threads", [0, 2])
def test_unit_encoder_put_every_view_in_its_place_when_batches_are_joined(
    manifest: Manifest, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "PIECE_SAMPLES", 2)
    rows = UnitEncoder(StoreLayout(manifest), list("abcde"), 2)
    with ThreadPoolExecutor(threads) if threads else nullcontext() as pool:
        for batch in (_batch(0, 3), _batch(3, 2, {4: "broken"})):
            assert not rows.whole
            rows.add(batch, _outputs(batch.start, len(batch)), pool)
    assert rows.whole

    data = rows.unit()

    expected = [[10 * i + view for i in range(5)] for view in range(2)]
    (tap,), (logits,) = data.features["stage4"].values(), data.features["logits"].values()
    assert tap.shape == (2, 5, 4, 64)
    assert tap.dtype == np.float16
    assert tap[..., 3, 63].tolist() == expected
    assert logits[..., 2].tolist() == expected
    assert data.labels.tolist() == [0, 1, 2, 3, 4]
    assert data.pixel_crc.tolist() == [[0, 1, 2, 3, 4], [100, 101, 102, 103, 104]]
    assert data.quarantined == {4: "broken"}
    assert [len(params) for params in data.params] == [5, 5]


def test_unit_encoder_have_no_logits_when_the_teacher_has_no_classifier(manifest: Manifest) -> None:
    rows = UnitEncoder(StoreLayout(replace(manifest, logits_codec=None)), list("abcde"), 2)
    rows.add(_batch(0, 5), _outputs(0, 5))

    assert rows.unit().features.keys() == {"stage4"}


@pytest.mark.parametrize("value", [np.nan, 1e6])
def test_unit_encoder_refuse_a_value_that_float16_cannot_hold(manifest: Manifest, value: float) -> None:
    outputs = _outputs(0, 2)
    outputs["stage4"] = outputs["stage4"].copy()
    outputs["stage4"][1, 2, 3] = value

    with pytest.raises(InputError, match="cannot hold"):
        UnitEncoder(StoreLayout(manifest), list("abcde"), 2).add(_batch(0, 2), outputs)
