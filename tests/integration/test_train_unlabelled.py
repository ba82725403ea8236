"""Training on samples of which some have no label."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from image_folders import class_samples, write_class_tars, write_folder
from process_runs import run_group
from tiny_jobs import TinyTeacher
from training_world import SIZE, samples, train_config, write_tar

from feature_store.errors import InputError
from student_trainer.config import OptimConfig, TrainConfig
from student_trainer.engine.checkpoint import load_checkpoint
from student_trainer.engine.metrics import read_metrics
from student_trainer.plan import resolve
from student_trainer.teachers.config import ViewsConfig
from student_trainer.train import train
from teacher_service.cli import main as teacher_main

LABELLED = 5


def _some_labels(content: list[dict]) -> list[dict]:
    """The samples with the labels of the first few only."""
    return [{k: v for k, v in sample.items() if k != "cls" or at < LABELLED} for at, sample in enumerate(content)]


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """A run without BatchNorm, with plain SGD: micro-batches of one batch add up."""
    tar = write_tar(tmp_path / "train.tar", _some_labels(samples(16, seed=1)))
    return train_config(
        tmp_path / "run", tars=(tar,), labels="optional", store=None, method="none", num_classes=4, epochs=2,
        views=ViewsConfig(size=SIZE), student="test_vit", student_kwargs={"depth": 4}, device="cpu",
        optim=OptimConfig(opt="momentum", lr=1e-2),
    )  # fmt: skip


def _cached(folder: Path, teacher: TinyTeacher, tars: list[str], *options: str) -> TrainConfig:
    """A run from a store of these tars, whose labels are optional."""
    given = [*teacher.arguments, "--checkpoint", str(teacher.checkpoint), "--workers", "0", "--batch-size", "4"]
    store = folder / "store"
    assert teacher_main(["cache", *tars, *given, "--store", str(store), "--labels", "optional", *options]) == 0
    return train_config(folder / "run", tars=tuple(tars), store=store, batch_size=4)


def _lines(config: TrainConfig, kind: str) -> list[dict]:
    return [line for line in read_metrics(config.run / "metrics.jsonl") if line["kind"] == kind]


def test_step_takes_the_mean_over_labelled_samples_when_its_batch_is_split(config, tmp_path):
    split = replace(config, run=tmp_path / "split", accumulate=4)
    shared = replace(config, run=tmp_path / "shared", accumulate=2)
    train(config)
    train(split)
    run_group(shared, 2)

    weights = load_checkpoint(config.run / "last.pt").weights
    for other in (split, shared):
        for step, expected in zip(_lines(other, "step"), _lines(config, "step"), strict=True):
            assert step["raw"]["task"] == pytest.approx(expected["raw"]["task"], rel=1e-4)
        for name, leaf in load_checkpoint(other.run / "last.pt").weights.items():
            torch.testing.assert_close(leaf, weights[name], rtol=1e-4, atol=1e-5)
    (start,) = _lines(shared, "start")
    assert (start["samples"], start["labelled"]) == (16, LABELLED)
    assert "16 samples (5 labelled) from 1 units" in resolve(config).sentence()


@pytest.mark.parametrize("method", ["scalekd", "kd"])
def test_unlabelled_samples_are_learned_from_when_a_store_has_their_features(
    tmp_path: Path, tiny_swin: TinyTeacher, method: str
) -> None:
    tars = write_class_tars(tmp_path / "tars", _some_labels(class_samples(12)), 6)
    cached = _cached(tmp_path, tiny_swin, tars, "--views-out", str(tmp_path / "views"))
    config = replace(cached, method=method, student="test_vit")
    materialised = replace(config, run=tmp_path / "views-run", tars=(), views_from=str(tmp_path / "views"))
    train(config)
    train(materialised)

    assert _lines(config, "start")[0]["labelled"] == LABELLED
    steps = _lines(config, "step")
    assert all(line["raw"]["kd"] > 0 for line in steps)
    assert [line["raw"] for line in _lines(materialised, "step")] == [line["raw"] for line in steps]


def test_all_terms_but_the_tasks_remain_when_no_sample_has_a_label(tmp_path: Path, tiny_swin: TinyTeacher) -> None:
    folder = write_folder(tmp_path / "tree", class_samples(8))
    cached = replace(_cached(tmp_path, tiny_swin, [str(folder)], "--labels", "none"), method="scalekd")
    train(replace(cached, student="test_vit"))

    steps = _lines(cached, "step")
    assert [line["raw"]["task"] for line in steps] == [0, 0]
    assert all(line["raw"]["stage4_original"] > 0 for line in steps)
    assert json.loads((cached.run / "config.json").read_text())["plan"]["labelled"] == 0


def test_methods_that_need_labels_are_refused_by_name_when_some_are_missing(
    tmp_path: Path, tiny_swin: TinyTeacher
) -> None:
    tars = write_class_tars(tmp_path / "tars", _some_labels(class_samples(12)), 6)
    config = replace(_cached(tmp_path, tiny_swin, tars), method="nkd")
    with pytest.raises(InputError, match=r"^--method nkd needs the label of every sample, but 7 of 12 have none; "):
        train(config)
    keys = tmp_path / "keys.txt"
    keys.write_text("".join(f"{sample['__key__']}\n" for sample in class_samples(LABELLED)))
    assert train(replace(config, keys_file=keys)).steps == 1  # only labelled ones

    keys.write_text("".join(f"{sample['__key__']}\n" for sample in class_samples(12)[LABELLED:]))
    with pytest.raises(InputError, match=r"^--method none learns from labels alone, but none of 7 samples has one; "):
        train(replace(config, method="none", keys_file=keys))


def test_validation_leaves_out_samples_without_labels_and_needs_one(config, tmp_path):
    few = write_tar(tmp_path / "few.tar", _some_labels(samples(8, seed=3, prefix="v")))
    none = write_tar(tmp_path / "none.tar", [{k: v for k, v in s.items() if k != "cls"} for s in samples(4, seed=4)])
    train(replace(config, val_tars=(few,), epochs=1))
    (epoch,) = _lines(config, "epoch")
    assert epoch["val"]["samples"] == LABELLED
    assert [line.partition(":")[0] for line in epoch["val"]["unreadable"]] == [f"few.tar/v{at:03}" for at in (5, 6, 7)]
    with pytest.raises(InputError, match=r"none of the 4 samples of 1 tars can be used; .* no label"):
        train(replace(config, run=tmp_path / "other", val_tars=(none,)))
