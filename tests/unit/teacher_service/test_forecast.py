from dataclasses import replace
from pathlib import Path

import pytest
from tiny_jobs import TinyTeacher, make_config, with_options, write_tars

from teacher_service.config import PlanConfig
from teacher_service.plan import forecast as forecast_module
from teacher_service.plan.forecast import Forecast, forecast
from teacher_service.plan.sizes import plan
from teacher_service.plan.survey import survey
from teacher_service.plan.timing import Timing

TIMING = Timing(
    samples=6, views=2, device="cpu", startup=2.0, calibration=1.0, workers=1, read=0.0, cut=0.0,
    busy={"forward": 0.5, "write": 1.0},
)  # fmt: skip


def _forecast(config: PlanConfig, processes: int = 1) -> Forecast:
    return forecast(survey(config), config, processes)


@pytest.fixture
def config(tmp_path: Path, tiny_swin: TinyTeacher) -> PlanConfig:
    return make_config(
        PlanConfig,
        tars=write_tars(tmp_path, 30, 21), teacher=tiny_swin.name, model_kwargs=tiny_swin.model_kwargs,
        store=tmp_path / "store", views=3, tap_codec="f16",
    )  # fmt: skip


def test_forecast_says_for_each_codec_and_number_of_views_what_a_plan_of_it_says(config: PlanConfig) -> None:
    found = _forecast(config)

    assert replace(found.plan, free_bytes=0) == replace(plan(config), free_bytes=0)  # others write to this disk, too
    for codec in ("f32", "int8", "int4"):
        assert found.codec_bytes[codec] == pytest.approx(
            plan(with_options(config, tap_codec=codec)).total_bytes, rel=0.005
        )
    by_views = {cost.views: cost for cost in found.view_counts}
    assert 3 in by_views
    for views in (1, 3, 16):
        exact = plan(with_options(config, views=views))
        assert by_views[views].total_bytes == pytest.approx(exact.total_bytes, rel=0.005)
        assert by_views[views].fits == exact.fits


@pytest.mark.parametrize("codec", ["f32", "f16", "int8"])
def test_forecast_counts_prefix_tokens_as_a_plan_does(tmp_path: Path, tiny_vit: TinyTeacher, codec: str) -> None:
    config = make_config(
        PlanConfig, tars=write_tars(tmp_path, 9), teacher=tiny_vit.name, model_kwargs=tiny_vit.model_kwargs,
        store=tmp_path / "store",
    )  # fmt: skip
    assert _forecast(config).codec_bytes[codec] == plan(with_options(config, tap_codec=codec)).total_bytes


def test_forecast_has_no_times_when_nothing_is_measured(config: PlanConfig) -> None:
    found = _forecast(config)

    assert (found.seconds, found.device_hours, found.online_device_hours_per_epoch, found.timing) == (None,) * 4
    assert all(cost.device_hours is None and cost.break_even_epochs is None for cost in found.view_counts)


def test_forecast_counts_time_and_break_even_from_what_was_measured(
    config: PlanConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecast_module, "measure", lambda survey, spec, compute: TIMING)

    found = _forecast(with_options(config, time_samples=6))

    assert found.seconds == pytest.approx(2 + 1 + 51 * 3 * 1.0)
    assert found.device_hours == pytest.approx((2 + 1 + 51 * 3) / 3600)
    assert found.online_device_hours_per_epoch == pytest.approx(51 * 0.5 / 3600)
    (eight,) = [cost for cost in found.view_counts if cost.views == 8]
    assert eight.device_hours == pytest.approx((2 + 1 + 51 * 8) / 3600)
    assert eight.break_even_epochs == pytest.approx(16)  # the writer takes twice as long as the teacher
    assert eight.break_even_students == {100: pytest.approx(0.16), 300: pytest.approx(16 / 300)}


@pytest.mark.parametrize(("processes", "share"), [(2, 3 / 5), (5, 1 / 5), (8, 1 / 5)])
def test_forecast_divides_whole_units_when_processes_share_the_job(
    config: PlanConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int, share: float
) -> None:
    monkeypatch.setattr(forecast_module, "measure", lambda survey, spec, compute: TIMING)
    job = with_options(config, tars=write_tars(tmp_path, *[4] * 5), time_samples=6)

    found = _forecast(job, processes)

    assert found.seconds == pytest.approx(2 + 1 + 20 * 3 * 1.0 * share)
    assert found.device_hours == pytest.approx(processes * found.seconds / 3600)
    assert found.write_rate == pytest.approx(found.plan.remaining_bytes / found.seconds)
    assert found.view_counts == _forecast(job).view_counts


def test_forecast_is_a_flat_object_with_the_plans_own_numbers(config: PlanConfig) -> None:
    found = _forecast(config).to_dict()

    assert (found["views"], found["samples"], found["timing"]) == (3, 51, None)
    assert found["view_counts"][0]["views"] == 1
    assert "plan" not in found
