"""The write rate is that at the end of what was written, and says for how many bytes."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from servers import s3_server
from test_timing import TIMING
from tiny_jobs import TinyTeacher, write_tars

from feature_store.errors import InputError, ResourceError
from teacher_service.cli import main
from teacher_service.config import ComputeSpec
from teacher_service.plan.report import written
from teacher_service.plan.write_rate import FILE_BYTES, WriteRate, measure_write_rate


class Disk:
    """A clock that goes on with every fsync: fast for so many files, then slow."""

    def __init__(self, fast_files: int, fast: float, slow: float) -> None:
        self.now, self.files = 0.0, 0
        self._fast_files, self._fast, self._slow = fast_files, fast, slow

    def __call__(self) -> float:
        return self.now

    def fsync(self, descriptor: int) -> None:
        self.now += self._fast if self.files < self._fast_files else self._slow
        self.files += 1


@pytest.fixture
def slowing(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk(fast_files=10, fast=0.1, slow=1.0)
    monkeypatch.setattr(os, "fsync", disk.fsync)
    return disk


def test_rate_is_that_at_the_end_when_the_disk_slows_down(tmp_path: Path, slowing: Disk) -> None:
    rate = measure_write_rate(tmp_path, 21, 10**9, file_bytes=1000, clock=slowing)

    assert (rate.bytes, rate.seconds) == (30_000, pytest.approx(21))
    assert rate.first == pytest.approx(10_000)
    assert rate.steady == pytest.approx(1000)
    assert list(tmp_path.iterdir()) == []


def test_no_more_is_written_than_the_job_writes(tmp_path: Path, slowing: Disk) -> None:
    assert measure_write_rate(tmp_path, 1000, 5500, file_bytes=1000, clock=slowing).bytes == 5000
    assert measure_write_rate(tmp_path, 1000, 10, file_bytes=1000, clock=slowing).bytes == 1000


def test_a_disk_without_room_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="has no room to measure its write rate"):
        measure_write_rate(tmp_path, 1, 10**18, file_bytes=10**17)


def test_timing_takes_the_steady_rate_when_it_is_lower() -> None:
    slow, fast = WriteRate(10**9, 10, 10**9, 10**7), WriteRate(10**9, 10, 10**9, 10**12)
    timing = replace(TIMING, written=500)

    assert timing.with_disk(slow, 1e6).busy["write"] == pytest.approx(0.1)
    assert timing.with_disk(slow, 1e6).seconds_per_image(8) == pytest.approx(0.1)
    assert timing.with_disk(fast, 1e6).busy["write"] == TIMING.busy["write"]
    assert timing.with_disk(slow, 1e6).written == 10**9 + 500


def test_report_says_for_how_many_bytes_writing_was_measured() -> None:
    timing = replace(TIMING, written=3_000_000)
    assert "write rate measured for 3.0 MB of 99.0 GB: disks slow down" in written(timing, 99 * 10**9)
    disk = WriteRate(10**9, 10, 5 * 10**8, 10**8)
    said = written(timing.with_disk(disk, 1.0), 99 * 10**9)
    assert "the disk took 500.0 MB/s at first, 100.0 MB/s at the end" in said
    assert "not measured beyond that" in said
    assert "beyond" not in written(timing.with_disk(disk, 1.0), 10**8)


def test_write_seconds_needs_timed_samples() -> None:
    with pytest.raises(InputError, match="--write-seconds is 5.0, expected --time-samples with it"):
        ComputeSpec(write_seconds=5)
    assert ComputeSpec(write_seconds=5, time_samples=10).write_seconds == 5


def test_plan_measures_the_disk_beside_the_store_when_it_is_asked_to(
    tmp_path: Path, tiny_swin: TinyTeacher, capsys: pytest.CaptureFixture[str]
) -> None:
    tars, store = write_tars(tmp_path, 6), str(tmp_path / "store")
    timed = ["--store", store, "--time-samples", "4", "--write-seconds", "0.01", "--workers", "0", "--batch-size", "2"]

    assert main(["plan", *tars, *tiny_swin.arguments, *timed, "--json"]) == 0

    timing = json.loads(capsys.readouterr().out)["timing"]
    assert timing["disk"]["bytes"] == FILE_BYTES
    assert timing["written"] > FILE_BYTES
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images-000.tar"]


def test_plan_refuses_to_measure_the_disk_of_a_bucket(
    tmp_path: Path, tiny_swin: TinyTeacher, capsys: pytest.CaptureFixture[str]
) -> None:
    timed = ["--time-samples", "4", "--write-seconds", "5", "--workers", "0", "--batch-size", "2"]
    with s3_server() as new_bucket:
        store = f"{new_bucket()}/store"
        assert main(["plan", *write_tars(tmp_path, 6), *tiny_swin.arguments, *timed, "--store", store]) == 2
    assert "--write-seconds is 5, expected 0 for a bucket" in capsys.readouterr().err
