"""Whole sweeps on a tiny store: run, resumed, in parallel, with failures, and from the command line."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from stopped_runs import before_updates, killed_at_update
from training_world import samples, shared_world, write_tar

from feature_store.errors import FailedError, MismatchError, ResourceError, UserError
from student_trainer.cli import main
from student_trainer.engine.checkpoint import load_checkpoint
from student_trainer.engine.metrics import read_metrics
from student_trainer.sweeps.compare import CompareConfig, compare, is_finished
from student_trainer.sweeps.file import read_sweep
from student_trainer.sweeps.processes import take_share
from student_trainer.train import train

ABLATION = ("No distillation", "CAP", "CAP + DFM", "CAP + DFM + TPP", "CAP + DFM + TPP + KD")


def changes(**more: object) -> tuple[str, ...]:
    """What turns a ready sweep into one over the tiny world."""
    world = shared_world()
    values = {
        "store": world.store, "tars": f"[{', '.join(world.tars)}]", "val_tars": world.val_tars[0],
        "student": "test_resnet", "epochs": 1, "batch_size": 8, "workers": 0, "report": "false", **more,
    }  # fmt: skip
    return tuple(f"{name}={value}" for name, value in values.items())


def top1(folder: Path) -> float:
    return [line["val"]["top1"] for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "epoch"][-1]


@pytest.fixture(scope="module")
def ablation(tmp_path_factory):
    """The paper's ablation, run once with two seeds."""
    config = CompareConfig(
        sweep=Path("ablation"), out=tmp_path_factory.mktemp("sweep") / "ablation", seeds=(0, 1), set=changes(),
        progress=False,
    )  # fmt: skip
    return config, compare(config)


def test_ablation_gives_the_papers_rows_when_run_on_a_store(ablation):
    config, found = ablation
    assert tuple(row.name for row in found.settings) == ABLATION
    for row in found.settings:
        assert [run.seed for run in row.runs] == [0, 1]
        assert [run.top1 for run in row.runs] == [top1(run.folder) for run in row.runs]
        assert (row.difference is None) == (row.name == "No distillation")
    terms = [set(read_metrics(row.runs[0].folder / "metrics.jsonl")[-1]["raw"]) - {"task"} for row in found.settings]
    stage4, stage3 = ({f"{stage}_original", f"{stage}_alternative"} for stage in ("stage4", "stage3"))
    assert terms == [set(), {"stage4_original"}, stage4, stage3 | stage4, stage3 | stage4 | {"kd"}]
    assert {path.name for path in config.folder.iterdir()} == {"runs", "results.json", "table.md", "report.html"}
    assert json.loads((config.folder / "results.json").read_text())["settings"][4]["name"] == ABLATION[4]


def test_task_loss_is_unweighted_when_methods_are_compared(ablation):
    _, found = ablation
    kd = found.settings[4].runs[0]
    logged = [line["loss"]["task"] for line in read_metrics(kd.folder / "metrics.jsonl") if line["kind"] == "epoch"]
    assert kd.task_loss == tuple(2 * value for value in logged)
    plain = found.settings[0].runs[0]
    assert plain.task_loss == (read_metrics(plain.folder / "metrics.jsonl")[-1]["raw"]["task"],)


def test_finished_runs_are_left_alone_when_the_sweep_is_repeated(ablation, monkeypatch):
    config, found = ablation
    monkeypatch.setattr("student_trainer.sweeps.processes.train", lambda config: pytest.fail(f"ran {config.run} again"))
    assert compare(config) == found


def test_missing_run_is_made_again_with_the_same_result_when_its_folder_is_gone(ablation):
    config, found = ablation
    shutil.rmtree(found.settings[1].runs[1].folder)
    again = compare(config)
    assert [run.top1 for run in again.settings[1].runs] == [run.top1 for run in found.settings[1].runs]


def test_sweep_is_refused_when_its_folder_holds_runs_with_other_settings(ablation):
    config, _ = ablation
    with pytest.raises(MismatchError, match=r"config.optim.lr differs: the run has 0.001, got 0.5"):
        compare(replace(config, set=(*config.set, "optim.lr=0.5")))


def test_sweep_is_refused_before_it_trains_when_its_folder_holds_runs_of_other_epochs(tmp_path):
    (tmp_path / "s.yaml").write_text("{settings: {plain: {method: none}}, seeds: [0]}")
    config = CompareConfig(sweep=tmp_path / "s.yaml", out=tmp_path / "out", set=changes(), progress=False)
    compare(config)
    more = replace(config, set=changes(epochs=2), seeds=(0, 1))
    told = r"config.epochs differs: run .*plain-seed0 has {}, got {}; .* choose another --out, or remove that folder"
    with pytest.raises(MismatchError, match=told.format(1, 2)):
        compare(more)
    (old, _) = read_sweep(more.sweep, more.folder, more.set, more.seeds).runs
    train(old.config)  # continued by itself, with a learning rate of two schedules
    for again, expected in ((config, told.format(2, 1)), (more, told.format(1, 2))):
        with pytest.raises(MismatchError, match=expected):
            compare(again)
    assert [path.name for path in (tmp_path / "out/runs").iterdir()] == ["plain-seed0"]


