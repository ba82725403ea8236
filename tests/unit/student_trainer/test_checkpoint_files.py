import os
import resource
import signal
from dataclasses import replace

import pytest
import torch

from feature_store.errors import InputError, MismatchError, ResourceError
from student_trainer.engine.checkpoint import (
    Checkpoint,
    Progress,
    load_checkpoint,
    require_same_run,
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
        ("config", {"student_kwargs": {"drop_rate": 0.1}}, r"config.student_kwargs differs"),
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
