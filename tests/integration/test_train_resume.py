"""A run that stops anywhere goes on as if it had not: same metrics and same weights, to the bit."""

import json
import random
import shutil
import time
from dataclasses import replace

import pytest
import torch
from process_runs import kill, run_alone, start_group, wait_for_lines
from stopped_runs import killed_at_save, killed_at_update
from training_world import TIMING, changed, samples, shared_world, train_config, write_tar

from feature_store import Store, open_store
from feature_store.errors import InputError, MismatchError, UncommittedError
from student_trainer.config import OptimConfig, TrainConfig
from student_trainer.engine.checkpoint import load_checkpoint
from student_trainer.engine.metrics import read_metrics
from student_trainer.evaluate import Evaluator
from student_trainer.methods.scalekd import ScaleKDConfig
from student_trainer.students.load import load_student
from student_trainer.teachers.config import LiveOptions, ViewsConfig
from student_trainer.train import train

# Python 3.12 and later warn of fork under threads
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    return train_config(
        tmp_path / "run",
        student="test_vit",
        student_kwargs={"drop_path_rate": 0.3, "depth": 4},  # draws random numbers in every step
        val_tars=shared_world().val_tars,
        epochs=3,
        checkpoint_every=2,
        optim=OptimConfig(lr=1e-3, warmup_epochs=1),
    )


def numbers(run) -> list[dict]:
    """What must be the same: everything but times."""
    lines = (line for line in read_metrics(run / "metrics.jsonl") if line["kind"] != "start")
    return [{name: value for name, value in line.items() if name not in TIMING} for line in lines]


def assert_equal_runs(run, other) -> None:
    assert numbers(run) == numbers(other)
    mine, theirs = load_checkpoint(run / "last.pt"), load_checkpoint(other / "last.pt")
    for part in ("weights", "loss"):
        a, b = getattr(mine, part), getattr(theirs, part)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert replace(mine.progress, teacher_seconds=0.0) == replace(theirs.progress, teacher_seconds=0.0)
    assert torch.equal(mine.rng[0]["cpu"], theirs.rng[0]["cpu"])
    assert (run / "best.safetensors").read_bytes() == (other / "best.safetensors").read_bytes()


# checkpoints lie at steps 2, 3 (epoch end), 4, 6 (epoch end), 8: in mid-epoch, at its end, and before the first
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8])
def test_run_is_the_uninterrupted_one_to_the_bit_when_killed_and_resumed(config, tmp_path, steps):
    whole = train(replace(config, run=tmp_path / "whole"))
    with killed_at_update(steps + 1):
        train(config)
    resumed = train(replace(config, resume=True))
    assert_equal_runs(config.run, tmp_path / "whole")
    assert resumed.steps == whole.steps == 9
    assert resumed.best_top1 == whole.best_top1
    assert len(resumed.history) == 3


def test_run_repeats_the_end_of_an_epoch_when_killed_between_its_line_and_its_checkpoint(config, tmp_path):
    train(replace(config, run=tmp_path / "whole"))
    with killed_at_save(lambda: numbers(config.run)[-1]["step"] == 4):
        train(config)
    with killed_at_save(lambda: [line["kind"] for line in numbers(config.run)].count("epoch") == 2):
        train(replace(config, resume=True))
    assert numbers(config.run)[-1]["kind"] == "epoch"
    train(replace(config, resume=True))
    assert_equal_runs(config.run, tmp_path / "whole")


def test_run_is_the_uninterrupted_one_when_live_and_resumed(config, tmp_path):
    world = shared_world()
    config = changed(config, source="live", teacher=LiveOptions(checkpoint=world.checkpoint), epochs=2)
    train(replace(config, run=tmp_path / "whole"))
    with killed_at_update(5):
        train(config)
    before = load_checkpoint(config.run / "last.pt").progress.teacher_seconds
    resumed = train(replace(config, resume=True))
    assert_equal_runs(config.run, tmp_path / "whole")
    assert resumed.teacher_seconds > before > 0


