"""Whole training runs on a tiny store: every method, what a run leaves behind, and the three commands."""

import json
import os
import re
import shutil
import signal
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from servers import WebServer
from stopped_runs import before_updates
from torch.nn.modules.module import register_module_forward_pre_hook
from training_world import SIZE, changed, samples, shared_world, train_config, write_tar

from feature_store.errors import InputError, ResourceError, UserError
from feature_store.inputs.tar import Tar
from feature_store.store import open_store
from student_trainer.cli import main
from student_trainer.config import OptimConfig, TrainConfig
from student_trainer.data.loader import BatchLoader
from student_trainer.data.replayed import StoredViews
from student_trainer.engine.callbacks import Callback
from student_trainer.engine.checkpoint import load_checkpoint
from student_trainer.engine.metrics import read_metrics
from student_trainer.engine.optimizer import make_scheduler
from student_trainer.evaluate import EvaluateConfig, evaluate
from student_trainer.methods.scalekd import ScaleKDConfig
from student_trainer.plan import resolve
from student_trainer.teachers.config import LiveOptions, ViewsConfig
from student_trainer.teachers.store import StoreSide
from student_trainer.train import Run, train

SCALEKD_TERMS = {
    "task",
    "stage3_original",
    "stage3_alternative",
    "stage4_original",
    "stage4_alternative",
    "kd",
    "total",
}


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    val_tars = shared_world().val_tars
    return train_config(tmp_path / "run", val_tars=val_tars, epochs=2, optim=OptimConfig(lr=1e-3), progress=True)


def lines(config: TrainConfig, kind: str) -> list[dict]:
    return [line for line in read_metrics(config.run / "metrics.jsonl") if line["kind"] == kind]


@pytest.mark.parametrize(
    ("method", "terms"),
    [
        ("scalekd", SCALEKD_TERMS),
        ("fd", {"task", "fd", "total"}),
        ("kd", {"task", "kd", "total"}),
        ("none", {"task", "total"}),
    ],
)
def test_run_logs_every_term_when_trained(config, method, terms):
    config = replace(config, method=method)
    result = train(config)
    steps, epochs = lines(config, "step"), lines(config, "epoch")
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]  # 25 readable samples: 3 batches of 8 an epoch
    for line in steps:
        assert line["loss"].keys() == terms
        assert line["raw"].keys() == terms - {"total"}
        assert line["loss"]["total"] == pytest.approx(sum(line["loss"][name] for name in terms - {"total"}), rel=1e-5)
        assert 0 <= line["speed"]["data_wait"] <= 1
    for epoch, line in enumerate(epochs):
        own = [step for step in steps if step["epoch"] == epoch]
        assert line["loss"]["total"] == pytest.approx(sum(step["loss"]["total"] for step in own) / 3, rel=1e-5)
        assert line["val"]["samples"] == 10
    assert result.history == tuple(epochs)
    assert result.last_top1 == epochs[-1]["val"]["top1"]
    assert result.best_top1 == max(line["val"]["top1"] for line in epochs)
    assert (result.steps, result.teacher_seconds) == (6, 0.0)
    assert result.seconds_per_step > 0


@pytest.mark.parametrize("student", ["test_vit", "test_convnext"])
def test_run_trains_every_weight_of_other_families_when_named(config, student):
    config = replace(config, student=student, scalekd=ScaleKDConfig(norm="layer"), epochs=1)
    before = resolve(config)
    assert train(config).steps == 3
    assert all(line["loss"].keys() == SCALEKD_TERMS for line in lines(config, "step"))
    after = load_checkpoint(config.run / "last.pt")
    for module, trained in ((before.student.model, after.weights), (before.method, after.loss)):
        assert [name for name, leaf in module.named_parameters() if torch.equal(leaf, trained[name])] == []


def test_loss_falls_when_trained_long_enough(config):
    train(replace(config, method="kd", epochs=8, val_tars=()))
    epochs = lines(config, "epoch")
    assert epochs[-1]["loss"]["total"] < 0.95 * epochs[0]["loss"]["total"]
    assert "val" not in epochs[-1]
    assert not (config.run / "best.safetensors").exists()


