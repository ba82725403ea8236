"""Options between a loss and new weights: accumulation, moving average, autocast, compilation, idle terms."""

from dataclasses import replace
from functools import partial

import pytest
import timm
import torch
from safetensors.torch import load_file
from stopped_runs import before_updates, killed_at_update
from training_world import shared_world, train_config

from feature_store.errors import InputError
from student_trainer.config import OptimConfig, TrainConfig
from student_trainer.data.loader import BatchLoader
from student_trainer.engine.checkpoint import load_checkpoint
from student_trainer.engine.metrics import read_metrics
from student_trainer.evaluate import EvaluateConfig, evaluate
from student_trainer.export import ExportConfig, export
from student_trainer.methods import ScaleKD, ScaleKDConfig, StudentShape, TeacherShape
from student_trainer.plan import resolve
from student_trainer.train import Run, train


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    """A run without BatchNorm, so that a batch may be split."""
    return train_config(
        tmp_path / "run",
        student="test_vit",
        student_kwargs={"depth": 4},
        batch_size=12,
        scalekd=ScaleKDConfig(norm="layer"),
        optim=OptimConfig(lr=1e-3, clip_grad=1.0),
    )


def running(config: TrainConfig) -> Run:
    return Run(resolve(config))


def first_batch(trainer: Run):
    return next(iter(BatchLoader(trainer.plan.dataset, trainer.plan.sampler)))


def totals(config: TrainConfig) -> list[float]:
    train(config)
    return [line["loss"]["total"] for line in read_metrics(config.run / "metrics.jsonl") if line["kind"] == "step"]


@pytest.mark.parametrize("pieces", [2, 3])
def test_accumulated_steps_equal_whole_ones_when_there_is_no_batchnorm(config, tmp_path, pieces):
    whole = totals(config)
    split = totals(replace(config, run=tmp_path / "split", accumulate=pieces))
    assert len(whole) == len(split) == 2
    assert split == pytest.approx(whole, rel=1e-4)


def test_accumulated_gradients_are_the_whole_batchs_when_there_is_no_batchnorm(config):
    gradients = []
    for pieces in (1, 4):
        trainer = running(replace(config, accumulate=pieces))
        loader = iter(BatchLoader(trainer.plan.dataset, trainer.plan.sampler))
        for _ in range(pieces):
            (trainer.terms(next(loader)).total / pieces).backward()
        gradients.append([p.grad for p in trainer.module.parameters()])
    for whole, split in zip(*gradients, strict=True):
        assert (whole - split).abs().max() <= 1e-3 * whole.abs().max()


def test_batch_size_is_refused_when_it_cannot_be_split(config):
    with pytest.raises(InputError, match="--accumulate is 5, expected a divisor of --batch-size 12"):
        replace(config, accumulate=5)


def test_average_follows_the_students_weights_when_kept(config):
    name = "head.weight"
    train(replace(config, ema_decay=0.75, checkpoint_every=1))
    whole = load_checkpoint(config.run / "last.pt")
    first = replace(config, ema_decay=0.75, checkpoint_every=1, run=config.run.with_name("first"))
    with killed_at_update(2):
        train(first)
    before, after = load_checkpoint(first.run / "last.pt").weights[name], whole.weights[name]
    # it starts at the first step's weights
    torch.testing.assert_close(whole.ema[name], 0.75 * before + 0.25 * after, rtol=1e-5, atol=1e-6)
    assert (whole.ema[name] - after).abs().max() > 1e-5


def test_raw_weights_are_validated_and_exported_when_the_average_is_only_kept(config, tmp_path):
    world = shared_world()
    config = replace(config, val_tars=world.val_tars, ema_decay=0.5, ema_eval=False, epochs=1)
    result = train(config)
    saved = load_checkpoint(config.run / "last.pt")
    assert not torch.equal(saved.ema["head.weight"], saved.weights["head.weight"])
    last = EvaluateConfig(checkpoint=config.run / "last.pt", tars=world.val_tars, workers=0)
    assert evaluate(last).accuracy.top1 == result.last_top1
    export(ExportConfig(run=config.run / "last.pt", out=tmp_path / "out"))
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(exported["head.weight"], saved.weights["head.weight"])


def test_average_is_validated_exported_and_resumed_when_kept(config, tmp_path):
    world = shared_world()
    config = replace(
        config, student_kwargs={"depth": 4, "drop_path_rate": 0.3}, val_tars=world.val_tars, ema_decay=0.5, epochs=2
    )
    train(replace(config, run=tmp_path / "whole"))
    with killed_at_update(4):
        train(config)
    result = train(replace(config, resume=True))
    mine, whole = load_checkpoint(config.run / "last.pt"), load_checkpoint(tmp_path / "whole" / "last.pt")
    for got, expected in ((mine.ema, whole.ema), (mine.weights, whole.weights)):
        assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert not torch.equal(mine.ema["head.weight"], mine.weights["head.weight"])
    last = EvaluateConfig(checkpoint=config.run / "last.pt", tars=world.val_tars, workers=0)
    assert evaluate(last).accuracy.top1 == result.last_top1
    export(ExportConfig(run=config.run / "last.pt", out=tmp_path / "out"))
    exported = timm.create_model(
        "test_vit", checkpoint_path=str(tmp_path / "out" / "model.safetensors"), num_classes=4, depth=4, img_size=64
    )
    assert torch.equal(exported.state_dict()["head.weight"], mine.ema["head.weight"])


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_autocast_computes_in_its_type_and_stays_close_to_float32_when_training(config, amp):
    exact, rough = running(config), running(replace(config, amp=amp))
    batch, types = first_batch(exact), []
    rough.student.model.get_classifier().register_forward_hook(lambda *arguments: types.append(arguments[2].dtype))
    expected, got = exact.terms(batch).total.item(), rough.terms(batch).total.item()
    assert types == [getattr(torch, amp)]
    assert got == pytest.approx(expected, rel=0.03)
    assert len(totals(replace(config, amp=amp))) == 2