def test_run_with_workers_is_the_one_without_when_resumed(config, tmp_path):
    config = replace(config, epochs=2)
    train(replace(config, run=tmp_path / "whole"))
    with killed_at_update(3):
        train(config)
    train(replace(config, resume=True, workers=1, start_method="fork"))
    assert_equal_runs(config.run, tmp_path / "whole")


def test_finished_run_gives_its_result_when_resumed(config):
    result = train(config)
    again = train(replace(config, resume=True))
    assert again == replace(result, seconds_per_step=None)


@pytest.mark.parametrize("resume", [False, True])
def test_run_starts_when_one_was_killed_while_its_folder_was_made(config, resume):
    config.run.mkdir()
    (config.run / "config.json.partial").write_text("{")
    assert train(replace(config, resume=resume, epochs=1, method="none")).steps == 3


def test_run_is_refused_when_its_folder_holds_something_else(config):
    config.run.mkdir()
    (config.run / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"it holds no run to continue; choose another folder"):
        train(replace(config, resume=True, epochs=1, method="none"))


def test_run_goes_on_when_its_keys_moved_and_is_refused_when_they_changed(config, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text("".join(f"b{i:03d}\n" for i in range(12)))
    shutil.copy(first, second)
    assert train(replace(config, epochs=1, keys_file=first)).steps == 1
    assert train(replace(config, epochs=1, keys_file=second, resume=True)).steps == 1
    second.write_text("".join(f"b{i:03d}\n" for i in range(11)))
    with pytest.raises(MismatchError, match=r"inputs.keys differs"):
        train(replace(config, epochs=1, keys_file=second, resume=True))


def test_run_is_refused_when_resumed_with_features_of_another_kind(config):
    config = replace(config, epochs=1)
    train(config)
    live = changed(config, source="live", teacher=LiveOptions(checkpoint=shared_world().checkpoint))
    with pytest.raises(MismatchError, match=r"inputs.features differs: the run has 'cached', got 'live'"):
        train(replace(live, resume=True))


def test_run_is_refused_when_its_live_teacher_has_the_same_weights_and_other_logits(config):
    """Pooling has no weights of its own."""
    world, views = shared_world(), ViewsConfig(size=64)
    name, kwargs = world.teacher
    token, mean = (
        LiveOptions(
            name=name, checkpoint=world.checkpoint, model_kwargs={**kwargs, "global_pool": pool, "fc_norm": False}
        )
        for pool in ("token", "avg")
    )
    config = changed(config, source="live", store=None, teacher=token, views=views, method="kd", epochs=1)
    named = {**token.model_kwargs, "checkpoint_path": str(world.checkpoint)}  # the same weights, given in another way
    same = replace(token, checkpoint=None, pretrained=False, model_kwargs=named)
    assert train(config).steps == train(changed(config, resume=True, teacher=same)).steps == 3
    with pytest.raises(
        MismatchError, match=r"inputs.live_teacher.model_kwargs.global_pool differs: the run has 'token', got 'avg'"
    ):
        train(changed(config, resume=True, teacher=mean))


def test_run_starts_when_resumed_before_it_began(config):
    assert train(replace(config, resume=True, epochs=1)).steps == 3


def test_run_is_the_uninterrupted_one_when_its_process_is_killed_at_ten_random_moments(config, tmp_path):
    config = replace(config, epochs=14, ema_decay=0.9, report=False)
    whole = replace(config, run=tmp_path / "whole")
    assert run_alone(whole) == {"steps": 42}
    moments, kills, seen = random.Random(0), 0, 0
    while kills < 10:
        processes = start_group(replace(config, resume=True), 1)
        # steps after the one it resumes at, and any moment of the step then in progress
        alive = wait_for_lines(config, seen + moments.randint(1, 2), processes)
        time.sleep(moments.uniform(0, 0.02))
        kill(processes)
        kills += alive
        assert alive, "it ended before it was killed often enough"
        seen = len(read_metrics(config.run / "metrics.jsonl")) if (config.run / "metrics.jsonl").is_file() else 0
    assert run_alone(replace(config, resume=True)) == {"steps": 42}
    assert_equal_runs(config.run, whole.run)


def test_run_is_refused_when_its_folder_exists_and_resume_is_not_asked(config):
    train(replace(config, epochs=1, method="none"))
    with pytest.raises(InputError, match=r"--run .*run already exists; add --resume to continue it"):
        train(replace(config, epochs=1, method="none"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 4}, r"config.batch_size differs: the run has 8, got 4; resume with the settings"),
        ({"optim": OptimConfig(lr=1e-3)}, r"config.optim.warmup_epochs differs: the run has 1.0, got 0.0"),
        ({"scalekd": ScaleKDConfig(tpp=False)}, r"config.scalekd.tpp differs: the run has True, got False"),
    ],
)
def test_run_is_refused_when_resumed_with_other_settings(config, change, message):
    train(replace(config, epochs=1))
    with pytest.raises(MismatchError, match=message):
        train(replace(config, epochs=1, resume=True, **change))