def test_run_counts_teacher_seconds_when_live(config):
    world = shared_world()
    result = train(changed(config, source="live", teacher=LiveOptions(checkpoint=world.checkpoint), epochs=1))
    assert result.teacher_seconds > 0
    assert lines(config, "epoch")[-1]["speed"]["teacher_seconds"] == result.teacher_seconds


def test_run_needs_no_store_when_the_teacher_is_live(config):
    world = shared_world()
    teacher = LiveOptions(name=world.teacher[0], model_kwargs=world.teacher[1], checkpoint=world.checkpoint)
    config = changed(config, store=None, source="live", teacher=teacher, views=ViewsConfig(size=SIZE), epochs=1)
    train(config)
    # without a store nothing was quarantined before: 26 samples, one of which turns out to be unreadable
    assert lines(config, "start")[0] | {"samples": 26, "quarantined": 0, "views": None} == lines(config, "start")[0]
    assert lines(config, "step")[0]["loss"].keys() == SCALEKD_TERMS


class ReadsAtEpochEnds(Callback):
    """Has a run read its steps as it does on a GPU that logs less often than once an epoch."""

    def on_start(self, run: Run) -> None:
        run.reads_every_step = False


@pytest.mark.parametrize("callbacks", [[], [ReadsAtEpochEnds()]])
def test_run_names_unreadable_samples_when_there_is_no_store(config, capsys, callbacks):
    config = changed(config, store=None, method="none", num_classes=4, views=ViewsConfig(size=SIZE), batch_size=13)
    train(replace(config, log_every=100), callbacks=callbacks)
    left_out = lines(config, "unreadable")
    assert [line["epoch"] for line in left_out] == [0, 1]
    assert all("train-0.tar/a009: not an image" in line["samples"][0] for line in left_out)
    assert "left out, unreadable: train-0.tar/a009" in capsys.readouterr().err


def test_run_trains_on_the_chosen_keys_only_when_a_file_lists_them(config, tmp_path):
    keys = [f"a{i:03d}" for i in range(4)] + [f"b{i:03d}" for i in range(4)]
    (tmp_path / "keys.txt").write_text("\n".join(keys))
    config = replace(config, keys_file=tmp_path / "keys.txt", batch_size=4)
    parts = resolve(config)
    assert parts.sampler.rows == 8
    seen = [row for batch in BatchLoader(parts.dataset, parts.sampler) for row in batch.row_ids()]
    assert sorted((row.unit, row.position) for row in seen) == [(unit, i) for unit in (0, 1) for i in range(4)]


def test_run_uses_the_first_views_only_when_limited(config):
    parts = resolve(changed(config, num_views=1))
    parts.sampler.set_epoch(1)
    assert {row.view for batch in parts.sampler for row in batch} == {0}


def test_student_sees_images_normalised_like_the_teachers_when_fed_from_a_store(config):
    running = Run(resolve(config))
    batch = next(iter(BatchLoader(running.plan.dataset, running.plan.sampler)))
    seen = []
    running.student.model.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    running.student.forward = lambda images: (
        seen.append(images) or type(running.student).forward(running.student, images)
    )
    running.terms(batch)
    info = open_store(shared_world().store).manifest.teacher
    expected = (batch.pixels.numpy() / 255.0 - info.mean) / info.std
    torch.testing.assert_close(seen[0].permute(0, 2, 3, 1).double(), torch.from_numpy(expected), rtol=0, atol=1e-5)


