"""Verifying a store against its teacher finds what no checksum can, and nothing in a sound store."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_jobs import TinyTeacher, cache_config, noise_samples, write_tar, write_tars

from feature_store import open_store
from feature_store.errors import InputError, MismatchError
from feature_store.format.addressing import RowId
from feature_store.read.blocks import read_blocks
from feature_store.store import Store
from feature_store.teacher.model import Teacher, TeacherOutput
from feature_store.tools.verify import verify as verify_checksums
from feature_store.write.unit import EncodedUnit
from teacher_service.cache.job import cache
from teacher_service.cli import main
from teacher_service.config import StoredInputs
from teacher_service.verify.config import VerifyConfig
from teacher_service.verify.recompute import sampled_rows, verify

SAMPLES, VIEWS = (6, 5), 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("verified")


@pytest.fixture(scope="module")
def tars(folder: Path) -> tuple[str, ...]:
    return write_tars(folder, *SAMPLES)


@pytest.fixture(scope="module")
def store(folder: Path, tars: tuple[str, ...], tiny_swin: TinyTeacher) -> Store:
    cache(cache_config(tars, tiny_swin, folder / "store", views=VIEWS, policy="a2", taps=("stage4", "stage3")))
    return open_store(folder / "store")


def _config(tars: tuple[str, ...], teacher: TinyTeacher, store: Path | str, **options) -> VerifyConfig:
    defaults = {"sample": sum(SAMPLES) * VIEWS, "batch_size": 4, "workers": 1}
    return VerifyConfig(
        inputs=StoredInputs(tars=tars), store=str(store), checkpoint=teacher.checkpoint, **defaults | options
    )


def _contents(store: Store, unit: int) -> EncodedUnit:
    """What a unit holds, as it was given to the store."""
    views, samples = range(VIEWS), store.manifest.tars[unit].samples
    rows = [[RowId(unit, i, view) for i in range(samples)] for view in views]
    batches = [store.source().read(some, decode=False) for some in rows]
    stored = {
        name: {part: np.stack([batch.encoded[name][part] for batch in batches]) for part in parts}
        for name, parts in batches[0].encoded.items()
    }
    stored["logits"] = {"": np.stack([batch.logits for batch in batches])}
    return EncodedUnit(
        keys=store.keys(unit),
        labels=store.labels(unit),
        quarantined=store.quarantined(unit),
        params=[store.view_params(unit, view) for view in views],
        pixel_crc=np.stack([store.pixel_crcs(unit, view) for view in views]),
        features=stored,
    )


def _rewritten(store: Store, path: Path, change: Callable[[EncodedUnit], EncodedUnit]) -> Path:
    """A store with the same manifest whose first unit was changed before it was written."""
    copy = Store.create(path, store.manifest, read_blocks(store.objects))
    for unit in store.committed.units:
        copy.write_unit(unit, 0, change(_contents(store, unit)) if unit == 0 else _contents(store, unit))
    return path


def test_cache_and_verify_halve_every_batch_when_memory_runs_out(
    tmp_path: Path, tars: tuple[str, ...], tiny_swin: TinyTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those the codec learns its statistics from."""
    forward = Teacher.forward

    def forward_two(self: Teacher, pixels_BHWC: torch.Tensor, taps: Sequence[str]) -> TeacherOutput:
        if len(pixels_BHWC) > 2:
            raise torch.OutOfMemoryError("no room")
        return forward(self, pixels_BHWC, taps)

    monkeypatch.setattr(Teacher, "forward", forward_two)

    assert cache(cache_config(tars, tiny_swin, tmp_path / "store", tap_codec="int8")).batch_size == 2
    assert verify(_config(tars, tiny_swin, tmp_path / "store")).sound


@pytest.mark.parametrize("tap_codec", ["f32", "f16", "bf16", "int8", "int8-channel", "int6", "int4", "int8+zstd"])
def test_verify_finds_nothing_when_store_is_sound(
    tmp_path: Path, tars: tuple[str, ...], tiny_vit: TinyTeacher, tap_codec: str
) -> None:
    logits = {"f32": "f32", "int4": "top2"}.get(tap_codec, "f16")
    config = cache_config(tars, tiny_vit, tmp_path / "store", views=VIEWS, tap_codec=tap_codec, logits_codec=logits)
    cache(config)

    report = verify(_config(tars, tiny_vit, tmp_path / "store", batch_size=3))

    assert report.sound
    assert report.rows == sum(SAMPLES) * VIEWS
    assert report.worst.keys() == {"taps/stage4", "taps/stage3_prefix", "logits"}
    assert max(report.worst.values()) < 0.75