@pytest.mark.parametrize("changed", ["store", "val_tars"])
def test_runs_are_refused_when_their_data_is_another_and_kept_when_it_only_moved(tmp_path, changed):
    (tmp_path / "kd.yaml").write_text("{settings: {kd: {method: kd}}, seeds: [0]}")
    world = shared_world()
    config = CompareConfig(sweep=tmp_path / "kd.yaml", out=tmp_path / "out", set=changes(), progress=False)
    found = compare(config)
    (tmp_path / "moved").mkdir()
    if changed == "store":
        other, moved = shared_world("vit", "f32").store, shutil.copytree(world.store, tmp_path / "moved" / "store")
    else:
        other = write_tar(tmp_path / "val-0.tar", samples(10, seed=9))
        moved = shutil.copy(world.val_tars[0], tmp_path / "moved")
    with pytest.raises(UserError, match=rf"1 of 1 runs failed; .*\n  kd, seed 0: inputs.{changed}"):
        compare(replace(config, set=changes(**{changed: other})))
    again = compare(replace(config, set=changes(**{changed: moved})))
    assert again.settings[0].runs[0].top1 == found.settings[0].runs[0].top1


def test_finished_runs_are_refused_when_their_setting_has_other_views_now(tmp_path):
    sweep = tmp_path / "kd.yaml"
    sweep.write_text("{settings: {kd: {method: kd, num_views: 2}}, seeds: [0]}")
    config = CompareConfig(sweep=sweep, out=tmp_path / "out", set=changes(), progress=False)
    compare(config)
    sweep.write_text("{settings: {kd: {method: kd, num_views: 1}}, seeds: [0]}")
    with pytest.raises(
        UserError, match=r"1 of 1 runs failed; .*\n  kd, seed 0: inputs.views differs: the run has 2, got 1"
    ):
        compare(config)


def test_more_seeds_only_add_runs_when_the_sweep_grows(ablation):
    config, found = ablation
    grown = read_sweep(config.sweep, config.folder, config.set, (0, 1, 2))
    assert [is_finished(run.config) for run in grown.runs] == [True] * 10 + [False] * 5
    assert {run.config.run for run in grown.runs[:10]} == {run.folder for row in found.settings for run in row.runs}


def test_unfinished_run_goes_on_where_it_stopped_when_the_sweep_is_repeated(tmp_path):
    options = changes(epochs=3)
    sweep = ("{settings: {kd: {method: kd}}, seeds: [0]}", tmp_path / "kd.yaml")
    sweep[1].write_text(sweep[0])
    whole = compare(CompareConfig(sweep=sweep[1], out=tmp_path / "whole", set=options, progress=False))
    config = CompareConfig(sweep=sweep[1], out=tmp_path / "cut", set=options, progress=False)
    (run,) = read_sweep(config.sweep, config.folder, config.set).runs
    with killed_at_update(7):  # the first of the third epoch
        compare(config)
    assert load_checkpoint(run.config.run / "last.pt").progress.epoch == 2
    assert not is_finished(run.config)
    resumed = compare(config)
    assert resumed.settings[0].runs[0].top1 == whole.settings[0].runs[0].top1
    cut, full = (load_checkpoint(tmp_path / name / "runs/kd-seed0/last.pt").weights for name in ("cut", "whole"))
    assert all(torch.equal(cut[name], full[name]) for name in full)


def test_other_runs_finish_when_one_fails(tmp_path, capsys):
    (tmp_path / "s.yaml").write_text("{settings: {good: {}, bad: {optim: {lr: 1e30, opt: momentum}}}, seeds: [0]}")
    config = CompareConfig(sweep=tmp_path / "s.yaml", out=tmp_path / "out", set=changes(method="none", epochs=2))
    with pytest.raises(UserError, match=r"1 of 2 runs failed; fix the sweep.*\n  bad, seed 0: the loss is not finite"):
        compare(config)
    saved = json.loads((tmp_path / "out/results.json").read_text())
    assert [len(row["runs"]) for row in saved["settings"]] == [1, 0]
    assert "bad, seed 0: failed: the loss is not finite" in capsys.readouterr().err


