"""The report a run leaves behind, and the trackers it can log to."""

from dataclasses import replace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_world import shared_world, train_config

from feature_store.errors import InputError
from student_trainer.config import TrainConfig
from student_trainer.engine.metrics import read_metrics
from student_trainer.reports.run import run_numbers, write_run_report
from student_trainer.train import train


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> TrainConfig:
    """A finished run with a report and TensorBoard."""
    config = train_config(
        tmp_path_factory.mktemp("runs") / "a <run>",
        val_tars=shared_world().val_tars,
        epochs=2,
        tensorboard=True,
        report=True,
    )
    train(config)
    return config


def test_report_shows_numbers_curves_and_settings_when_a_run_ends(run):
    page = (run.run / "report.html").read_text()
    epochs = [line for line in read_metrics(run.run / "metrics.jsonl") if line["kind"] == "epoch"]
    assert "<h1>Run a &lt;run&gt;</h1>" in page
    assert f"<td>last top-1</td><td>{epochs[-1]['val']['top1']:.2f} %</td>" in page
    assert f"<td>total, mean of the last epoch</td><td>{epochs[-1]['loss']['total']:.4g}</td>" in page
    assert page.count("<svg") == 5  # terms, accuracies, learning rate, images per second, data wait
    for term in ("task", "stage3_alternative", "kd", "top-5", "learning rate"):
        assert f">{term}</text>" in page
    assert "<td>optim.lr</td><td>0.001</td>" in page
    assert "<td>torch</td>" in page


def test_tensorboard_repeats_the_log_when_asked_for(run):
    steps = [line for line in read_metrics(run.run / "metrics.jsonl") if line["kind"] == "step"]
    events = EventAccumulator(str(run.run / "tensorboard")).Reload()
    names = {"loss": ("total", "stage4_original", "kd"), "speed": ("images_per_second", "data_wait", "memory")}
    for group, name in [(group, name) for group, inside in names.items() for name in inside]:
        logged = [(event.step, event.value) for event in events.Scalars(f"step/{group}/{name}")]
        assert logged == [(line["step"], pytest.approx(line[group][name], rel=1e-6)) for line in steps]
    assert [event.value for event in events.Scalars("step/lr")] == pytest.approx([line["lr"] for line in steps])
    assert len(events.Scalars("epoch/val/top1")) == 2
    assert all(line["speed"]["memory"] > 2**20 for line in steps)


def test_report_has_no_plots_but_all_numbers_when_matplotlib_is_absent(run, monkeypatch, tmp_path):
    for name in ("config.json", "metrics.jsonl"):
        (tmp_path / name).write_text((run.run / name).read_text())
    monkeypatch.setattr("student_trainer.reports.plots.find_spec", lambda name: None)
    page = write_run_report(tmp_path).read_text()
    assert "scalekd-cache[report]" in page
    assert "<svg" not in page
    assert "<td>last top-1</td>" in page


def test_report_is_written_without_steps_when_none_was_logged(run, tmp_path):
    (tmp_path / "config.json").write_text((run.run / "config.json").read_text())
    lines = (run.run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(line for line in lines if '"kind": "step"' not in line))
    page = write_run_report(tmp_path).read_text()
    assert page.count("<svg") == 2
    assert "images per second" not in page


def test_report_says_what_changed_when_a_run_was_resumed_with_more_epochs(run, tmp_path):
    config = replace(run, run=tmp_path / "r", method="none", epochs=1, tensorboard=False)
    train(config)
    assert "Changes on resuming" not in (config.run / "report.html").read_text()
    train(replace(config, resume=True, epochs=2))
    page = (config.run / "report.html").read_text()
    assert "<td>step 3</td><td>epochs 1 before, 2 now: from here on the learning rate follows" in page


def test_report_is_refused_when_the_folder_is_no_run(tmp_path):
    with pytest.raises(InputError, match=r"config.json is (missing|damaged)"):
        write_run_report(tmp_path)


def test_no_report_is_written_when_switched_off(run, tmp_path):
    train(replace(run, run=tmp_path / "r", method="none", epochs=1, tensorboard=False, report=False))
    assert not (tmp_path / "r" / "report.html").exists()
    assert not (tmp_path / "r" / "tensorboard").exists()


def test_report_gives_the_best_and_the_last_accuracy_when_the_best_came_earlier():
    speed = {"teacher_seconds": 0.0, "seconds_per_step": None}
    epochs = [
        {"kind": "epoch", "step": 3 * i, "epoch": i, "loss": {"total": 1.0}, "val": {"top1": top1}, "speed": speed}
        for i, top1 in enumerate((10.0, 40.0, 25.0))
    ]
    numbers = run_numbers([], epochs)
    assert (numbers["best top-1"], numbers["last top-1"], numbers["epochs"]) == ("40.00 %", "25.00 %", "3")
