"""A run's folder: what a new run, a resumed one and a finished one leave in it."""

import json
import os
import re
import shutil
import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from feature_store.errors import InputError, MismatchError, ResourceError
from student_trainer.config import TrainConfig, config_to_dict
from student_trainer.engine.checkpoint import Checkpoint, Progress, rng_state
from student_trainer.engine.metrics import MetricsLog, read_metrics
from student_trainer.engine.run_folder import RunFolder, read_description, reserved
from student_trainer.teachers.config import StoreTeacher

INPUTS = {"samples": "5f", "val_tars": {"v.tar": "1a"}}
PLAN = {"processes": 1, "device": "cpu"}


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    (tmp_path / "run").mkdir()
    return TrainConfig(
        run=tmp_path / "run", student="test_resnet", tars=("a.tar",), val_tars=("v.tar",), epochs=3,
        teacher=StoreTeacher("s"),
    )  # fmt: skip


def checkpoint(**progress) -> Checkpoint:
    return Checkpoint({"name": "test_resnet"}, {}, {}, {}, Progress(**progress), [rng_state()])


def opened(config: TrainConfig, inputs=INPUTS, plan=PLAN) -> tuple[RunFolder, list[str]]:
    return RunFolder.open(config, inputs, plan)


def resumed(config: TrainConfig, **changes) -> TrainConfig:
    return replace(config, resume=True, **changes)


def test_new_run_describes_itself(config):
    folder, notes = opened(config)
    described = read_description(folder.description)
    assert described["config"] == config_to_dict(config)
    assert (described["inputs"], described["plan"], notes) == (INPUTS, PLAN, [])
    assert described["software"].keys() >= {"torch", "timm", "git"}
    head = Path(__file__).parents[3] / ".git"
    assert (described["software"]["git"] is not None) == (head.exists() and shutil.which("git") is not None)
    assert [path.name for path in config.run.iterdir()] == ["config.json"]
    assert folder.saved() is None
    assert folder.finished_epochs() is None


@pytest.mark.parametrize("resume", [False, True])
def test_run_begins_where_a_killed_one_left_its_lock_and_partial_files(config, resume):
    for name in (".lock", ".writer", "config.json.partial", "last.pt.1.partial"):
        (config.run / name).write_text("")
    opened(replace(config, resume=resume))
    assert {path.name for path in config.run.iterdir()} == {".lock", ".writer", "config.json"}


@pytest.mark.parametrize(
    ("resume", "step"),
    [(False, "add --resume to continue it, or choose another folder"),
     (True, "it holds no run to continue; choose another folder")],
)  # fmt: skip
def test_folder_of_something_else_is_refused(config, resume, step):
    (config.run / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=rf"^--run {re.escape(str(config.run))} already exists; {step}$"):
        opened(replace(config, resume=resume))
    assert [path.name for path in config.run.iterdir()] == ["notes.txt"]


def test_run_is_not_begun_twice(config):
    opened(config)
    with pytest.raises(InputError, match="add --resume"):
        opened(config)


def test_resumed_run_keeps_its_description_and_says_what_differs(config):
    folder, _ = opened(config)
    before = folder.description.read_bytes()
    (config.run / "last.pt.1.partial").write_text("")
    again, notes = opened(resumed(config, epochs=4), plan={**PLAN, "processes": 2})
    assert folder.description.read_bytes() == before
    assert again.path == config.run
    assert [note.split(" before, ")[0] for note in notes] == ["processes 1", "epochs 3"]
    assert not list(config.run.glob("*.partial"))


def test_resumed_run_is_refused_with_other_samples(config):
    opened(config)
    with pytest.raises(MismatchError, match=r"inputs.samples differs: the run has '5f', got '60'"):
        opened(resumed(config), {**INPUTS, "samples": "60"})


def test_metrics_and_progress_are_cut_back_to_the_checkpoint(config):
    folder, _ = opened(config)
    with MetricsLog(folder.metrics) as log:
        log.write("start", 0)
        for step in (1, 2, 3):
            log.write("step", step, epoch=0)
        log.write("epoch", 3, epoch=0)
        log.write("step", 4, epoch=1)
    folder.save(checkpoint(epoch=0, batch=2, step=2, best_top1=50.0, means={"count": 2}))
    folder.finish(Progress(epoch=3, step=9))
    assert folder.finished_epochs() == 3

    folder.rewind(folder.saved())
    assert [(line["kind"], line["step"]) for line in read_metrics(folder.metrics)] == [
        ("start", 0), ("step", 1), ("step", 2),
    ]  # fmt: skip
    assert json.loads(folder.progress.read_text()) == {
        "epoch": 0, "batch": 2, "step": 2, "best_top1": 50.0, "teacher_seconds": 0.0, "finished": False,
    }  # fmt: skip
    assert folder.finished_epochs() is None

    folder.rewind(None)
    assert read_metrics(folder.metrics) == []
    assert folder.finished_epochs() is None


def test_what_a_run_resumes_from_is_on_the_disk_when_it_is_said_to_be(config, monkeypatch):
    folder, synced, fsync = RunFolder(config.run), [], os.fsync

    def noted(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name.split(".")[0])
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    opened(config)
    folder.save(checkpoint(epoch=1, step=3))
    folder.finish(Progress(epoch=3, step=9))
    files = [name for name in synced if name != "run"]
    assert files == ["config", "last", "progress", "progress"]


def test_damaged_progress_is_named(config):
    folder, _ = opened(config)
    for text in ("{", "[]", "{}"):
        folder.progress.write_text(text)
        with pytest.raises(InputError, match=r"progress.json is damaged: .*; remove it and resume the run"):
            folder.finished_epochs()