def test_run_is_refused_when_resumed_with_another_store(config, tmp_path):
    train(replace(config, epochs=1))
    other = shared_world("vit", "f32")
    with pytest.raises(MismatchError, match=r"inputs.store differs: the run has '[0-9a-f]+', got '[0-9a-f]+'"):
        train(changed(config, epochs=1, resume=True, store=other.store))


def test_run_resumes_when_the_store_moved(config, tmp_path):
    train(replace(config, epochs=1))
    shutil.copytree(config.teacher.store, tmp_path / "moved")
    assert train(changed(config, epochs=1, resume=True, store=tmp_path / "moved")).steps == 3


def test_run_goes_on_with_its_views_when_the_store_grew(config, tmp_path):
    shutil.copytree(config.teacher.store, tmp_path / "grown")
    config = changed(config, store=tmp_path / "grown", epochs=1)
    train(config)
    store = open_store(config.teacher.store)
    store.grow(replace(store.manifest, num_views=store.manifest.num_views + 1))
    with pytest.raises(UncommittedError, match="lack views"):
        train(replace(config, resume=True))
    assert train(changed(config, resume=True, num_views=2)).steps == 3
    with pytest.raises(MismatchError, match=r"inputs.views differs: the run has 2, got 1"):
        train(changed(config, resume=True, num_views=1))


def test_run_is_refused_when_quarantined_samples_were_mended_meanwhile(config, monkeypatch):
    train(replace(config, epochs=1))
    monkeypatch.setattr(Store, "quarantined", lambda *_: {})
    with pytest.raises(MismatchError, match=r"inputs.samples differs"):
        train(replace(config, epochs=1, resume=True))


def test_run_is_refused_when_its_checkpoint_is_of_another_model(config):
    train(replace(config, epochs=1))
    saved = json.loads((config.run / "config.json").read_text())
    saved["config"]["student"] = "test_vit2"
    (config.run / "config.json").write_text(json.dumps(saved))
    with pytest.raises(InputError, match=r"the checkpoint does not fit the run: .*; resume with the versions"):
        train(replace(config, epochs=1, resume=True, student="test_vit2"))


@pytest.fixture
def other_val(tmp_path) -> tuple[str]:
    return (write_tar(tmp_path / "other-val.tar", samples(6, seed=9, prefix="w")),)


def failing_validation(monkeypatch, at: int) -> None:
    """Validation fails at the at-th time."""
    validate, times = Evaluator.unless_stopped, []

    def fail(self, model, stop):
        times.append(1)
        if len(times) == at:
            raise InputError("none of 10 validation images can be read")
        return validate(self, model, stop)

    monkeypatch.setattr(Evaluator, "unless_stopped", fail)


