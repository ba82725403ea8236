"""Training and evaluation take folders and parquet files as they take tars, with a store of them and without."""

import json
from pathlib import Path

import pytest
from image_folders import CLASSES, class_samples, write_class_tars, write_folder, write_parquet
from tiny_jobs import TinyTeacher

from student_trainer.cli import main as trainer_main
from student_trainer.engine.metrics import read_metrics
from teacher_service.cli import main as teacher_main

COUNT = 12


def _cache(teacher: TinyTeacher, store: Path, *arguments: str) -> Path:
    given = [*teacher.arguments, "--checkpoint", str(teacher.checkpoint), "--store", str(store), "--tap-codec", "f16"]
    assert teacher_main(["cache", *arguments, *given, "--workers", "0", "--batch-size", "4", "--policy", "a2"]) == 0
    return store


def _train(run: Path, *arguments: str) -> int:
    return trainer_main(
        ["train", "--run", str(run), "--student", "test_resnet", "--epochs", "1", "--device", "cpu", "--workers", "0",
         "--batch-size", "4", "--log-every", "1", "--no-report", "--no-progress", "--val-every", "1", *arguments]
    )  # fmt: skip


def _lines(run: Path, kind: str) -> list[dict]:
    return [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == kind]


def _evaluated(capsys: pytest.CaptureFixture[str], run: Path, *arguments: str) -> dict:
    capsys.readouterr()
    assert trainer_main(["evaluate", "--run", str(run), "--device", "cpu", "--workers", "0", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def _error(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.splitlines()[-1]


def test_stores_of_a_folder_parquet_and_tars_of_the_same_images_give_equal_losses(
    tmp_path: Path, tiny_swin: TinyTeacher, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = class_samples(COUNT)
    folder, tars = write_folder(tmp_path / "tree", samples), write_class_tars(tmp_path / "tars", samples, 5)
    of_folder = _cache(tiny_swin, tmp_path / "of-folder", str(folder), "--unit-samples", "5", "--shuffle-seed", "3")
    of_tars = _cache(tiny_swin, tmp_path / "of-tars", *tars)
    moved, whole = folder.rename(tmp_path / "moved"), ("--method", "fd", "--batch-size", str(COUNT), "--task", "bce")

    given = ("--tars", str(moved), "--val-tars", str(moved))
    assert _train(tmp_path / "folder", "--store", str(of_folder), *given, *whole) == 0
    assert _train(tmp_path / "tar", "--store", str(of_tars), "--tars", *tars, "--val-tars", *tars, *whole) == 0

    (step,), (other,) = _lines(tmp_path / "folder", "step"), _lines(tmp_path / "tar", "step")
    assert step["raw"] == pytest.approx(other["raw"], rel=1e-4)  # one batch of all samples, in another order
    assert [line["val"]["samples"] for line in _lines(tmp_path / "folder", "epoch")] == [COUNT]
    assert _lines(tmp_path / "folder", "start")[0]["labelled"] == COUNT
    found = _evaluated(capsys, tmp_path / "folder", "--tars", str(moved))
    parquet = write_parquet(tmp_path / "data" / "val.parquet", samples)
    assert _evaluated(capsys, tmp_path / "folder", "--tars", str(parquet))["class_samples"] == found["class_samples"]
    assert _evaluated(capsys, tmp_path / "folder", "--tars", *tars)["top1"] == found["top1"]


def test_parquet_is_trained_on_when_a_store_was_written_from_it_and_without_one(
    tmp_path: Path, tiny_swin: TinyTeacher
) -> None:
    parquet = write_parquet(tmp_path / "data" / "train.parquet", class_samples(COUNT))
    store = _cache(tiny_swin, tmp_path / "store", str(parquet), "--unit-samples", "5")
    given = ("--tars", str(parquet.parent), "--val-tars", str(parquet))

    assert _train(tmp_path / "kd", "--store", str(store), *given, "--method", "kd") == 0
    drawn = ("--method", "none", "--views.size", "32", "--unit-samples", "5")
    assert _train(tmp_path / "none", *given, *drawn) == 0  # as many classes as the schema names
    assert _train(tmp_path / "none", *given, *drawn, "--resume") == 0

    assert [len(_lines(tmp_path / run, "step")) for run in ("kd", "none")] == [3, 3]
    assert json.loads((tmp_path / "none" / "config.json").read_text())["plan"]["num_classes"] == len(CLASSES)


def test_classes_of_validation_are_those_of_training_when_its_folder_lacks_some(
    tmp_path: Path, tiny_swin: TinyTeacher, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = class_samples(COUNT)
    folder, tars = write_folder(tmp_path / "tree", samples), write_class_tars(tmp_path / "tars", samples, COUNT)
    some = write_folder(tmp_path / "some", [each for each in samples if each["cls"] in (b"1", b"3")])
    store = _cache(tiny_swin, tmp_path / "store", str(folder), "--unit-samples", "5")
    run, names = tmp_path / "run", tmp_path / "classes.txt"
    names.write_text("\n".join(CLASSES))

    given = ("--store", str(store), "--tars", str(folder), "--val-tars", str(some), "--method", "kd")
    assert _train(run, *given) == 0
    assert _lines(run, "epoch")[0]["val"]["samples"] == 6
    assert _evaluated(capsys, run, "--tars", str(some))["class_samples"] == [0, 3, 0, 3]
    assert _evaluated(capsys, run, "--tars", str(some), "--classes", str(names))["class_samples"] == [0, 3, 0, 3]
    plain = ("--tars", *tars, "--val-tars", str(some), "--method", "none", "--views.size", "32", "--num-classes", "4")
    assert _train(tmp_path / "plain", *plain) == 2
    assert "--val-tars: the tree has 2 class folders, expected the student's 4" in _error(capsys)
    assert _train(tmp_path / "plain", *plain, "--classes", str(names)) == 0
    assert _evaluated(capsys, tmp_path / "plain", "--tars", str(some))["class_samples"] == [0, 3, 0, 3]
    assert _train(tmp_path / "unnamed", *plain[:2], *plain[4:]) == 0
    assert trainer_main(["evaluate", "--run", str(tmp_path / "unnamed"), "--tars", str(some), "--workers", "0"]) == 2
    assert "--tars: the tree has 2 class folders, expected the student's 4" in _error(capsys)


def test_order_of_the_classes_stays_with_the_student_when_it_is_not_that_of_the_folders(
    tmp_path: Path, tiny_swin: TinyTeacher, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = class_samples(COUNT)[:-1]  # so that the classes have different numbers of samples
    folder = write_folder(tmp_path / "tree", samples)
    turned, ordered = tmp_path / "turned.txt", tmp_path / "ordered.txt"
    turned.write_text("\n".join(CLASSES[::-1]))
    ordered.write_text("\n".join(CLASSES))
    store = _cache(tiny_swin, tmp_path / "store", str(folder), "--unit-samples", "5", "--classes", str(turned))
    given = ("--store", str(store), "--tars", str(folder), "--val-tars", str(folder), "--method", "kd")
    run, refused = tmp_path / "run", "--classes has 'ant' as class 0, expected 'dog' as in"

    assert _train(run, *given) == 0
    found = _evaluated(capsys, run, "--tars", str(folder))
    assert found["class_samples"] == [2, 3, 3, 3]
    assert found["top1"] == _lines(run, "epoch")[-1]["val"]["top1"]
    parquet = write_parquet(tmp_path / "val.parquet", samples)  # whose schema has the names in another order
    assert _evaluated(capsys, run, "--tars", str(parquet))["top1"] == found["top1"]
    (run / "best.safetensors").unlink()
    assert _evaluated(capsys, run, "--tars", str(folder))["class_samples"] == [2, 3, 3, 3]
    evaluation = ["evaluate", "--run", str(run), "--tars", str(folder), "--classes", str(ordered)]
    assert trainer_main(evaluation) == 2
    assert f"{refused} the training of" in _error(capsys)
    ordered.write_text("Dog\nCat")  # other names of some classes, in no known order
    assert trainer_main(evaluation) == 2
    assert "--classes has 'Dog' as class 0, expected 'dog'" in _error(capsys)
    ordered.write_text("\n".join(CLASSES))
    assert _train(tmp_path / "other", *given, "--classes", str(ordered)) == 2
    assert f"{refused} the training images" in _error(capsys)


def test_run_is_not_resumed_when_the_order_of_its_class_names_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = [{**each, "cls": CLASSES[int(each["cls"])].encode()} for each in class_samples(COUNT)]
    tars, names = write_class_tars(tmp_path / "tars", samples, COUNT), tmp_path / "classes.txt"
    names.write_text("\n".join(CLASSES))
    given = ("--tars", *tars, "--classes", str(names), "--method", "none", "--views.size", "32")

    assert _train(tmp_path / "run", *given) == 0
    names.write_text("\n".join(CLASSES[::-1]))
    assert _train(tmp_path / "run", *given, "--resume") == 2
    assert "inputs.classes" in _error(capsys)


def test_logits_are_not_compared_when_the_images_have_some_of_the_teachers_classes(
    tmp_path: Path, tiny_swin: TinyTeacher, capsys: pytest.CaptureFixture[str]
) -> None:
    some = write_folder(tmp_path / "some", [each for each in class_samples(COUNT) if each["cls"] in (b"1", b"3")])
    store = _cache(tiny_swin, tmp_path / "store", str(some), "--unit-samples", "5")
    given = ("--store", str(store), "--tars", str(some))

    assert _train(tmp_path / "kd", *given, "--method", "kd") == 2
    assert "the images have 2 classes, expected the teacher's 4" in _error(capsys)
    assert _train(tmp_path / "fd", *given, "--method", "fd") == 0


def test_validation_is_refused_when_its_labels_may_be_names_or_indexes(
    tmp_path: Path, tiny_swin: TinyTeacher, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = class_samples(COUNT)
    from_one = [{**each, "__key__": f"{int(each['cls']) + 1}/{each['__key__'][-4:]}"} for each in samples]
    folder, tars = write_folder(tmp_path / "tree", from_one), write_class_tars(tmp_path / "tars", samples, COUNT)
    store = _cache(tiny_swin, tmp_path / "store", str(folder), "--unit-samples", "5")
    given = ("--store", str(store), "--tars", str(folder), "--method", "kd")

    assert _train(tmp_path / "run", *given, "--val-tars", *tars) == 2
    assert "may be a class name or a class index: class '1' has the index 0" in _error(capsys)
    assert _train(tmp_path / "run", *given, "--val-tars", str(folder)) == 0