@pytest.mark.parametrize(("free", "fits"), [(3_000_000, True), (2_999_999, False), (2_000_000, False)])
def test_run_is_refused_on_a_disk_without_room_for_its_checkpoint(config, monkeypatch, free, fits):
    folder, asked = RunFolder(config.run), []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or SimpleNamespace(free=free))
    if fits:
        folder.require_room(3_000_000)
    else:
        told = rf"takes about 3.0 MB, but the disk of --run {re.escape(str(config.run))} has [23].0 MB free"
        with pytest.raises(ResourceError, match=told):
            folder.require_room(3_000_000)
    assert asked == [config.run]


def best_so_far(folder: RunFolder) -> float | None:
    saved = folder.saved()
    assert saved is not None
    return saved.progress.best_top1


def validated(config: TrainConfig, epoch: int) -> RunFolder:
    """A run that has validated once and is in this epoch."""
    folder, _ = opened(config)
    with MetricsLog(folder.metrics) as log:
        log.write("epoch", 3, epoch=0, val={"top1": 50.0})
    folder.save(checkpoint(epoch=epoch, step=3 * epoch, best_top1=50.0))
    return folder


def test_best_is_chosen_anew_on_other_validation_tars(config):
    folder = validated(config, epoch=1)
    other = {**INPUTS, "val_tars": {"w.tar": "2b"}}
    opened(resumed(config, val_tars=("w.tar",)), other)
    assert best_so_far(folder) is None
    assert read_metrics(folder.metrics) == [{"kind": "epoch", "step": 3, "epoch": 0, "earlier_val": {"top1": 50.0}}]
    described = read_description(folder.description)
    assert (described["config"]["val_tars"], described["inputs"]) == (["w.tar"], other)
    assert described["config"] == {**config_to_dict(config), "val_tars": ["w.tar"]}
    assert described["plan"] == PLAN


def test_best_stays_when_validation_is_the_same(config):
    folder = validated(config, epoch=1)
    before = folder.metrics.read_bytes()
    folder.best.write_bytes(b"best")
    opened(resumed(config))
    assert best_so_far(folder) == 50.0
    assert folder.metrics.read_bytes() == before
    assert folder.best.read_bytes() == b"best"


@pytest.mark.parametrize("tars", [{}, {"w.tar": "2b"}])
def test_best_is_set_aside_when_validation_is_another_or_left_out(config, tars):
    folder = validated(config, epoch=1)
    folder.best.write_bytes(b"best")
    _, notes = opened(resumed(config, val_tars=tuple(tars)), {**INPUTS, "val_tars": tars})
    assert notes[-1].endswith("best.safetensors so far is kept as earlier-best.safetensors")
    assert (folder.best.exists(), folder.earlier_best.read_bytes()) == (False, b"best")
    assert best_so_far(folder) is None
    assert read_metrics(folder.metrics) == [{"kind": "epoch", "step": 3, "epoch": 0, "earlier_val": {"top1": 50.0}}]
    assert read_description(folder.description)["inputs"] == {**INPUTS, "val_tars": tars}


def test_other_validation_tars_are_noted_before_the_first_checkpoint(config):
    opened(config)
    folder, _ = opened(resumed(config, val_tars=("w.tar",)), {**INPUTS, "val_tars": {"w.tar": "2b"}})
    assert read_description(folder.description)["inputs"]["val_tars"] == {"w.tar": "2b"}
    assert not folder.metrics.exists()


def test_finished_run_is_refused_on_other_validation_tars_and_kept_without_any(config):
    folder = validated(config, epoch=3)
    before = folder.description.read_bytes()
    with pytest.raises(
        MismatchError,
        match=r"inputs.val_tars differs: the run has \['v.tar'\], got \['w.tar'\]; .*`student-trainer eval",
    ):
        opened(resumed(config, val_tars=("w.tar",)), {**INPUTS, "val_tars": {"w.tar": "2b"}})
    opened(resumed(config, val_tars=()), {**INPUTS, "val_tars": {}})
    assert folder.description.read_bytes() == before
    assert best_so_far(folder) == 50.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is missing: not the folder of a training run"),
        ("{", "is damaged: .*; restore it or choose another --run"),
        ("[]", "is damaged: it has no config or inputs"),
        ('{"config": {}}', "is damaged: it has no config or inputs"),
        ('{"inputs": {}}', "is damaged: it has no config or inputs"),
    ],
)
def test_description_is_refused_when_it_says_too_little(tmp_path, text, message):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_description(path)


def test_folder_is_one_writers_alone_and_says_whose(tmp_path):
    run = tmp_path / "a" / "run"
    with reserved(run):
        assert (run / ".writer").read_text() == f"process {os.getpid()} of {socket.gethostname()}"
        with pytest.raises(ResourceError, match=rf"is being written by process {os.getpid()} of .*; wait until it"), \
                reserved(run):  # fmt: skip
            pass
        (run / ".writer").write_text(" \n")
        with pytest.raises(ResourceError, match="is being written by another process; wait"), reserved(run):
            pass
        (run / "last.pt").write_text("")
    assert [path.name for path in run.iterdir() if path.name != ".lock"] == ["last.pt"]


def test_folder_of_a_run_that_wrote_nothing_is_gone(tmp_path):
    with reserved(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()


def test_file_and_folder_that_cannot_be_made_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--run .*file already exists and is no folder; choose another one"), \
            reserved(tmp_path / "file"):  # fmt: skip
        pass
    with pytest.raises(ResourceError, match=r"--run .*run cannot be written: .*; choose another folder"), \
            reserved(tmp_path / "file" / "run"):  # fmt: skip
        pass