def test_other_runs_finish_when_one_crashes(tmp_path, capsys):
    (tmp_path / "s.yaml").write_text("{settings: {bad: {method: kd}, good: {method: none}}, seeds: [0]}")
    config = CompareConfig(sweep=tmp_path / "s.yaml", out=tmp_path / "out", set=changes())

    def crash_at_first(number: int, _) -> None:
        if number == 1:
            raise RuntimeError("nobody foresaw this")

    failed = r"1 of 2 runs failed; .*\n  bad, seed 0: RuntimeError: nobody foresaw this"
    with before_updates(crash_at_first), pytest.raises(UserError, match=failed):
        compare(config)
    assert [len(row["runs"]) for row in json.loads((tmp_path / "out/results.json").read_text())["settings"]] == [0, 1]
    assert "crash_at_first" in capsys.readouterr().err  # the traceback


def test_results_are_written_when_every_run_fails(tmp_path):
    (tmp_path / "s.yaml").write_text("{settings: {bad: {optim: {lr: 1e30, opt: momentum}}}, seeds: [0]}")
    config = CompareConfig(
        sweep=tmp_path / "s.yaml", out=tmp_path / "out", set=changes(method="none", epochs=2), progress=False
    )
    with pytest.raises(UserError, match=r"1 of 1 runs failed"):
        compare(config)
    assert (tmp_path / "out/report.html").is_file()


def test_parallel_runs_give_what_sequential_ones_do_when_processes_are_asked_for(ablation, tmp_path):
    config, found = ablation
    (tmp_path / "two.yaml").write_text("{settings: {No distillation: {method: none}}, seeds: [0, 1]}")
    parallel = compare(
        CompareConfig(sweep=tmp_path / "two.yaml", out=tmp_path / "p", set=config.set, processes=2, progress=False)
    )
    assert [run.top1 for run in parallel.settings[0].runs] == [run.top1 for run in found.settings[0].runs]


def test_each_process_sees_one_gpu_when_gpus_are_listed(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    threads = torch.get_num_threads()
    try:
        take_share("3", 1)
        assert (os.environ["CUDA_VISIBLE_DEVICES"], torch.get_num_threads()) == ("3", 1)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("hidden_by", "gpus", "expected"), [
    (None, (0, 2), ["0", "2"]), ("4,GPU-8f2a, 7", (0, 1, 2), ["4", "GPU-8f2a", "7"]), ("4,GPU-8f2a, 7", (2,), ["7"]),
])  # fmt: skip
def test_gpus_are_counted_as_torch_does_when_some_are_hidden(tmp_path, monkeypatch, hidden_by, gpus, expected):
    used: list[str] = []

    def all_fail(configs, gpus, threads):
        used.extend(gpus)
        yield from enumerate(UserError("no GPU here") for _ in configs)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr("student_trainer.sweeps.compare.run_in_processes", all_fail)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden_by is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden_by)
    (tmp_path / "s.yaml").write_text("{settings: {one: {method: none}}, seeds: [0]}")
    config = CompareConfig(sweep=tmp_path / "s.yaml", out=tmp_path / "o", set=changes(), gpus=gpus, progress=False)
    with pytest.raises(FailedError, match="no GPU here"):
        compare(config)
    assert used == expected
    with pytest.raises(ResourceError, match="--gpus has 3, but torch sees 3 GPUs here"):
        compare(replace(config, gpus=(0, 3)))
    assert used == expected


def test_command_prints_table_or_json_when_a_sweep_is_done(ablation, capsys):
    config, found = ablation
    arguments = ["compare", "ablation", "--out", str(config.out), "--seeds", "0", "1", "--set", *config.set]
    assert main([*arguments, "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["settings"][2]["mean"] == found.settings[2].mean
    assert "10 of 10 runs were finished before" in captured.err
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "vs No" in printed
    assert str(config.out) in printed


def test_command_shows_names_as_they_are_when_they_look_like_markup(tmp_path, capsys):
    (tmp_path / "s.yaml").write_text("{settings: {'[kd] $x': {method: kd}, '[/b]': {method: none}}, seeds: [0]}")
    arguments = ["compare", str(tmp_path / "s.yaml"), "--out", str(tmp_path / "out"), "--no-progress"]
    assert main([*arguments, "--set", *changes()]) == 0
    printed = capsys.readouterr().out
    assert "[kd] $x" in printed
    assert "[/b]" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--processes", "0"], "--processes is 0, expected at least 1"),
        (["--gpus", "0", "1", "--processes", "2"], "--gpus runs one process on each GPU; leave out --processes"),
        (["--gpus", "0", "0"], "--gpus is (0, 0), expected each GPU once"),
        (["--confidence", "1"], "--confidence is 1.0, expected between 0 and 1"),
        (["--threads", "0"], "--threads is 0, expected at least 1"),
        (["--set", "lr"], "--set 'lr' assigns nothing"),
    ],
)
def test_command_is_refused_when_an_option_cannot_work(tmp_path, capsys, options, message):
    assert main(["compare", "ablation", "--out", str(tmp_path), *options]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