@pytest.mark.parametrize("compute_dtype", ["bfloat16", "float16"])
def test_verify_finds_nothing_when_teacher_computes_in_low_precision(
    tmp_path: Path, tars: tuple[str, ...], tiny_swin: TinyTeacher, compute_dtype: str
) -> None:
    cache(cache_config(tars, tiny_swin, tmp_path / "store", compute_dtype=compute_dtype))

    report = verify(_config(tars, tiny_swin, tmp_path / "store", batch_size=1))

    assert report.sound


def test_verify_finds_swapped_rows_when_their_checksums_were_swapped_too(
    tmp_path: Path, store: Store, tars: tuple[str, ...], tiny_swin: TinyTeacher
) -> None:
    def swap(data: EncodedUnit) -> EncodedUnit:
        order = [0, 3, 2, 1, 4, 5]  # rows 1 and 3
        moved = {part: values[:, order] for part, values in data.features["stage4"].items()}
        return replace(data, features={**data.features, "stage4": moved})

    path = _rewritten(store, tmp_path / "swapped", swap)
    assert not verify_checksums(path).findings

    report = verify(_config(tars, tiny_swin, path))

    assert not report.sound
    found = {(mismatch.unit, mismatch.position, mismatch.view, mismatch.what) for mismatch in report.mismatches}
    assert found == {(0, position, view, "taps/stage4") for position in (1, 3) for view in range(VIEWS)}
    assert {mismatch.key for mismatch in report.mismatches} == {"u000-001", "u000-003"}
    assert report.worst["taps/stage4"] > 1 > report.worst["taps/stage3"]


def _with_logits(data: EncodedUnit, change: Callable[[np.ndarray], np.ndarray]) -> EncodedUnit:
    return replace(data, features={**data.features, "logits": {"": change(data.features["logits"][""])}})


def test_verify_command_lists_rows_and_exits_1_when_they_differ(
    tmp_path: Path, store: Store, tars: tuple[str, ...], tiny_swin: TinyTeacher, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _rewritten(store, tmp_path / "scaled", lambda data: _with_logits(data, lambda x: x * np.float16(1.25)))
    argv = ["verify", *tars, "--checkpoint", str(tiny_swin.checkpoint), "--workers", "1", "--sample", "100"]

    assert main([*argv, "--store", str(store.path), "--teacher", tiny_swin.name]) == 0
    assert "22 rows recomputed" in capsys.readouterr().out
    assert main([*argv, "--store", str(path)]) == 1
    captured = capsys.readouterr()
    assert captured.out.count(": logits: relative distance") == 12  # all rows of unit 0
    assert captured.err.splitlines()[-1].startswith("teacher-service: error: 12 of 22 rows in ")
    assert main([*argv, "--store", str(path), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["rows"], len(report["mismatches"]), report["checksums"]["findings"]) == (22, 12, [])


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("logits", lambda data: _with_logits(data, lambda x: x + np.float16(0.05) * (np.arange(6) == 2)[:, None])),
        ("label", lambda data: replace(data, labels=np.where(np.arange(6) == 2, 7, data.labels))),
        ("key", lambda data: replace(data, keys=[*data.keys[:2], "another", *data.keys[3:]])),
        ("pixels", lambda data: replace(data, pixel_crc=data.pixel_crc ^ np.uint32(np.arange(6) == 2))),
        (
            "pixels",
            lambda data: replace(
                data,
                params=[[*view[:2], replace(view[2], flip=not view[2].flip), *view[3:]] for view in data.params],
            ),
        ),
    ],
    ids=["logits", "label", "key", "crc", "params"],
)
def test_verify_names_what_differs_when_one_sample_was_written_wrong(
    tmp_path: Path, store: Store, tars: tuple[str, ...], tiny_swin: TinyTeacher, what: str, change
) -> None:
    path = _rewritten(store, tmp_path / "wrong", change)
    assert not verify_checksums(path).findings

    report = verify(_config(tars, tiny_swin, path))

    assert {(mismatch.unit, mismatch.position, mismatch.what) for mismatch in report.mismatches} == {(0, 2, what)}


