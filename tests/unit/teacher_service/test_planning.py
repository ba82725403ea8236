import shutil
from pathlib import Path

import pytest
from tiny_jobs import TinyTeacher, make_config, noise_samples, write_tar, write_tars

from feature_store.errors import InputError
from teacher_service.config import PlanConfig, TeacherSpec
from teacher_service.plan.sizes import plan
from teacher_service.plan.survey import outline_teacher


def _config(tars: tuple[str, ...], teacher: TinyTeacher, store: Path, **options) -> PlanConfig:
    return make_config(
        PlanConfig,
        tars=tars,
        teacher=teacher.name,
        model_kwargs=teacher.model_kwargs,
        store=store,
        **{"tap_codec": "f16", **options},
    )


def test_plan_counts_samples_rows_and_capacity_when_tars_differ_in_size(tmp_path: Path, tiny_swin: TinyTeacher) -> None:
    result = plan(_config(write_tars(tmp_path, 3, 7, 5), tiny_swin, tmp_path / "store", views=4))

    assert (result.units, result.samples, result.capacity, result.views, result.rows) == (3, 15, 7, 4, 60)
    assert result.taps == {"stage4": (4, 64, "f16")}
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(("codec", "prefix"), [("f32", "f32"), ("f32+zstd", "f32"), ("bf16", "f16"), ("int8", "f16")])
def test_plan_keeps_prefix_tokens_exact_when_taps_are(
    tmp_path: Path, tiny_vit: TinyTeacher, codec: str, prefix: str
) -> None:
    result = plan(_config(write_tars(tmp_path, 2), tiny_vit, tmp_path / "store", tap_codec=codec))
    assert result.taps["stage3_prefix"] == (1, 64, prefix)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"key_width": 7}, "--key-width is 7, expected at least the longest key's 8"), ({"capacity": 3}, "capacity is 3")],
)
def test_plan_refuses_room_that_the_tars_do_not_fit(
    tmp_path: Path, tiny_swin: TinyTeacher, options: dict[str, int], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        plan(_config(write_tars(tmp_path, 2, 4), tiny_swin, tmp_path / "store", **options))


def test_plan_counts_feature_bytes_by_hand_formula(tmp_path: Path, tiny_swin: TinyTeacher) -> None:
    result = plan(
        _config(write_tars(tmp_path, 3, 7), tiny_swin, tmp_path / "store", views=2, tap_codec="f32", logits_codec="f32")
    )

    row, index = 4 * 64 * 4 + 4, 7 * 16 + 4  # values and crc32c; shard index of a unit and view
    assert result.bytes["taps/stage4"] == 2 * (10 * row + 2 * index)
    assert result.bytes["logits"] == 2 * (10 * (4 * 4 + 4) + 2 * index)
    assert result.total_bytes == sum(result.bytes.values())


def test_plan_stores_prefix_tokens_when_the_teacher_has_any(tmp_path: Path, tiny_vit: TinyTeacher) -> None:
    result = plan(_config(write_tars(tmp_path, 2), tiny_vit, tmp_path / "store"))

    assert result.taps == {"stage4": (4, 64, "f16"), "stage3_prefix": (1, 64, "f16")}


def test_plan_grows_with_views_and_codec(tmp_path: Path, tiny_swin: TinyTeacher) -> None:
    tars = write_tars(tmp_path, 40)
    one, three = (plan(_config(tars, tiny_swin, tmp_path / "s", views=views)) for views in (1, 3))
    wide = plan(_config(tars, tiny_swin, tmp_path / "s", tap_codec="f32"))

    assert three.bytes["taps/stage4"] == 3 * one.bytes["taps/stage4"]
    assert three.bytes["teacher/blocks"] == one.bytes["teacher/blocks"]
    assert three.objects > one.objects
    assert wide.bytes["taps/stage4"] > 1.9 * one.bytes["taps/stage4"]


def test_outline_teacher_knows_a_large_model_without_its_weights() -> None:
    outline = outline_teacher(TeacherSpec(name="swin_large_patch4_window7_224"))

    assert outline.info.input_size == (224, 224)
    assert (outline.split.output_grid, outline.split.output_dim) == ((7, 7), 1536)
    assert 55e6 < sum(outline.block_bytes) / 4 < 65e6  # parameters of its last stage


def test_plan_does_not_fit_when_the_disk_is_small(
    tmp_path: Path, tiny_swin: TinyTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(write_tars(tmp_path, 2), tiny_swin, tmp_path / "not" / "yet" / "there")
    needed = plan(config).remaining_bytes
    usage = shutil.disk_usage(tmp_path)

    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    assert plan(config).fits
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    assert not plan(config).fits


def test_plan_names_key_and_both_tars_when_a_key_is_in_two(tmp_path: Path, tiny_swin: TinyTeacher) -> None:
    tars = tuple(write_tar(tmp_path / name, noise_samples("k", 2)) for name in ("a.tar", "b.tar"))

    with pytest.raises(InputError, match=r"'k000'.*a\.tar.*b\.tar"):
        plan(_config(tars, tiny_swin, tmp_path / "store"))
