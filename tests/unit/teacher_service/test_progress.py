import io
from pathlib import Path

import pytest
from tiny_jobs import TinyTeacher, make_config, write_tars

from feature_store.format.manifest import Manifest
from feature_store.inputs.tar import Tar
from feature_store.tools.terminal import Console
from teacher_service.cache.decode import Task
from teacher_service.cache.pipeline import UnitDone
from teacher_service.cache.progress import Progress
from teacher_service.cache.stage_timer import StageTimes
from teacher_service.config import PlanConfig
from teacher_service.plan.survey import job_manifest, outline_teacher


@pytest.fixture
def manifest(tmp_path: Path, tiny_swin: TinyTeacher) -> Manifest:
    """Two views of three units: 2, 3 and 4 samples."""
    tars = write_tars(tmp_path, 2, 3, 4)
    config = make_config(PlanConfig, tars=tars, teacher=tiny_swin.name, model_kwargs=tiny_swin.model_kwargs, views=2)
    outline = outline_teacher(config.teacher)
    return job_manifest(config, [Tar.open(tar) for tar in tars], outline)


TIMES = StageTimes({"forward": 3.0, "decode": 9.0}, {"forward": 10.0, "decode": 10.0})


def _done(unit: int, images: int, **quarantined: str) -> UnitDone:
    return UnitDone(Task(unit, range(2)), images, {int(key[1:]): why for key, why in quarantined.items()}, 100, TIMES)


def _run(manifest: Manifest, console: Console) -> None:
    units = [_done(1, 6), _done(2, 8, p0="broken")]
    with Progress(console, manifest, [done.task for done in units]) as progress:
        for images, done in zip((6, 14), units, strict=True):
            progress.computed(images, TIMES)
            progress.committed(done)


def test_progress_prints_a_line_per_unit_when_not_on_a_terminal(manifest: Manifest) -> None:
    output = io.StringIO()

    _run(manifest, Console(file=output, force_terminal=False))

    first, last = output.getvalue().rstrip().splitlines()
    assert first.startswith("2/3 images-001.tar: 3 samples, ")
    assert last.startswith("3/3 images-002.tar: 4 samples, 1 quarantined, ")
    assert last.endswith("0:00:00 left, teacher waited 70% of the time, bottleneck: decode")


def test_progress_draws_a_bar_when_on_a_terminal(manifest: Manifest) -> None:
    output = io.StringIO()

    _run(manifest, Console(file=output, force_terminal=True, width=180))

    assert "unit 3/3, 1 quarantined" in output.getvalue()
    assert "14/14" in output.getvalue()
    assert "bottleneck: decode" in output.getvalue()
    assert "images-001.tar" not in output.getvalue()


def test_progress_says_nothing_when_quiet(manifest: Manifest, capsys: pytest.CaptureFixture[str]) -> None:
    _run(manifest, Console(quiet=True))

    assert capsys.readouterr() == ("", "")
