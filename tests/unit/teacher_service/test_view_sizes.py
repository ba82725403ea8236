"""Room for materialised views: predicted before the job, against what it writes."""

import shutil
from pathlib import Path

import pytest
from tiny_jobs import TinyTeacher, make_config, noise_samples, with_options, write_tar

from feature_store.errors import ResourceError
from teacher_service.cache.job import cache
from teacher_service.config import CacheConfig
from teacher_service.plan.sizes import plan


@pytest.fixture
def config(tmp_path: Path, tiny_swin: TinyTeacher) -> CacheConfig:
    tars = tuple(write_tar(tmp_path / f"{unit}.tar", noise_samples(f"u{unit}-", 40, unit)) for unit in range(2))
    return make_config(
        CacheConfig,
        tars=tars,
        teacher=tiny_swin.name,
        model_kwargs=tiny_swin.model_kwargs,
        checkpoint=tiny_swin.checkpoint,
        store=tmp_path / "store",
        views=2,
        views_out=str(tmp_path / "views"),
        workers=0,
        device="cpu",
    )


def test_plan_predicts_the_view_tars_when_they_are_written(config: CacheConfig) -> None:
    assert config.views.out is not None
    predicted = plan(config).view_tars
    assert predicted is not None
    assert predicted.remaining_bytes == predicted.total_bytes
    cache(config)
    written = sum(file.stat().st_size for file in Path(config.views.out).rglob("*.tar"))
    assert predicted.total_bytes == pytest.approx(written, rel=0.05)
    left = plan(config).view_tars
    assert left is not None
    assert left.remaining_bytes == 0


def test_job_is_refused_when_store_and_views_fit_alone_but_not_together(
    config: CacheConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    planned = plan(config)
    assert planned.view_tars is not None
    together = planned.remaining_bytes + planned.view_tars.remaining_bytes
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=together - 1))
    with pytest.raises(ResourceError, match=r"more are needed where the views go, .*views, and .* are free"):
        cache(config)
    assert not config.store.exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=together))
    refitted = plan(with_options(config, views=2)).view_tars
    assert refitted is not None
    assert refitted.fits
