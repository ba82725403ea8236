"""Cached and live features are interchangeable: the contract, the same losses, and the same first training steps."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conformance import FeatureSourceConformance
from training_world import FAMILIES, World, shared_world, train_config

from feature_store.errors import QuarantinedError, UncommittedError
from feature_store.format.addressing import RowId
from feature_store.inputs.tar import open_tars
from feature_store.store import open_store
from feature_store.teacher.model import Teacher, load_teacher
from student_trainer.config import OptimConfig, TrainConfig
from student_trainer.data.batch import ViewDataset, match_tars
from student_trainer.data.loader import BatchLoader
from student_trainer.data.replayed import StoredViews
from student_trainer.engine.metrics import read_metrics
from student_trainer.plan import resolve
from student_trainer.teachers.config import LiveOptions
from student_trainer.train import Run, train


@pytest.fixture
def world() -> World:
    return shared_world("vit")


@pytest.fixture
def store(world):
    return open_store(world.store)


@pytest.fixture
def teacher(world) -> Teacher:
    name, kwargs = world.teacher
    return load_teacher(name, checkpoint=world.checkpoint, model_kwargs=kwargs)


@pytest.fixture
def dataset(world, store) -> ViewDataset:
    return ViewDataset(match_tars(store, open_tars(world.tars)), StoredViews(store))


@pytest.fixture
def views(dataset):
    return lambda rows: dataset[rows].pixels.numpy()


class TestZarrSource(FeatureSourceConformance):
    relative_error = 2.0**-10  # float16 taps

    @pytest.fixture
    def source(self, store):
        return store.source()

    def test_read_is_refused_when_a_row_is_not_committed_or_quarantined(self, source):
        with pytest.raises(UncommittedError):
            source.read([RowId(0, 0, 2)])
        with pytest.raises(QuarantinedError):
            source.read([RowId(0, 9, 0)])


def test_seconds_grow_when_the_teacher_runs(tmp_path, world):
    live = trainer(world, tmp_path, "live")
    batch = first_batch(live)
    assert live.plan.teacher.seconds == 0.0
    live.terms(batch)
    once = live.plan.teacher.seconds
    live.terms(batch)
    assert 0 < once < live.plan.teacher.seconds


def config(world: World, tmp_path: Path, source: str, **changes) -> TrainConfig:
    teacher = LiveOptions(checkpoint=world.checkpoint) if source == "live" else LiveOptions()
    asked = {"source": source, "teacher": teacher, "epochs": 4, **changes}
    return train_config(tmp_path / source, world, **asked)


def trainer(world: World, tmp_path: Path, source: str, **changes) -> Run:
    asked = config(world, tmp_path, source, **changes)
    return Run(resolve(asked))


def first_batch(of: Run):
    return next(iter(BatchLoader(of.plan.dataset, of.plan.sampler)))


def relative_difference(a: dict[str, float], b: dict[str, float]) -> float:
    assert a.keys() == b.keys()
    return max(abs(a[name] - b[name]) / abs(b[name]) for name in a)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("codec", "limit"), [("f16", 2e-3), ("f32", 1e-4)])
@pytest.mark.parametrize("method", ["scalekd", "fd", "kd"])
def test_loss_terms_agree_when_rows_are_store_fed_and_live_fed(tmp_path, family, codec, limit, method):
    world = shared_world(family, codec)
    cached, live = (trainer(world, tmp_path, source, method=method) for source in ("store", "live"))
    batches = first_batch(cached), first_batch(live)
    assert torch.equal(batches[0].pixels, batches[1].pixels)
    terms = [
        {name: term.item() for name, term in of.terms(batch).weighted.items()}
        for of, batch in zip((cached, live), batches, strict=True)
    ]
    assert relative_difference(*terms) <= limit
    if method == "scalekd":
        assert terms[0].keys() == {
            "task", "stage3_original", "stage3_alternative", "stage4_original", "stage4_alternative", "kd",
        }  # fmt: skip


def test_parity_check_sees_a_wrong_teacher_when_features_are_anothers(tmp_path):
    world = shared_world("vit", "f32")
    cached = trainer(world, tmp_path, "store")
    batch = first_batch(cached)
    right = {name: term.item() for name, term in cached.terms(batch).weighted.items()}
    (raw,) = batch.features
    flipped = {tap: {"": parts[""].flip(0)} for tap, parts in raw.taps.items()}
    wrong = batch._replace(features=(raw._replace(taps=flipped),))
    other = {name: term.item() for name, term in cached.terms(wrong).weighted.items()}
    assert relative_difference(other, right) > 2e-3


def test_ten_steps_stay_together_when_store_fed_and_live_fed(tmp_path):
    world = shared_world("vit", "f16")
    totals = {}
    for source in ("store", "live"):
        optim = OptimConfig("momentum", lr=2e-3)  # large steps, or Adam's, would make more of what float16 rounds away
        running = train(config(world, tmp_path, source, optim=optim))
        lines = [line for line in read_metrics(running.run / "metrics.jsonl") if line["kind"] == "step"]
        assert len(lines) >= 10
        totals[source] = np.array([line["loss"]["total"] for line in lines[:10]])
    assert np.abs(totals["store"] / totals["live"] - 1).max() <= 1e-2
    assert abs(totals["store"][9] / totals["store"][0] - 1) > 0.05  # the steps did move


def test_training_never_builds_the_teacher_when_fed_from_a_store(tmp_path, world, monkeypatch):
    monkeypatch.setattr("student_trainer.teachers.live.load_teacher", None)
    monkeypatch.setattr("feature_store.teacher.model.Teacher.forward", None)
    running = trainer(world, tmp_path, "store")
    running.step([first_batch(running)])
    later_blocks = running.method.perception.later_blocks
    held = sum(parameter.numel() for parameter in later_blocks.parameters())
    name, kwargs = world.teacher
    whole = sum(p.numel() for p in load_teacher(name, checkpoint=world.checkpoint, model_kwargs=kwargs).parameters())
    assert later_blocks.info.depth == 1  # of 6 blocks
    assert held < whole / 3
    assert not any("later_blocks" in name for name in running.method.state_dict())
