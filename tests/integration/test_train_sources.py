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
    found = _evaluated(capsys, run, "--tars", str(some), "--classes", str(names))
    assert found["class_samples"] == [0, 3, 0, 3]
    assert trainer_main(["evaluate", "--run", str(run), "--tars", str(some), "--workers", "0"]) == 2
    assert "--tars: the tree has 2 class folders, expected the student's 4" in _error(capsys)
    plain = ("--tars", *tars, "--val-tars", str(some), "--method", "none", "--views.size", "32", "--num-classes", "4")
    assert _train(tmp_path / "plain", *plain) == 2
    assert "--val-tars: the tree has 2 class folders, expected the student's 4" in _error(capsys)
    assert _train(tmp_path / "plain", *plain, "--classes", str(names)) == 0


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ("more", (), r"tars\[folder-00000\].header_sha256 differs"),
        ("", ("--tars", "TARS"), "is not what the store was written from, a folder of class folders"),
        ("", ("--labels", "none"), "--labels is none, but the store was written with required; leave it out"),
        ("", ("--unit-samples", "6"), "--unit-samples is 6, but the store was written with 5; leave it out"),
    ],
)
def test_training_is_refused_when_the_store_was_written_from_something_else(
    tmp_path: Path, tiny_swin: TinyTeacher, capsys: pytest.CaptureFixture[str], change: str, options: tuple[str, ...],
    message: str,
) -> None:  # fmt: skip
    samples = class_samples(COUNT)
    folder, (tar,) = write_folder(tmp_path / "tree", samples), write_class_tars(tmp_path / "tars", samples, COUNT)
    store = _cache(tiny_swin, tmp_path / "store", str(folder), "--unit-samples", "5")
    if change:
        (folder / "ant" / "more.png").write_bytes((folder / "ant" / "s000.png").read_bytes())
    tars = ("--tars", str(folder)) if "--tars" not in options else ()
    given = [tar if option == "TARS" else option for option in options]

    assert _train(tmp_path / "run", "--store", str(store), "--method", "kd", *tars, *given) == 2

    error = _error(capsys)
    assert message.replace("\\", "") in error
    assert not (tmp_path / "run").exists()


def test_training_names_the_image_when_it_is_another_than_in_the_store(
    tmp_path: Path, tiny_swin: TinyTeacher, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = class_samples(COUNT)
    folder = write_folder(tmp_path / "tree", samples)
    store = _cache(tiny_swin, tmp_path / "store", str(folder), "--unit-samples", "5")

    (folder / "ant" / "s000.png").write_bytes(b"\0" * len(samples[0]["png"]))

    assert _train(tmp_path / "run", "--store", str(store), "--method", "kd", "--tars", str(folder)) == 2
    assert "sample 'ant/s000'" in (error := _error(capsys))
    assert "was readable when the store was written but is not now" in error


def test_validation_may_be_of_another_kind_than_training(
    tmp_path: Path, tiny_swin: TinyTeacher, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = class_samples(COUNT)
    folder, names = write_folder(tmp_path / "tree", samples), tmp_path / "classes.txt"
    names.write_text("\n".join(CLASSES))
    words = [{"__key__": s["__key__"], "png": s["png"], "txt": CLASSES[int(s["cls"])].encode()} for s in samples]
    indexes = [{"__key__": s["__key__"], "png": s["png"], "txt": s["cls"]} for s in samples]
    drawn = ("--method", "none", "--views.size", "32", "--label-field", "txt", "--val-tars", str(folder))

    of_words, of_indexes = (
        write_class_tars(tmp_path / name, each, COUNT) for name, each in (("w", words), ("i", indexes))
    )
    assert _train(tmp_path / "words", "--tars", *of_words, *drawn, "--classes", str(names)) == 0
    assert _train(tmp_path / "indexes", "--tars", *of_indexes, *drawn, "--num-classes", "4") == 0
    assert [_lines(tmp_path / run, "epoch")[0]["val"]["samples"] for run in ("words", "indexes")] == [COUNT, COUNT]

    store = _cache(tiny_swin, tmp_path / "store", *write_class_tars(tmp_path / "cls", samples, COUNT))
    assert _train(tmp_path / "run", "--store", str(store), "--tars", str(folder), "--method", "kd") == 2
    assert f"--tars {folder} is not what the store was written from, tars: " in _error(capsys)


def test_evaluation_is_refused_when_labels_are_optional(capsys: pytest.CaptureFixture[str]) -> None:
    assert trainer_main(["evaluate", "--run", "run", "--tars", "a.tar", "--labels", "optional"]) == 2
    assert "--labels is optional, expected required: accuracy is counted on labelled samples" in _error(capsys)