@pytest.mark.parametrize("at", [1, 2])
def test_run_keeps_the_epoch_and_goes_on_to_the_bit_when_validation_fails(config, tmp_path, monkeypatch, at):
    train(replace(config, run=tmp_path / "whole"))
    with monkeypatch.context() as patch:
        failing_validation(patch, at)
        with pytest.raises(InputError, match="none of 10"):
            train(config)
    assert load_checkpoint(config.run / "last.pt").progress.step == 3 * at
    train(replace(config, resume=True))
    assert_equal_runs(config.run, tmp_path / "whole")


def test_run_goes_on_without_validation_when_it_failed(config, monkeypatch):
    with monkeypatch.context() as patch:
        failing_validation(patch, 2)
        with pytest.raises(InputError, match="none of 10"):
            train(config)
    best = (config.run / "best.safetensors").read_bytes()
    result = train(replace(config, resume=True, val_tars=()))
    assert [line.keys() & {"val", "earlier_val"} for line in result.history] == [{"earlier_val"}, set(), set()]
    assert (result.best_top1, result.last_top1) == (None, None)
    assert (config.run / "earlier-best.safetensors").read_bytes() == best
    student, last = (load_student(path).student.model.state_dict() for path in (config.run, config.run / "last.pt"))
    assert all(torch.equal(student[name], last[name]) for name in last)
    assert json.loads((config.run / "config.json").read_text())["inputs"]["val_tars"] == {}
    assert train(replace(config, resume=True, val_tars=())).steps == 9


def test_run_chooses_its_best_anew_when_it_goes_on_with_other_validation_tars(config, other_val, monkeypatch):
    with monkeypatch.context() as patch:
        failing_validation(patch, 2)
        with pytest.raises(InputError, match="none of 10"):
            train(config)
    best = (config.run / "best.safetensors").read_bytes()
    result = train(replace(config, resume=True, val_tars=other_val))
    first, *rest = result.history
    assert first["earlier_val"]["samples"] == 10
    assert "val" not in first
    assert [line["val"]["samples"] for line in rest] == [6, 6]
    assert result.best_top1 == max(line["val"]["top1"] for line in rest)
    assert (config.run / "best.safetensors").read_bytes() != best
    assert train(replace(config, resume=True, val_tars=other_val)).best_top1 == result.best_top1


def test_finished_run_is_refused_when_resumed_with_other_validation_tars(config, other_val):
    result = train(replace(config, epochs=1))
    with pytest.raises(
        MismatchError, match=r"inputs.val_tars differs: .*the run is finished: .*student-trainer evaluate"
    ):
        train(replace(config, epochs=1, resume=True, val_tars=other_val))
    assert train(replace(config, epochs=1, resume=True, val_tars=())).best_top1 == result.best_top1


def test_finished_run_goes_on_with_the_same_samples_and_says_what_differs_when_given_more_epochs(config, tmp_path):
    """Steps already made stay; a schedule without decay gives the run that had all epochs from the start."""
    config = replace(config, optim=OptimConfig(sched="step", decay_epochs=100, lr=1e-3), progress=True)
    train(replace(config, run=tmp_path / "whole", epochs=3))
    train(replace(config, epochs=2))
    train(replace(config, epochs=3, resume=True))
    assert_equal_runs(config.run, tmp_path / "whole")
    (_, resumed) = (line for line in read_metrics(config.run / "metrics.jsonl") if line["kind"] == "start")
    assert resumed["notes"] == ["epochs 2 before, 3 now: from here on the learning rate follows the new schedule"]
    with pytest.raises(InputError, match=r"--epochs is 2, but the run has done 3; give at least as many"):
        train(replace(config, epochs=2, resume=True))


def test_progress_is_readable_without_the_checkpoint(config):
    with killed_at_update(6):
        train(config)
    progress = json.loads((config.run / "progress.json").read_text())
    assert (progress["epoch"], progress["step"], progress["finished"]) == (1, 4, False)
    result = train(replace(config, resume=True))
    progress = json.loads((config.run / "progress.json").read_text())
    assert (progress["epoch"], progress["step"], progress["finished"]) == (3, 9, True)
    assert progress["best_top1"] == result.best_top1
