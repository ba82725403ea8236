import os
import re
import resource
import signal
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler

from feature_store.errors import InputError, MismatchError, ResourceError
from student_trainer.engine.checkpoint import (
    Checkpoint,
    Progress,
    load_checkpoint,
    require_same_run,
    resume_notes,
    rng_state,
    save_checkpoint,
    set_rng_state,
)


def checkpoint(step: int = 3) -> Checkpoint:
    return Checkpoint(
        student={"name": "test_resnet", "input_size": (64, 64)},
        weights={"w": torch.arange(4.0)},
        loss={},
        optimizer={"state": {}, "param_groups": [{"lr": 0.1}]},
        progress=Progress(epoch=1, batch=2, step=step, best_top1=61.5, means={"sums": {"total": 0.1}, "count": 2}),
        rng=[rng_state()],
    )


def test_checkpoint_comes_back_equal_when_loaded(tmp_path):
    saved = checkpoint()
    save_checkpoint(tmp_path / "last.pt", saved)
    loaded = load_checkpoint(tmp_path / "last.pt")
    assert loaded.progress == saved.progress
    assert loaded.student == saved.student
    assert loaded.optimizer == saved.optimizer
    assert torch.equal(loaded.weights["w"], saved.weights["w"])
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def test_checkpoint_takes_averaged_weights_when_it_was_written_before_there_was_a_choice(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, replace(checkpoint(), ema_eval=False))
    assert load_checkpoint(path).ema_eval is False
    torch.save({name: value for name, value in torch.load(path).items() if name != "ema_eval"}, path)
    assert load_checkpoint(path).ema_eval is True


def test_checkpoint_names_what_it_lacks_when_incomplete(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, checkpoint())
    torch.save({name: value for name, value in torch.load(path).items() if name != "rng"}, path)
    with pytest.raises(InputError, match=r"last.pt is not a checkpoint of student-trainer: it is incomplete: .*rng"):
        load_checkpoint(path)


def parts() -> tuple[nn.Linear, nn.Linear, torch.optim.SGD, GradScaler, nn.Linear]:
    student, method = nn.Linear(2, 2), nn.Linear(3, 1)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    return student, method, optimizer, GradScaler("cpu", init_scale=8.0), nn.Linear(2, 2)


def test_every_part_has_the_saved_state_when_a_checkpoint_is_loaded_into_a_run():
    student, method, optimizer, scaler, ema = parts()
    optimizer.param_groups[0]["lr"] = 0.7
    saved = replace(
        checkpoint(),
        weights=student.state_dict(),
        loss=method.state_dict(),
        optimizer=optimizer.state_dict(),
        scaler={**scaler.state_dict(), "scale": 4.0},
        ema=ema.state_dict(),
    )
    others = parts()
    saved.load_into(*others)
    assert torch.equal(others[0].weight, student.weight)
    assert torch.equal(others[1].weight, method.weight)
    assert others[2].param_groups[0]["lr"] == 0.7
    assert others[3].get_scale() == 4.0
    assert torch.equal(others[4].weight, ema.weight)
    with pytest.raises(InputError, match=r"the checkpoint does not fit the run: .*weight.*; resume with the versions"):
        replace(saved, weights=method.state_dict()).load_into(*others)
    with pytest.raises(InputError, match=r"the checkpoint does not fit the run"):
        replace(saved, ema=None).load_into(*others)


def test_checkpoint_is_on_the_disk_when_it_takes_its_name(tmp_path, monkeypatch):
    calls = []
    fsync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append("fsync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("rename"), rename(*paths)))
    save_checkpoint(tmp_path / "last.pt", checkpoint())
    assert calls[:2] == ["fsync", "rename"]


@pytest.fixture
def full_disk():
    """No file may grow beyond 64 KB: the operating system refuses writes as a full disk does."""
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, ignored)


def test_checkpoint_stays_the_old_one_when_the_disk_is_full(tmp_path, full_disk):
    save_checkpoint(tmp_path / "last.pt", checkpoint(step=3))
    big = replace(checkpoint(step=4), weights={"w": torch.zeros(100_000)})
    with pytest.raises(
        ResourceError, match=r"last.pt cannot be written: .*; make room on the disk and run .* --resume"
    ):
        save_checkpoint(tmp_path / "last.pt", big)
    assert load_checkpoint(tmp_path / "last.pt").progress.step == 3
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def test_random_numbers_repeat_when_the_state_is_restored():
    state = rng_state()
    first = torch.rand(3)
    set_rng_state(state)
    assert torch.equal(first, torch.rand(3))


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("owned",)


