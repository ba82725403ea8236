from dataclasses import replace
from pathlib import Path

import pytest
from tiny_jobs import TinyTeacher, cache_config, make_config, store_files, write_tars

from feature_store.errors import InputError
from teacher_service.cache.job import cache
from teacher_service.config import PlanConfig
from teacher_service.plan.survey import survey
from teacher_service.plan.timing import Timing, measure

TIMING = Timing(
    samples=100,
    views=2,
    device="cpu",
    startup=5.0,
    calibration=3.0,
    workers=2,
    read=0.008,
    cut=0.001,
    busy={"transfer": 0.0, "forward": 0.002, "copy out": 0.0, "encode": 0.0004, "write": 0.0006},
)


@pytest.mark.parametrize(("views", "seconds"), [(1, 0.0045), (2, 0.0025), (8, 0.002)])
def test_timing_takes_the_slowest_stage_when_views_share_a_decode(views: int, seconds: float) -> None:
    assert TIMING.seconds_per_image(views) == pytest.approx(seconds)


def test_timing_adds_decoding_to_the_teacher_when_there_are_no_workers() -> None:
    assert replace(TIMING, workers=0).seconds_per_image(2) == pytest.approx(0.005 + 0.002)


def test_timing_takes_the_writer_when_the_disk_is_the_slowest() -> None:
    assert replace(TIMING, busy=TIMING.busy | {"write": 0.1}).seconds_per_image(8) == 0.1


def test_timing_counts_what_happens_once_besides_the_images() -> None:
    assert TIMING.seconds(1000, 8) == pytest.approx(5 + 3 + 2)
    assert TIMING.seconds(1000, 8, new=False) == pytest.approx(5 + 2)


def test_timing_breaks_even_after_as_many_epochs_as_views_when_the_teacher_is_the_slowest() -> None:
    assert TIMING.break_even_epochs(8) == pytest.approx(8)
    assert TIMING.break_even_epochs(1) == pytest.approx(0.0045 / 0.002)
    assert TIMING.break_even_students(8, 100) == pytest.approx(0.08)


@pytest.mark.parametrize("workers", [0, 1])
def test_measure_times_every_stage_and_leaves_nothing_behind(
    tmp_path: Path, tiny_swin: TinyTeacher, workers: int
) -> None:
    tars = write_tars(tmp_path, 7, 9)
    before = sorted(tmp_path.iterdir())
    config = make_config(
        PlanConfig,
        tars=tars, teacher=tiny_swin.name, model_kwargs=tiny_swin.model_kwargs, store=tmp_path / "store",
        views=2, batch_size=4, workers=workers, time_samples=12,
    )  # fmt: skip

    timing = measure(survey(config), config.teacher, config.compute)

    assert sorted(tmp_path.iterdir()) == before
    assert (timing.samples, timing.views, timing.device, timing.workers) == (10, 2, "cpu", workers)
    assert all(timing.busy[stage] > 0 for stage in ("forward", "encode", "write"))
    assert timing.decode(2) > 0  # how much of it is decoding is too short to tell for images this small
    assert timing.startup > 0
    assert timing.calibration > 0  # of int8, the default


def test_measure_does_with_what_there_is_when_there_are_fewer_samples(tmp_path: Path, tiny_swin: TinyTeacher) -> None:
    tars = write_tars(tmp_path, 3)
    config = make_config(
        PlanConfig,
        tars=tars, teacher=tiny_swin.name, model_kwargs=tiny_swin.model_kwargs, store=tmp_path / "store",
        batch_size=64, workers=0, time_samples=1000,
    )  # fmt: skip

    assert measure(survey(config), config.teacher, config.compute).samples == 2


def test_measure_says_what_to_do_when_there_is_a_single_sample(tmp_path: Path, tiny_swin: TinyTeacher) -> None:
    config = make_config(
        PlanConfig,
        tars=write_tars(tmp_path, 1), teacher=tiny_swin.name, model_kwargs=tiny_swin.model_kwargs,
        store=tmp_path / "store", time_samples=8,
    )  # fmt: skip

    with pytest.raises(InputError, match="needs two samples"):
        measure(survey(config), config.teacher, config.compute)


def test_measure_leaves_materialised_views_alone_when_they_are_part_of_what_is_timed(
    tmp_path: Path, tiny_swin: TinyTeacher
) -> None:
    tars, views = write_tars(tmp_path, 6, 5), tmp_path / "views"
    cache(cache_config(tars, tiny_swin, tmp_path / "store", views_out=str(views)))
    before = store_files(views)
    config = make_config(
        PlanConfig,
        tars=tars, teacher=tiny_swin.name, model_kwargs=tiny_swin.model_kwargs, store=tmp_path / "store",
        views_out=str(views), tap_codec="f16", batch_size=4, workers=0, time_samples=4,
    )  # fmt: skip

    measure(survey(config), config.teacher, config.compute)

    assert store_files(views) == before
