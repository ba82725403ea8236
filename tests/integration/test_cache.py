"""The cache job from tars to a store: right numbers, the same bytes however it is run, plan's promise kept."""

import json
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_jobs import TinyTeacher, cache_config, noise_samples, store_files, write_tar, write_tars

from feature_store import RowId, open_store
from feature_store.errors import InputError, MismatchError
from feature_store.inputs import indexing
from feature_store.inputs.tar import Tar
from feature_store.inputs.tar_index import index_tar
from feature_store.teacher.model import load_teacher
from feature_store.views import apply_view, decode_image, draw_view, pixel_crc
from teacher_service.cache.job import cache
from teacher_service.cache.progress import Progress
from teacher_service.cli import main
from teacher_service.plan.sizes import plan


@pytest.fixture(params=["tiny_swin", "tiny_vit"])
def teacher(request: pytest.FixtureRequest) -> TinyTeacher:
    return request.getfixturevalue(request.param)


def test_cache_stores_what_the_teacher_says_of_each_view(tmp_path: Path, teacher: TinyTeacher) -> None:
    tars = write_tars(tmp_path, 5, 3)
    config = cache_config(tars, teacher, tmp_path / "store", views=2, policy="a2", seed=7, taps=("stage4", "stage3"))

    summary = cache(config)

    store, model = open_store(config.store), _load(teacher)
    assert (summary.units, summary.units_written, summary.images, summary.quarantined) == (2, 2, 16, 0)
    for unit, tar in enumerate(map(Tar.open, tars)):
        assert store.keys(unit) == list(tar.keys)
        assert store.labels(unit).tolist() == [tar.read(i).label for i in range(len(tar))]
        for view in range(2):
            params = [
                draw_view(store.manifest.policy, 7, tar.keys[i], view, decode_image(tar.read(i).image).size)
                for i in range(len(tar))
            ]
            pixels = [apply_view(decode_image(tar.read(i).image), params[i], (32, 32)) for i in range(len(tar))]
            output = model(torch.from_numpy(np.stack(pixels)))
            batch = store.source().read([RowId(unit, i, view) for i in range(len(tar))])
            assert store.view_params(unit, view) == params
            assert store.pixel_crcs(unit, view).tolist() == [pixel_crc(each) for each in pixels]
            assert batch.taps.keys() == {"stage4", "stage3", *(["stage3_prefix"] if model.split.prefix_tokens else [])}
            for name, values in batch.taps.items():
                np.testing.assert_allclose(values, output.taps[name], rtol=1e-3, atol=1e-4)
            assert output.logits is not None
            np.testing.assert_allclose(batch.logits, output.logits, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(store.later_blocks().state_dict(), model.later_blocks.state_dict(), rtol=0, atol=0)


def _load(teacher: TinyTeacher):
    return load_teacher(teacher.name, checkpoint=teacher.checkpoint, model_kwargs=teacher.model_kwargs)


def test_cache_indexes_each_tar_once_when_it_times_samples_too(
    tmp_path: Path, tiny_swin: TinyTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    tars, indexed = write_tars(tmp_path, 4, 3), []
    monkeypatch.setattr(indexing, "index_tar", lambda url, *more: (indexed.append(url), index_tar(url, *more))[1])

    summary = cache(cache_config(tars, tiny_swin, tmp_path / "store", time_samples=4))

    assert (summary.units_written, sorted(indexed)) == (2, sorted(tars))
    assert summary.predicted_seconds is not None


def test_cache_runs_as_its_page_shows_from_python(
    tmp_path: Path, tiny_swin: TinyTeacher, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = Path("docs/how-to/caching.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    write_tars(tmp_path, 3, 2)
    monkeypatch.chdir(tmp_path)
    teacher = f'"{tiny_swin.name}", model_kwargs={tiny_swin.model_kwargs}'
    code = code.replace('"swin_large_patch4_window7_224.ms_in22k_ft_in1k"', teacher).replace("workers=8", "workers=0")
    code = code.replace('store="store"', f'store="store", checkpoint=Path({str(tiny_swin.checkpoint)!r})')

    exec(code, {"Path": Path})

    assert capsys.readouterr().out == "2 units written\n"


@pytest.mark.parametrize("codec", ["f16", "f32"])
def test_plan_predicts_the_stores_bytes_within_three_percent(tmp_path: Path, teacher: TinyTeacher, codec: str) -> None:
    tars = write_tars(tmp_path, 60, 41)
    config = cache_config(
        tars,
        teacher,
        tmp_path / "store",
        views=3,
        policy="a1",
        tap_codec=codec,
        taps=("stage4", "stage3"),
        batch_size=96,
    )

    before = plan(config)
    cache(config)
    after = plan(config)

    written = sum(map(len, store_files(config.store).values()))
    assert before.total_bytes == pytest.approx(written, rel=0.03)
    assert before.remaining_bytes == before.total_bytes
    assert (after.committed_units, after.remaining_bytes) == (2, 0)
    files = [name for name in store_files(config.store) if name.startswith(("taps/", "logits/c"))]
    exact = sum((config.store / name).stat().st_size for name in files if "/c/" in name and ".crc32c" not in name)
    assert sum(size for kind, size in before.bytes.items() if kind.startswith(("taps", "logits"))) == exact


def test_cache_writes_the_same_bytes_when_workers_differ(tmp_path: Path, tiny_swin: TinyTeacher) -> None:
    tars = write_tars(tmp_path, 5, 6)
    tars = (
        *tars,
        write_tar(tmp_path / "bad.tar", [*noise_samples("c", 2), {"__key__": "x", "png": b"?", "cls": b"1"}]),
    )

    files = []
    for workers in (0, 1, 2):
        config = cache_config(tars, tiny_swin, tmp_path / f"store{workers}", views=2, policy="a2", workers=workers)
        assert cache(config).quarantined == 1
        files.append(store_files(config.store))

    assert files[0] == files[1] == files[2]


def test_cache_ends_with_the_same_bytes_when_restarted_with_any_units_done(
    tmp_path: Path, tiny_vit: TinyTeacher
) -> None:
    config = cache_config(write_tars(tmp_path, 3, 5, 4, 1), tiny_vit, tmp_path / "store", views=2)
    cache(config)
    whole = store_files(config.store)
    rng = random.Random(0)

    for _ in range(4):
        lost = rng.sample(range(4), rng.randint(1, 3))
        for unit in lost:
            (config.store / f"commits/u{unit:05}-v0-1.json").unlink()
            (config.store / f"taps/stage4/c/0/{unit}/0/0").write_bytes(b"half a shard")
            (config.store / f"label/c/{unit}.77.partial").write_bytes(b"orphan")
        summary = cache(config)
        assert (summary.units_written, summary.units_skipped) == (len(lost), 4 - len(lost))
        assert store_files(config.store) == whole


def test_cache_does_no_forward_pass_when_every_unit_is_committed(
    tmp_path: Path, tiny_swin: TinyTeacher, capsys: pytest.CaptureFixture[str]
) -> None:
    config = cache_config(write_tars(tmp_path, 2), tiny_swin, tmp_path / "store")
    cache(config)

    code = main(["cache", *config.inputs.tars, *tiny_swin.arguments, "--checkpoint", str(tiny_swin.checkpoint),
                 "--store", str(config.store), "--workers", "0", "--tap-codec", "f16", "--json"])  # fmt: skip

    summary = json.loads(capsys.readouterr().out)
    assert code == 0
    assert (summary["units_skipped"], summary["units_written"], summary["images"]) == (1, 0, 0)
    assert summary["teacher_seconds"] == 0


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_cache_finishes_the_unit_under_way_and_resumes_when_interrupted(
    tmp_path: Path,
    tiny_swin: TinyTeacher,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    exit_code: int,
) -> None:
    tars = write_tars(tmp_path, 4, 4, 4, 4, 4)
    cache(cache_config(tars, tiny_swin, tmp_path / "whole", batch_size=2))
    command = ["cache", *tars, *tiny_swin.arguments, "--checkpoint", str(tiny_swin.checkpoint),
               "--store", str(tmp_path / "store"), "--workers", "0", "--batch-size", "2",
               "--tap-codec", "f16"]  # fmt: skip

    with monkeypatch.context() as patched:
        patched.setattr(Progress, "computed", _signal_at(10, number))
        assert main(command) == exit_code
    captured = capsys.readouterr()
    assert f"{number.name}: finishing or abandoning the unit under way" in captured.err
    assert "stopped with 2 of 5 units left; the same command continues with them" in captured.err
    store = open_store(tmp_path / "store")
    assert store.committed.units == [0, 1, 2]
    assert len(store.source().read([RowId(2, i, 0) for i in range(4)]).rows) == 4

    assert main(command) == 0
    assert store_files(tmp_path / "store") == store_files(tmp_path / "whole")


def _signal_at(images: int, number: signal.Signals):
    """Send a signal half way through a unit, and give the thread that waits for it time to see it."""

    original = Progress.computed

    def computed(self, count, times) -> None:
        original(self, count, times)
        if count == images:
            signal.raise_signal(number)
            time.sleep(0.3)

    return computed


def test_cache_commits_a_unit_when_all_its_samples_are_quarantined(tmp_path: Path, tiny_swin: TinyTeacher) -> None:
    broken = [{"__key__": f"b{i}", "png": b"not an image", "cls": b"2"} for i in range(3)]
    tars = (*write_tars(tmp_path, 2), write_tar(tmp_path / "broken.tar", broken))
    config = cache_config(tars, tiny_swin, tmp_path / "store")

    summary = cache(config)

    store = open_store(config.store)
    assert (summary.units_written, summary.quarantined) == (2, 3)
    assert sorted(store.quarantined(1)) == [0, 1, 2]
    assert store.labels(1).tolist() == [2, 2, 2]
    assert store.view_params(1, 0) == [None, None, None]

    summary = cache(cache_config(tars, tiny_swin, tmp_path / "store", views=2))
    assert summary.quarantined == 3  # samples, not views


def test_cache_reports_units_on_stderr_and_a_summary_when_not_on_a_terminal(
    tmp_path: Path, tiny_swin: TinyTeacher, capsys: pytest.CaptureFixture[str]
) -> None:
    tars = write_tars(tmp_path, 3, 2)

    code = main(["cache", *tars, *tiny_swin.arguments, "--checkpoint", str(tiny_swin.checkpoint),
                 "--store", str(tmp_path / "deep" / "store"), "--views", "2", "--workers", "0"])  # fmt: skip

    captured = capsys.readouterr()
    assert code == 0
    assert [line.split(",")[0] for line in captured.err.splitlines() if line] == [
        "1/2 images-000.tar: 3 samples",
        "2/2 images-001.tar: 2 samples",
    ]
    assert "2 units written" in captured.out
    assert "10 images" in captured.out


def test_cache_view_policy_options_reach_the_manifest_when_given(tmp_path: Path, tiny_swin: TinyTeacher) -> None:
    config = cache_config(
        write_tars(tmp_path, 6), tiny_swin, tmp_path / "store", policy_options={"flip": 0, "scale": [0.5, 1.0]}
    )

    cache(config)

    store = open_store(config.store)
    assert (store.manifest.policy.flip, store.manifest.policy.scale) == (0, (0.5, 1.0))
    assert not any(params.flip for params in store.view_params(0, 0) if params)


def test_cache_uses_half_precision_when_told(tmp_path: Path, tiny_swin: TinyTeacher) -> None:
    tars = write_tars(tmp_path, 4)
    rows = [RowId(0, i, 0) for i in range(4)]
    taps = {}
    for dtype in ("float32", "bfloat16"):
        config = cache_config(tars, tiny_swin, tmp_path / dtype, compute_dtype=dtype)
        cache(config)
        store = open_store(config.store)
        assert store.manifest.teacher.compute_dtype == dtype
        taps[dtype] = store.source().read(rows).taps["stage4"].astype(np.float32)

    difference = np.abs(taps["float32"] - taps["bfloat16"]).max()
    assert 0 < difference < 0.2


def test_cache_grows_a_store_by_views_and_tars_to_what_one_run_writes(tmp_path: Path, tiny_swin: TinyTeacher) -> None:
    """Two views of one tar, then a third view and a second tar: the same features as all at once."""
    tars = write_tars(tmp_path, 5, 4)
    room = {"capacity": 6, "key_width": 20, "tap_codec": "f16"}
    grown, whole = tmp_path / "grown", tmp_path / "whole"
    cache(cache_config(tars[:1], tiny_swin, grown, views=2, **room))

    summary = cache(cache_config(tars, tiny_swin, grown, views=3, **room))
    cache(cache_config(tars, tiny_swin, whole, views=3, **room))

    assert summary.images == 5 * 1 + 4 * 3
    stores = [open_store(path) for path in (grown, whole)]
    rows = [row for unit, tar in enumerate(stores[1].manifest.tars) for row in _rows(unit, tar.samples, 3)]
    one, two = (store.source().read(rows) for store in stores)
    np.testing.assert_allclose(one.taps["stage4"], two.taps["stage4"], rtol=0, atol=2e-3)
    for unit in (0, 1):
        for view in range(3):
            assert stores[0].view_params(unit, view) == stores[1].view_params(unit, view)
            np.testing.assert_array_equal(stores[0].pixel_crcs(unit, view), stores[1].pixel_crcs(unit, view))


def _rows(unit: int, samples: int, views: int) -> list[RowId]:
    return [RowId(unit, position, view) for view in range(views) for position in range(samples)]


def test_cache_refuses_to_shrink_or_change_a_store(tmp_path: Path, tiny_swin: TinyTeacher) -> None:
    tars = write_tars(tmp_path, 3, 3)
    store = tmp_path / "store"
    cache(cache_config(tars, tiny_swin, store, views=2))
    with pytest.raises(MismatchError, match="num_views"):
        cache(cache_config(tars, tiny_swin, store, views=1))
    with pytest.raises(MismatchError, match="tars"):
        cache(cache_config(tars[:1], tiny_swin, store, views=2))


def test_cache_refuses_a_tar_whose_keys_do_not_fit_before_the_store_grows(
    tmp_path: Path, tiny_swin: TinyTeacher
) -> None:
    tars, room = write_tars(tmp_path, 3), {"capacity": 4, "key_width": 10}
    longer = write_tar(tmp_path / "longer.tar", noise_samples("a-longer-prefix-", 2))
    cache(cache_config(tars, tiny_swin, tmp_path / "store", **room))

    with pytest.raises(InputError, match="--key-width is 10, expected at least the longest key's 19"):
        cache(cache_config((*tars, longer), tiny_swin, tmp_path / "store", **room))

    assert len(open_store(tmp_path / "store").manifest.tars) == 1  # it can go on without that tar


@pytest.mark.parametrize("codec", ["f32", "f16", "bf16", "int8", "int8-channel", "int6", "int4", "int8+zstd"])
def test_cache_stores_features_within_the_codecs_stated_error(
    tmp_path: Path, tiny_swin: TinyTeacher, codec: str
) -> None:
    tars = write_tars(tmp_path, 6)
    exact, coded = tmp_path / "exact", tmp_path / "coded"
    cache(cache_config(tars, tiny_swin, exact, tap_codec="f32", logits_codec="f32"))
    cache(cache_config(tars, tiny_swin, coded, tap_codec=codec))
    values, stored = (open_store(path).source().read(_rows(0, 6, 1)).taps["stage4"] for path in (exact, coded))
    bound = open_store(coded).layout.codecs["stage4"].max_error(values)
    assert (np.abs(stored - values) <= bound + 1e-6).all()