def test_verify_stops_at_checksums_when_bytes_are_damaged(
    tmp_path: Path, store: Store, tars: tuple[str, ...], tiny_swin: TinyTeacher
) -> None:
    path = Path(shutil.copytree(store.path, tmp_path / "damaged"))
    shard = path / "taps/stage4/c/0/1/0/0"
    content = bytearray(shard.read_bytes())
    content[20] ^= 1
    shard.write_bytes(content)

    report = verify(_config(tars, tiny_swin, path))

    assert [finding.kind for finding in report.checksums.findings] == ["damaged"]
    assert (report.sound, report.rows) == (False, 0)


def test_verify_refuses_when_weights_are_not_the_stores(
    store: Store, tars: tuple[str, ...], other_swin: TinyTeacher
) -> None:
    with pytest.raises(
        MismatchError, match=r"^teacher\.weights_sha256 differs: .*the teacher's weights differ; give the"
    ):
        verify(_config(tars, other_swin, store.path))


def test_verify_refuses_when_another_teacher_is_named(
    store: Store, tars: tuple[str, ...], tiny_swin: TinyTeacher
) -> None:
    with pytest.raises(MismatchError, match=r"^teacher\.name differs: store has 'swin_tiny.*got 'test_vit'"):
        verify(replace(_config(tars, tiny_swin, store.path), teacher="test_vit"))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda tars, other: tars[:1], "tars"),
        (lambda tars, other: (tars[0], other), r"tars\[images-001.tar\].header_sha256"),
    ],
    ids=["fewer", "changed"],
)
def test_verify_refuses_when_tars_are_not_the_stores(
    tmp_path: Path, store: Store, tars: tuple[str, ...], tiny_swin: TinyTeacher, change, field: str
) -> None:
    samples = noise_samples("u001-", SAMPLES[1], 1)
    samples[2]["cls"] = b"12"
    other = write_tar(tmp_path / Path(tars[1]).name, samples)

    with pytest.raises(MismatchError, match=f"^{field} differs"):
        verify(_config(change(tars, other), tiny_swin, store.path))


def test_verify_names_the_sample_when_the_image_changed_under_the_same_headers(
    tmp_path: Path, store: Store, tars: tuple[str, ...], tiny_swin: TinyTeacher
) -> None:
    changed = Path(shutil.copy(tars[1], tmp_path))
    content = bytearray(changed.read_bytes())
    png = content.index(b"IDAT")
    content[png + 40] ^= 255
    changed.write_bytes(content)

    report = verify(_config((tars[0], str(changed)), tiny_swin, store.path))

    assert {(mismatch.key, mismatch.what) for mismatch in report.mismatches} == {("u001-000", "image")}


def test_verify_refuses_when_path_is_no_store(tmp_path: Path, tars: tuple[str, ...], tiny_swin: TinyTeacher) -> None:
    with pytest.raises(InputError, match="is not a store"):
        verify(_config(tars, tiny_swin, tmp_path))


def test_sampled_rows_leave_out_quarantined_ones_and_take_every_other_equally_often(
    tmp_path: Path, tiny_swin: TinyTeacher
) -> None:
    samples = noise_samples("q", 5)
    samples[1]["png"] = b"no image"
    tars = (write_tar(tmp_path / "q.tar", samples), write_tar(tmp_path / "r.tar", noise_samples("r", 2)))
    cache(cache_config(tars, tiny_swin, tmp_path / "store", views=2))
    store = open_store(tmp_path / "store")
    everything = [RowId(0, i, v) for v in range(2) for i in (0, 2, 3, 4)] + [
        RowId(1, i, v) for v in range(2) for i in range(2)
    ]

    assert sampled_rows(store, 100, np.random.default_rng(0)) == everything
    rng = np.random.default_rng(0)
    drawn = [row for _ in range(300) for row in sampled_rows(store, 3, rng)]
    counts = [drawn.count(row) for row in everything]
    assert sum(counts) == 900
    assert 45 < min(counts) <= max(counts) < 110


def test_verify_computes_other_rows_when_the_seed_is_another(
    store: Store, tars: tuple[str, ...], tiny_swin: TinyTeacher
) -> None:
    first, second = (verify(_config(tars, tiny_swin, store.path, sample=1, seed=seed)) for seed in (0, 1))

    assert (first.rows, second.rows) == (1, 1)
    assert first.sound
    assert second.sound
    assert first.worst != second.worst  # other rows


def test_verify_finds_the_tars_by_content_when_order_and_names_are_others(
    tmp_path: Path, store: Store, tars: tuple[str, ...], tiny_swin: TinyTeacher
) -> None:
    renamed = shutil.copy(tars[0], tmp_path / "renamed.tar")

    assert verify(_config((tars[1], str(renamed)), tiny_swin, store.path)).sound
