"""Quarantined samples that can be used by now are taken in; everything else stays as it was."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from servers import s3_server
from tiny_jobs import TinyTeacher, cache_config, noise_samples, store_files, write_tar

from feature_store import open_store
from feature_store.backends.open import open_objects
from feature_store.errors import MismatchError, QuarantinedError, Remedy
from feature_store.tools.cli import main as store_main
from feature_store.tools.verify import verify
from teacher_service.cache.encode import UnitEncoder
from teacher_service.cache.job import CacheSummary, cache
from teacher_service.config import CacheConfig


@pytest.fixture
def good(tmp_path: Path) -> tuple[str, ...]:
    folder = tmp_path / "good"
    folder.mkdir()
    return tuple(write_tar(folder / f"{name}.tar", noise_samples(name, 4, seed)) for seed, name in enumerate("abc"))


@pytest.fixture
def tars(tmp_path: Path, good: tuple[str, ...]) -> tuple[str, ...]:
    """The same tars, with a damaged image in the first and the second."""
    copies = tuple(shutil.copy(tar, tmp_path) for tar in good)
    for copy in copies[:2]:
        _damage(copy)
    return copies


def _damage(tar: str) -> None:
    """Change a byte of the second image, under the same headers."""
    content = bytearray(Path(tar).read_bytes())
    at = content.index(b"IDAT", content.index(b"IDAT") + 1) + 40
    content[at] ^= 255
    Path(tar).write_bytes(content)


def _retry(config: CacheConfig) -> CacheSummary:
    return cache(replace(config, retry_quarantined=True))


def test_retry_writes_what_a_run_over_mended_tars_writes(
    tmp_path: Path,
    good: tuple[str, ...],
    tars: tuple[str, ...],
    tiny_swin: TinyTeacher,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = cache_config(good, tiny_swin, tmp_path / "whole", views=2)
    cache(whole)
    config = cache_config(tars, tiny_swin, tmp_path / "store", views=2)
    assert cache(config).quarantined == 2
    assert store_main(["info", str(config.store), "--json"]) == 0
    assert [entry["key"] for entry in json.loads(capsys.readouterr().out)["quarantined"]] == ["a001", "b001"]
    row = open_store(config.store).rows(["a001"], view=1)
    with pytest.raises(QuarantinedError) as caught:
        open_store(config.store).source().read(row)
    assert caught.value.remedy is Remedy.RETRY_QUARANTINED
    before = (Path(config.store) / "commits/u00002-v0-1.json").stat().st_mtime_ns

    shutil.copy(good[0], tars[0])  # one is mended
    summary = _retry(config)
    assert (summary.units_written, summary.units_skipped, summary.quarantined) == (1, 2, 1)
    assert len(open_store(config.store).source().read(row).rows) == 1
    shutil.copy(good[1], tars[1])
    summary = _retry(config)
    assert (summary.units_written, summary.quarantined) == (1, 0)

    assert store_files(Path(config.store)) == store_files(Path(whole.store))
    assert (Path(config.store) / "commits/u00002-v0-1.json").stat().st_mtime_ns == before  # never touched


def test_retry_changes_nothing_when_the_samples_are_still_broken(
    tmp_path: Path, tars: tuple[str, ...], tiny_swin: TinyTeacher
) -> None:
    config = cache_config(tars, tiny_swin, tmp_path / "store")
    cache(config)
    before = store_files(Path(config.store))

    summary = _retry(config)

    assert (summary.units_written, summary.quarantined) == (0, 2)
    assert store_files(Path(config.store)) == before


def test_retry_writes_all_views_anew_when_they_were_committed_apart(
    tmp_path: Path, good: tuple[str, ...], tars: tuple[str, ...], tiny_swin: TinyTeacher
) -> None:
    cache(cache_config(tars, tiny_swin, tmp_path / "store", views=1))
    config = cache_config(tars, tiny_swin, tmp_path / "store", views=3)
    cache(config)
    shutil.copy(good[0], tars[0])

    summary = _retry(config)

    assert summary.units_written == 1
    store = open_store(tmp_path / "store")
    assert [record.path for record in store.committed.records if record.unit == 0] == ["commits/u00000-v0-2.json"]
    assert not verify(tmp_path / "store").findings


def test_a_killed_retry_is_finished_by_the_plain_command(
    tmp_path: Path,
    good: tuple[str, ...],
    tars: tuple[str, ...],
    tiny_swin: TinyTeacher,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = cache_config(tars, tiny_swin, tmp_path / "store")
    cache(config)
    for source, copy in zip(good, tars, strict=True):
        shutil.copy(source, copy)

    with monkeypatch.context() as patched:
        patched.setattr(UnitEncoder, "unit", _die)
        with pytest.raises(KeyboardInterrupt):
            _retry(config)
    assert open_store(config.store).committed.units == [2]
    summary = cache(config)

    assert (summary.units_written, summary.quarantined) == (2, 0)
    assert not verify(config.store).findings


def _die(self: UnitEncoder) -> None:
    raise KeyboardInterrupt


def test_withdraw_leaves_readers_of_other_units_alone_when_killed_after_the_records(
    tmp_path: Path, tars: tuple[str, ...], tiny_swin: TinyTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = cache_config(tars, tiny_swin, tmp_path / "store")
    cache(config)
    store = open_store(config.store)
    delete = type(store.objects).delete

    def killed(self, path: str) -> None:
        if path.startswith("taps/"):
            raise KeyboardInterrupt
        delete(self, path)

    with monkeypatch.context() as patched:
        patched.setattr(type(store.objects), "delete", killed)
        with pytest.raises(KeyboardInterrupt):
            store.withdraw_unit(0)
    reopened = open_store(config.store)
    assert reopened.committed.units == [1, 2]
    assert {finding.kind for finding in verify(config.store).findings} == {"orphan"}
    assert cache(config).units_written == 1


def test_retry_refuses_tars_whose_sizes_changed(tmp_path: Path, tars: tuple[str, ...], tiny_swin: TinyTeacher) -> None:
    config = cache_config(tars, tiny_swin, tmp_path / "store")
    cache(config)
    write_tar(Path(tars[0]), [sample | {"cls": b"12"} for sample in noise_samples("a", 4)])

    with pytest.raises(MismatchError, match=r"tars\[0\].header_sha256 differs"):
        _retry(config)


def test_retry_works_in_a_bucket(
    tmp_path: Path, good: tuple[str, ...], tars: tuple[str, ...], tiny_swin: TinyTeacher
) -> None:
    with s3_server() as make_bucket:
        config = cache_config(tars, tiny_swin, f"{make_bucket()}/store")
        cache(config)
        shutil.copy(good[0], tars[0])

        summary = _retry(config)

        assert (summary.units_written, summary.quarantined) == (1, 1)
        assert not verify(config.store).findings
        assert open_objects(config.store).size("commits/u00000-v0-0.json") > 0
