import io
import json
import socket
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from tiny_jobs import TinyTeacher, make_config, with_options, write_tars

from feature_store.errors import ResourceError
from feature_store.format.manifest import Manifest
from feature_store.inputs.tar import Tar
from feature_store.tools.terminal import Console
from teacher_service.cache.decode import Task
from teacher_service.cache.observers import append_event, observed
from teacher_service.cache.pipeline import UnitDone
from teacher_service.cache.stage_timer import StageTimes
from teacher_service.config import CacheConfig
from teacher_service.plan.survey import job_manifest, outline_teacher

TASKS = [Task(0, range(2)), Task(1, range(2))]
TIMES = StageTimes({"forward": 6.0, "decode": 9.0}, {"forward": 10.0, "decode": 10.0})


@pytest.fixture
def config(tmp_path: Path, tiny_swin: TinyTeacher) -> CacheConfig:
    """Two views of units of two and three samples."""
    return make_config(
        CacheConfig,
        tars=write_tars(tmp_path, 2, 3), teacher=tiny_swin.name, model_kwargs=tiny_swin.model_kwargs,
        store=tmp_path / "store", views=2, log_jsonl=tmp_path / "log.jsonl", metrics_port=0,
    )  # fmt: skip


@pytest.fixture
def manifest(config: CacheConfig) -> Manifest:
    outline = outline_teacher(config.teacher)
    return job_manifest(config, [Tar.open(tar) for tar in config.inputs.tars], outline)


def _events(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _scrape(output: io.StringIO) -> dict[str, float]:
    (url,) = [line.removeprefix("metrics: ") for line in output.getvalue().splitlines() if "metrics: " in line]
    assert url.startswith("http://127.0.0.1:")
    with urllib.request.urlopen(url, timeout=10) as answer:
        lines = [line for line in answer.read().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_observers_log_each_unit_and_answer_prometheus(config: CacheConfig, manifest: Manifest) -> None:
    output = io.StringIO()
    with observed(config.reporting, Console(file=output), manifest, TASKS) as observers:
        observers.computed(4, TIMES)
        observers.committed(UnitDone(TASKS[0], 4, {}, 1000, TIMES))
        observers.computed(10, TIMES)
        observers.committed(UnitDone(TASKS[1], 6, {2: "broken"}, 500, TIMES))
        metrics = _scrape(output)
    assert config.reporting.log_jsonl is not None

    start, first, second = _events(config.reporting.log_jsonl)
    assert (start["event"], start["units"], start["tasks"], start["images"]) == ("start", 2, 2, 10)
    assert (first["event"], first["unit"], first["tar"], first["views"]) == ("unit", 0, "images-000.tar", [0, 1])
    assert (second["images"], second["bytes"], second["quarantined"]) == (6, 500, {"2": "broken"})
    assert second["images_per_second"] > 0
    assert (second["stages"]["forward"], second["bottleneck"]) == (0.6, "decode")
    assert metrics["teacher_service_images"] == 10
    assert metrics["teacher_service_images_planned"] == 10
    assert metrics["teacher_service_tasks_committed_total"] == metrics["teacher_service_tasks_planned"] == 2
    assert metrics["teacher_service_bytes_written_total"] == 1500
    assert metrics["teacher_service_samples_quarantined_total"] == 1
    assert metrics['teacher_service_stage_busy_share{stage="forward"}'] == 0.6


def test_metrics_endpoint_is_closed_when_the_job_ends(config: CacheConfig, manifest: Manifest) -> None:
    output = io.StringIO()
    with observed(config.reporting, Console(file=output), manifest, TASKS):
        _scrape(output)

    with pytest.raises(OSError, match="refused"):
        _scrape(output)


def test_observed_says_what_to_do_when_the_port_is_taken(
    tmp_path: Path, config: CacheConfig, manifest: Manifest
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        taking = with_options(config, metrics_port=port)

        with pytest.raises(ResourceError, match=f"--metrics-port {port} .*choose another"):
            observed(taking.reporting, Console(quiet=True), manifest, TASKS).__enter__()


def test_append_event_says_what_to_do_when_the_log_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"--log-jsonl .*missing/log\.jsonl cannot be written"):
        append_event(tmp_path / "missing" / "log.jsonl", "start")