@pytest.mark.parametrize("content", [b"", b"junk", "truncated", "foreign", "hostile", "format"])
def test_checkpoint_is_refused_when_damaged_or_foreign(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "last.pt"
    save_checkpoint(path, checkpoint())
    if content == "truncated":
        path.write_bytes(path.read_bytes()[:-300])
    elif content == "foreign":
        torch.save({"state_dict": {}}, path)
    elif content == "format":
        torch.save({**torch.load(path, weights_only=True), "format": 99}, path)
    elif content == "hostile":
        torch.save({"format": Hostile()}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"last.pt (is not a checkpoint of student-trainer|has checkpoint format 99)"):
        load_checkpoint(path)
    assert not (tmp_path / "owned").exists()


def test_checkpoint_is_refused_when_missing(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_checkpoint(tmp_path / "last.pt")


SAVED = {
    "config": {"student": "a", "optim": {"lr": 0.1}, "student_kwargs": {}, "workers": 4, "tars": ["x"]},
    "inputs": {"tars": {"x": "1"}},
}


@pytest.mark.parametrize(
    "change",
    [
        {"workers": 0}, {"tars": ["/elsewhere/x"]}, {"keys_file": "/elsewhere"},
        {"views_from": "/elsewhere"}, {"teacher": {"url": "http://elsewhere:80"}}, {"device": "cpu"}, {"epochs": 9},
    ],
)  # fmt: skip
def test_run_may_resume_when_the_change_cannot_matter(change):
    require_same_run(SAVED, {**SAVED, "config": {**SAVED["config"], **change}})


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("config", {"optim": {"lr": 0.2}}, r"config.optim.lr differs: the run has 0.1, got 0.2; resume with"),
        (
            "config",
            {"student_kwargs": {"drop_rate": 0.1}},
            r"config.student_kwargs.drop_rate differs: the run has None, got 0.1",
        ),
        ("inputs", {"tars": {"x": "2"}}, r"inputs.tars.x differs: the run has '1', got '2'"),
        ("inputs", {"tars": {"x": "1", "y": "1"}}, r"inputs.tars.y differs: the run has None, got '1'"),
    ],
)
def test_run_is_refused_when_resumed_with_something_else(section, change, message):
    with pytest.raises(MismatchError, match=message):
        require_same_run(SAVED, {**SAVED, section: {**SAVED[section], **change}})


def test_run_is_the_same_when_only_what_it_was_held_against_changed():
    saved = {"config": {"preset": None, "expect": {"model_kwargs": None, "policy": "a2"}}, "inputs": {}}
    now = {"config": {"preset": "x", "expect": {"model_kwargs": {"img_size": 224}, "policy": None}}, "inputs": {}}
    require_same_run(saved, now)


def test_live_teacher_is_compared_as_far_as_it_is_recorded():
    recorded = {"weights_sha256": "1", "split": {"depth": 1}}
    now = {**recorded, "std": [0.5, 0.5, 0.5], "model_kwargs": {"global_pool": "avg"}}
    old, current, other = (
        {"config": {}, "inputs": {"live_teacher": teacher}} for teacher in (recorded, now, {**now, "model_kwargs": {}})
    )
    require_same_run(old, current)
    require_same_run(current, current)
    with pytest.raises(MismatchError, match=r"live_teacher.model_kwargs.global_pool differs: the run has None, got 'a"):
        require_same_run(other, current)
    with pytest.raises(MismatchError, match=r"live_teacher differs: the run has None, got|live_teacher.model_kwargs"):
        require_same_run({"config": {}, "inputs": {"live_teacher": None}}, current)


RUN = {
    "config": {"epochs": 3},
    "plan": {"processes": 1, "device": "cpu"},
    "software": {"torch": "2.0", "timm": "1.0", "numpy": "2"},
}


@pytest.mark.parametrize(
    ("section", "change", "note"),
    [
        ("plan", {"processes": 2}, r"^processes 1 before, 2 from here on: the same samples .*; other random numbers"),
        (
            "plan",
            {"device": "cuda"},
            r"^device cpu before, cuda from here on: the same samples .*; rounding may differ$",
        ),
        ("config", {"epochs": 5}, r"^epochs 3 before, 5 now: from here on the learning rate follows the new schedule$"),
        ("software", {"torch": "2.1"}, r"^torch 2.0 before, 2.1 now: numbers may differ$"),
        ("software", {"timm": "1.1"}, r"^timm 1.0 before, 1.1 now: numbers may differ$"),
    ],
)
def test_resumed_run_says_what_is_different_when_something_is(section, change, note):
    (found,) = resume_notes(RUN, {**RUN, section: {**RUN[section], **change}})
    assert re.search(note, found)


@pytest.mark.parametrize("section", ["plan", "software"])
def test_resumed_run_says_what_an_earlier_release_did_not_save(section):
    before = {**RUN, section: {}}
    assert [note.split()[:3] for note in resume_notes(before, RUN)] == [[n, "None", "before,"] for n in RUN[section]][
        :2
    ]


def test_resumed_run_has_nothing_to_say_when_only_other_software_changed():
    assert resume_notes(RUN, {**RUN, "software": {**RUN["software"], "numpy": "3"}}) == []