def test_float16_scales_the_loss_and_skips_the_step_when_gradients_overflow(config):
    trainer = running(replace(config, amp="float16"))
    batch = first_batch(trainer)
    saved = trainer.checkpoint()
    trainer.restore(replace(saved, scaler={**saved.scaler, "scale": 2.0**126}))  # any gradient overflows
    before = [p.detach().clone() for p in trainer.module.parameters()]
    trainer.step([batch])
    after = list(trainer.module.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert trainer.checkpoint().scaler["scale"] == 2.0**125
    assert running(replace(config)).checkpoint().scaler == {}


def test_compiled_run_gives_the_same_losses_when_traced(config, monkeypatch):
    # the eager backend proves that all of student and loss can be traced, without a compiler's minutes
    compiled_modules, compile_module = [], partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", lambda *a, **kw: compiled_modules.append(a) or compile_module(*a, **kw))
    plain, compiled = running(config), running(replace(config, compile=True))
    batch = first_batch(plain)
    expected, got = plain.terms(batch).weighted, compiled.terms(batch).weighted
    for name, term in expected.items():
        torch.testing.assert_close(got[name], term, rtol=1e-4, atol=1e-5)
    assert len(compiled_modules) == 1


def test_deterministic_run_asks_torch_for_it_when_switched_on(config):
    asked = []
    with before_updates(lambda *_: asked.append(torch.are_deterministic_algorithms_enabled())):
        train(replace(config, deterministic=True))
    assert asked == [True, True]
    assert not torch.are_deterministic_algorithms_enabled()


IDLE = [
    {"beta_stage4": 1.0},
    {"beta_stage3": 0.0},
    {"beta_stage3": 1.0, "beta_stage4": 1.0},
    {"alpha_stage3": 0.0},
]


def _terms(run: Run, batch) -> dict[str, torch.Tensor]:
    terms = run.terms(batch)
    return {**terms.weighted, "total": terms.total}


@pytest.mark.parametrize("alphas", IDLE)
def test_idle_terms_change_nothing_when_left_out(config, alphas):
    """The trainer's loss against the released composition, which computes everything."""
    config = replace(config, scalekd=replace(config.scalekd, **alphas))
    lean = running(config)
    whole = running(config)
    batch = first_batch(lean)
    faithful = _released(whole)
    faithful.load_state_dict(lean.method.state_dict(), strict=False)
    whole.module.method = faithful
    terms, expected = _terms(lean, batch), _terms(whole, batch)
    assert terms.keys() < expected.keys()
    assert all(expected[name] == 0 for name in expected.keys() - terms.keys())
    assert terms["total"].item() == pytest.approx(expected["total"].item(), rel=1e-4)
    terms["total"].backward()
    expected["total"].backward()
    for name, leaf in lean.method.named_parameters():
        reference = dict(faithful.named_parameters())[name].grad
        assert (leaf.grad - reference).abs().max() <= 1e-3 * reference.abs().max()
    left = [cap for stage in (lean.method.stage3, lean.method.stage4) for cap in stage]
    assert len(left) == {0: 3, 1: 4, 2: 2, 3: 4}[IDLE.index(alphas)]


def _released(trainer: Run) -> ScaleKD:
    student, later = trainer.student, trainer.method.perception.later_blocks
    shapes = (
        StudentShape(student.dims, student.grids, student.num_classes),
        TeacherShape(later.info, student.num_classes, lambda: later),
    )
    released = replace(trainer.config.scalekd, alpha_stage3=0.14, beta_stage3=0.5, alpha_stage4=0.14, beta_stage4=0.5)
    method = ScaleKD(released, *shapes)
    method.weights = {**dict.fromkeys(method.weights, 0.0), **trainer.method.weights}
    return method


def test_later_blocks_run_twice_and_give_the_same_gradients_when_checkpointed(config):
    results = []
    for checkpointed in (False, True):
        trainer = running(replace(config, scalekd=replace(config.scalekd, checkpoint_later_blocks=checkpointed)))
        runs = []
        trainer.method.perception.later_blocks.blocks[0].register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        total = trainer.terms(first_batch(trainer)).total
        total.backward()
        results.append((len(runs), total.item(), [p.grad for p in trainer.module.parameters()]))
    (once, total, gradients), (twice, same_total, same_gradients) = results
    assert (once, twice) == (1, 2)
    assert total == same_total
    assert all(torch.equal(a, b) for a, b in zip(gradients, same_gradients, strict=True))