def test_same_seed_gives_the_same_start_when_the_method_differs(config):
    weights = [resolve(replace(config, method=method)).student.state_dict() for method in ("scalekd", "none")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_task_options_change_the_loss_when_set(config):
    config = replace(config, method="none")
    for change, expected in (
        ({}, F.cross_entropy),
        ({"label_smoothing": 0.1}, partial(F.cross_entropy, label_smoothing=0.1)),
        (
            {"task": "bce"},
            lambda logits, labels: (
                F.binary_cross_entropy_with_logits(logits, F.one_hot(labels, 4).float(), reduction="sum") / len(labels)
            ),
        ),
    ):
        run, logits = Run(resolve(replace(config, **change))), []
        batch = next(iter(BatchLoader(run.plan.dataset, run.plan.sampler)))
        run.student.model.get_classifier().register_forward_hook(lambda *a, logits=logits: logits.append(a[2]))
        got = run.terms(batch).weighted["task"]
        torch.testing.assert_close(got, expected(logits[-1], batch.labels), rtol=1e-4, atol=1e-5)


def test_optimizer_options_reach_the_optimizer_when_set(config):
    def groups(**changes):
        asked = replace(config, optim=replace(config.optim, **changes))
        return Run(resolve(asked)).optimizer

    adamw = groups()
    assert isinstance(adamw, torch.optim.AdamW)
    decays = {group["weight_decay"]: sum(p.numel() for p in group["params"]) for group in adamw.param_groups}
    assert decays.keys() == {0.0, 0.05}
    positions = [p for g in adamw.param_groups if g["weight_decay"] == 0 for p in g["params"] if p.ndim == 4]
    assert len(positions) == 4  # of the four projectors
    assert {group["weight_decay"] for group in groups(decay_all=True).param_groups} == {0.05}
    sgd = groups(opt="sgd", momentum=0.7)
    assert isinstance(sgd, torch.optim.SGD)
    assert sgd.param_groups[0]["momentum"] == 0.7


def rates(config: TrainConfig, **changes) -> list[float]:
    asked = replace(config, epochs=10, optim=replace(config.optim, lr=1.0, **changes))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make_scheduler(asked, optimizer, steps_per_epoch=2)
    seen = [optimizer.param_groups[0]["lr"]]
    for step in range(1, 20):
        scheduler.step_update(step)
        seen.append(optimizer.param_groups[0]["lr"])
    return seen


def test_learning_rate_follows_the_schedule_when_set(config):
    cosine = rates(config, min_lr=0.1)
    assert cosine[0] == 1.0
    assert cosine[10] == pytest.approx(0.55)
    assert all(a > b for a, b in pairwise(cosine))
    warm = rates(config, warmup_epochs=2, warmup_lr=0.2)
    assert warm[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    step = rates(config, sched="step", decay_epochs=3, decay_rate=0.1)
    assert [step[0], step[5], step[6], step[12], step[18]] == pytest.approx([1, 1, 0.1, 0.01, 0.001])


def test_gradients_are_clipped_when_asked(config):
    moved = {}
    for clip in (None, 1e-3):
        asked = replace(config, optim=OptimConfig(opt="momentum", lr=1.0, weight_decay=0, momentum=0, clip_grad=clip))
        running = Run(resolve(asked))
        before = [p.detach().clone() for p in running.module.parameters()]
        running.step([next(iter(BatchLoader(running.plan.dataset, running.plan.sampler)))])
        after = running.module.parameters()
        moved[clip] = torch.sqrt(sum((a - b).square().sum() for a, b in zip(after, before, strict=True))).item()
    assert moved[1e-3] == pytest.approx(1e-3, rel=0.01)
    assert moved[None] > 0.1


@pytest.mark.parametrize("callbacks", [[], [ReadsAtEpochEnds()]])
def test_run_stops_and_names_the_rows_when_the_loss_is_not_finite(config, monkeypatch, callbacks):
    """The checkpoint there is stays."""
    outputs, calls = StoreSide.outputs, []

    def broken(self, batch, pixels, needs):
        (output,) = outputs(self, batch, pixels, needs)
        calls.append(batch.row_ids()[0])
        if len(calls) == 5:
            output.taps["stage4"][2, 0, 0] = float("nan")
        return (output,)

    monkeypatch.setattr(StoreSide, "outputs", broken)
    with pytest.raises(UserError) as raised:
        train(replace(config, log_every=100), callbacks=callbacks)
    row = calls[4]
    assert re.search(
        rf"not finite at step 4 \(epoch 1\): task [\d.]+, stage3_original nan.*first rows of the batch: "
        rf"unit {row.unit} position {row.position} view {row.view}, .*lower --optim.lr",
        str(raised.value),
    )
    assert load_checkpoint(config.run / "last.pt").progress.step == 3


def test_run_ends_with_advice_when_memory_runs_out(config):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    told = r"memory is full: CUDA out of memory. Tried .*larger --accumulate"
    with before_updates(full), pytest.raises(ResourceError, match=told):
        train(config)


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # of Python 3.12 and later
def test_run_ends_with_advice_when_a_worker_is_killed(config, monkeypatch):
    pixels, main_process = StoredViews.pixels, os.getpid()

    def killed(self, row, sample):
        if os.getpid() != main_process:
            os.kill(os.getpid(), signal.SIGKILL)
        return pixels(self, row, sample)

    monkeypatch.setattr(StoredViews, "pixels", killed)
    with pytest.raises(ResourceError, match=r"makes batches died: .* fewer --workers .* continues with --resume"):
        train(replace(config, workers=1, start_method="fork"))
    assert train(replace(config, workers=0, resume=True)).steps == 6


def test_validation_runs_every_few_epochs_and_last_when_asked(config):
    train(replace(config, method="none", epochs=4, val_every=3))
    assert ["val" in line for line in lines(config, "epoch")] == [False, False, True, True]


def test_best_checkpoint_is_the_first_of_equals_when_accuracy_stays(config):
    tiny = OptimConfig(opt="sgd", lr=1e-12)
    config = replace(config, student="test_vit", student_kwargs={"depth": 4}, method="none", optim=tiny)
    first = train(replace(config, epochs=1))
    kept = (config.run / "best.safetensors").stat()
    result = train(replace(config, epochs=2, resume=True))
    assert [line["val"]["top1"] for line in result.history] == [first.best_top1] * 2
    after = (config.run / "best.safetensors").stat()
    assert (after.st_ino, after.st_mtime_ns) == (kept.st_ino, kept.st_mtime_ns)


def test_validation_counts_unreadable_images_when_there_are_some(config, tmp_path):
    content = samples(6, seed=9, prefix="w")
    content[2]["png"] = b"junk"
    result = train(replace(config, method="none", epochs=1, val_tars=(write_tar(tmp_path / "val.tar", content),)))
    assert result.history[0]["val"]["samples"] == 5
    assert result.history[0]["val"]["unreadable"][0].startswith("val.tar/w002: not an image")


def test_validation_holds_no_more_images_at_once_than_a_training_pass(config):
    training, validating = [], []

    def count(module: torch.nn.Module, inputs: tuple) -> None:
        if isinstance(module, torch.nn.Conv2d) and inputs[0].shape[1] == 3:  # the student's first layer
            (training if module.training else validating).append(len(inputs[0]))

    hook = register_module_forward_pre_hook(count)
    try:
        train(replace(config, method="none", epochs=1, accumulate=4))
    finally:
        hook.remove()
    assert set(training) == {2}
    assert validating[-5:] == [2] * 5


def test_run_reads_its_store_from_a_url_when_given_one(config, tmp_path, capsys):
    published = shutil.copytree(shared_world().store, tmp_path / "published")
    open_store(published).write_commit_index()
    arguments = ["--student", config.student, "--tars", *config.tars, "--epochs", "1", "--batch-size", "8"]
    with WebServer(published) as server:
        line = ["train", "--run", str(config.run), *arguments, "--workers", "0", "--store", server.url, "--json"]
        assert main(line) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 3
    local = replace(config, run=config.run.parent / "local", val_tars=(), epochs=1, optim=OptimConfig())
    train(local)
    assert [line["loss"] for line in lines(config, "epoch")] == [line["loss"] for line in lines(local, "epoch")]


def test_run_folder_says_what_it_was_made_from_when_started(config):
    train(replace(config, method="none", epochs=1, report=True))
    saved = json.loads((config.run / "config.json").read_text())
    assert saved["config"]["student"] == "test_resnet"
    assert saved["inputs"]["store"] == open_store(shared_world().store).manifest.identity()
    assert saved["plan"]["store_fingerprint"] == open_store(shared_world().store).manifest.fingerprint()
    assert saved["inputs"]["tars"]["train-0.tar"] == Tar.open(config.tars[0]).header_sha256
    assert saved["plan"]["num_classes"] == 4
    assert saved["software"]["torch"] == torch.__version__.split("+")[0]
    files = {"config.json", "metrics.jsonl", "progress.json", "last.pt", "best.safetensors", "report.html"}
    assert {path.name for path in config.run.iterdir()} == files


def test_evaluation_repeats_the_runs_accuracy_when_run_again(config):
    result = train(replace(config, method="kd", epochs=3))
    accuracy = evaluate(EvaluateConfig(run=config.run, tars=config.val_tars, workers=0))
    assert accuracy.accuracy.top1 == result.best_top1
    last = evaluate(EvaluateConfig(checkpoint=config.run / "last.pt", tars=config.val_tars, workers=0))
    assert last.accuracy.top1 == result.last_top1


def test_commands_train_evaluate_and_export_when_called_in_turn(config, tmp_path, capsys):
    run, out = str(config.run), str(tmp_path / "out")
    common = ["--student", "test_resnet", "--store", str(shared_world().store), "--tars", *config.tars]
    assert main(["train", "--run", run, *common, "--val-tars", *config.val_tars, "--epochs", "1", "--batch-size", "8",
                 "--workers", "0", "--json", "--no-progress"]) == 0  # fmt: skip
    captured = capsys.readouterr()
    assert captured.err == ""
    result = json.loads(captured.out)
    assert result["steps"] == 3
    assert main(["evaluate", "--run", run, "--tars", *config.val_tars, "--workers", "0", "--json"]) == 0
    evaluation = json.loads(capsys.readouterr().out)
    assert evaluation["top1"] == result["best_top1"]
    assert (len(evaluation["per_class"]), sum(evaluation["class_samples"])) == (4, 10)
    assert min(evaluation[name] for name in ("flops", "images_per_second", "forward_images_per_second")) > 0
    assert main(["evaluate", "--run", run, "--tars", *config.val_tars, "--workers", "0"]) == 0
    printed = capsys.readouterr().out
    assert f"{result['best_top1']:.2f} %" in printed
    assert "lowest top-1, 4 of 4 classes" in printed
    assert main(["export", "--run", run, "--out", out]) == 0
    assert capsys.readouterr().out.split() == [f"{out}/config.json", f"{out}/model.safetensors"]
    exported = timm.create_model("test_resnet", checkpoint_path=f"{out}/model.safetensors", num_classes=4)
    best = load_file(config.run / "best.safetensors")
    assert all(torch.equal(best[name], value) for name, value in exported.state_dict().items())


def test_command_prints_one_line_and_exits_2_when_something_is_wrong(config, capsys):
    arguments = ["--run", str(config.run), "--student", "test_resnet", "--tars", *config.tars, "--num-classes", "4"]
    assert main(["train", *arguments]) == 2
    assert capsys.readouterr().err.startswith("student-trainer: error: --method scalekd needs teacher features")
    assert not config.run.exists()


def test_run_ends_when_no_image_of_a_batch_can_be_read(config, tmp_path):
    content = samples(6, seed=1)
    for sample in content[1:]:  # a tar without a readable one is refused before it is trained on
        sample["png"] = b"junk"
    tars = (write_tar(tmp_path / "bad.tar", content),)
    with pytest.raises(InputError, match=r"no image of a batch can be read: bad.tar/s00\d: not an image"):
        train(
            changed(
                config, method="none", store=None, tars=tars, batch_size=1, num_classes=4, views=ViewsConfig(size=SIZE)
            )
        )
