import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny_jobs import TinyTeacher, write_tars

from feature_store.manifest import Manifest
from feature_store.tars.tar import Tar
from teacher_service.config import PlanConfig
from teacher_service.decoding import Task
from teacher_service.planning import job_manifest, outline_teacher
from teacher_service.progress import Progress


@pytest.fixture
def manifest(tmp_path: Path, tiny_swin: TinyTeacher) -> Manifest:
    """Two views of three units: 2, 3 and 4 samples."""
    tars = write_tars(tmp_path, 2, 3, 4)
    config = PlanConfig(tars=tars, teacher=tiny_swin.name, model_kwargs=tiny_swin.model_kwargs, views=2)
    outline = outline_teacher(config)
    return job_manifest(config, [Tar.open(tar) for tar in tars], outline.info, outline.split)


class _Unit:
    def __init__(self, count: int, **quarantined: str) -> None:
        self.keys, self.quarantined = [str(i) for i in range(count)], quarantined


def _run(manifest: Manifest, console: Console) -> None:
    units: dict[Task, Any] = {Task(1, range(2)): _Unit(3), Task(2, range(2)): _Unit(4, a="broken")}
    with Progress(console, manifest, list(units)) as progress:
        for images, (task, data) in zip((6, 14), units.items(), strict=True):
            progress.computed(images)
            progress.committed(task, data)


def test_progress_prints_a_line_per_unit_when_not_on_a_terminal(manifest: Manifest) -> None:
    output = io.StringIO()

    _run(manifest, Console(file=output, force_terminal=False))

    first, last = output.getvalue().splitlines()
    assert first.startswith("2/3 images-001.tar: 3 samples, ")
    assert last.startswith("3/3 images-002.tar: 4 samples, 1 quarantined, ")
    assert last.endswith("0:00:00 left")


def test_progress_draws_a_bar_when_on_a_terminal(manifest: Manifest) -> None:
    output = io.StringIO()

    _run(manifest, Console(file=output, force_terminal=True, width=120))

    assert "unit 3/3, 1 quarantined" in output.getvalue()
    assert "14/14" in output.getvalue()
    assert "images-001.tar" not in output.getvalue()


def test_progress_says_nothing_when_quiet(manifest: Manifest, capsys: pytest.CaptureFixture[str]) -> None:
    _run(manifest, Console(quiet=True))

    assert capsys.readouterr() == ("", "")
