"""The study of benchmarks/study: a miniature of it, and its page made from what is committed."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import pytest
from tiny_jobs import encode_image, write_tar

from benchmarks.performance import write_page
from benchmarks.study.cli import main
from benchmarks.study.questions import QUESTIONS, STORES
from benchmarks.study.report import write_report
from benchmarks.study.results import RESULTS
from benchmarks.study.teacher import TeacherRecipe, train_teacher
from feature_store.errors import InputError
from teacher_service.cache.job import cache
from teacher_service.stopping import Stop

DOCS = Path(__file__).parents[2] / "docs"
CLASSES = 4


def _tar(path: Path, prefix: str, count: int) -> None:
    generator = np.random.default_rng(len(prefix))
    write_tar(
        path,
        (
            {
                "__key__": f"{prefix}{at:03}",
                "jpg": encode_image(generator.integers(0, 256, (32, 32, 3), np.uint8), "JPEG"),
                "cls": str(at % CLASSES).encode(),
                "json": b"{}",
            }
            for at in range(count)
        ),
    )


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """A folder with images, and what the miniature wrote of three questions with one seed."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "data").mkdir()
    for name, prefix, count in (("train-000", "t", 24), ("train-001", "tt", 24), ("val-000", "ttt", 12)):
        _tar(folder / "data" / f"noise-{name}.tar", prefix, count)
    assert main(_arguments(folder)) == 0
    return folder


def _arguments(folder: Path) -> list[str]:
    return [
        "run", "--data", str(folder / "data"), "--out", str(folder / "out"), "--tier", "tiny", "--seeds", "0",
        "--results", str(folder / "results" / "cpu"), "--only", "methods-cnn", "few-labels", "views",
    ]  # fmt: skip


def _result(folder: Path, question: str) -> dict:
    return json.loads((folder / "results" / "cpu" / f"{question}.json").read_text())


def test_every_setting_of_a_question_has_as_many_steps(study):
    steps = {
        run["steps"]
        for question in ("methods-cnn", "views", "few-labels")
        for runs in _result(study, question)["settings"].values()
        for run in runs
    }
    assert steps == {6}  # two epochs of 24 images in batches of 8; three times as many epochs of 8 labelled images


def test_second_call_trains_nothing_when_all_is_finished(study, capsys):
    before = {path: path.read_bytes() for path in (study / "results").rglob("methods-cnn.json")}
    metrics = {path: path.stat().st_mtime_ns for path in (study / "out").rglob("metrics.jsonl")}
    assert main(_arguments(study)) == 0
    assert {path: path.read_bytes() for path in before} == before
    assert {path: path.stat().st_mtime_ns for path in metrics} == metrics


def test_runs_in_processes_of_their_own_know_the_teacher(study):
    arguments = [*_arguments(study)[:-3], "projector", "--processes", "2"]
    subprocess.run([sys.executable, "-m", "benchmarks.study", *arguments], cwd=DOCS.parent, check=True)
    assert {len(runs) for runs in _result(study, "projector")["settings"].values()} == {1}


def test_collected_results_are_those_written_at_the_end_of_each_question(study, tmp_path):
    data, out = str(study / "data"), str(study / "out")
    assert main(["collect", "--data", data, "--out", out, "--tier", "tiny", "--results", str(tmp_path)]) == 0
    for written in (study / "results" / "cpu").glob("*.json"):
        assert (tmp_path / written.name).read_bytes() == written.read_bytes()


def test_results_of_earlier_runs_stay_beside_new_ones(study, tmp_path):
    made = {"stores": {"earlier": {"spec": {}}}, "teachers": {}, "spectra": {}}
    (tmp_path / "made.json").write_text(json.dumps(made))
    data, out = str(study / "data"), str(study / "out")
    assert main(["collect", "--data", data, "--out", out, "--tier", "tiny", "--results", str(tmp_path)]) == 0
    stores = json.loads((tmp_path / "made.json").read_text())["stores"]
    assert {"earlier", "int8", "few"} <= set(stores)


def test_teacher_of_another_recipe_is_refused(study):
    with pytest.raises(InputError, match="holds a teacher of"):
        train_teacher(TeacherRecipe(epochs=1), (), (), study / "out" / "teachers" / "strong-1-epochs")


def test_store_of_another_codec_is_refused(study, monkeypatch, capsys):
    monkeypatch.setitem(STORES, "few", replace(STORES["few"], codec="int6"))
    assert main([*_arguments(study)[:-3], "few-labels"]) != 0
    assert "codec" in capsys.readouterr().err


def test_unlabelled_copies_keep_images_and_few_labels(study):
    made = json.loads((study / "results" / "cpu" / "made.json").read_text())
    assert made["tier"]["few_labels"] == 2 * CLASSES
    assert made["stores"]["few"]["job"]["images"] == 24


def test_page_shows_what_was_run_and_names_what_was_not(study, tmp_path):
    write_report(study / "results", tmp_path)
    page = (tmp_path / "results.md").read_text()
    assert "## Is none < KD < FD < ScaleKD, for a CNN?" in page
    top1 = _result(study, "methods-cnn")["settings"]["KD"][0]["top1"]
    assert f"| KD | {top1:.1f} | 1 |" in page
    run = [path for path in (study / "results" / "cpu").glob("*.json") if path.name != "made.json"]
    assert page.count("\nNot run.") == len(QUESTIONS) - len(run)
    assert (tmp_path / "figures" / "study-methods-cnn.svg").read_text().startswith("<?xml")


def test_unknown_question_is_refused_with_the_known_ones(study, capsys):
    assert main([*_arguments(study), "dreams"]) == 2
    assert "dreams, expected some of methods-cnn" in capsys.readouterr().err


def test_committed_page_is_what_the_committed_results_give(tmp_path):
    write_report(RESULTS, tmp_path)
    assert (tmp_path / "results.md").read_text() == (DOCS / "results.md").read_text()


def test_committed_performance_page_is_what_the_recorded_results_give(tmp_path):
    write_page(docs=tmp_path)
    assert (tmp_path / "performance.md").read_text() == (DOCS / "performance.md").read_text()


def test_a_store_counts_as_made_only_when_its_job_was_not_stopped(study, monkeypatch, capsys):
    arguments, report = [*_arguments(study)[:-3], "codec"], study / "out" / "tiny" / "stores" / "f32.json"
    stop = Stop()
    stop.set()
    monkeypatch.setattr("benchmarks.study.stores.cache", partial(cache, stop=stop))
    assert main(arguments) == 3
    assert "store f32 is not whole yet; run the same command again" in capsys.readouterr().err
    assert not report.exists()
    monkeypatch.undo()
    assert main(arguments) == 0
    assert report.exists()


def test_readme_shows_what_is_recorded():
    readme = (DOCS.parent / "README.md").read_text()
    rows = {
        "cpu/methods-cnn": "CNN",
        "cpu/methods-mixer": "MLP-Mixer",
        "cpu/methods-vit": "ViT",
        "cpu-10k/methods-cnn": "CNN, 10,000 images",
        "cpu-10k/few-labels": "CNN, 10,000 images, 2,000 of them with labels",
    }
    for file, label in rows.items():
        methods = json.loads((RESULTS / f"{file}.json").read_text())["settings"]
        methods.pop("Few labels alone", None)  # with as few views as the others; README has the stronger one
        top1 = {name: [run["top1"] for run in runs] for name, runs in methods.items()}
        cells = [f"{mean(values):.1f} +- {stdev(values):.1f}" for values in top1.values()]
        assert [name.removeprefix("Few labels, ") for name in top1][1:] == ["KD", "FD", "ScaleKD"]
        assert f"| {label} | {' | '.join(cells)} |" in readme
    recorded = json.loads((RESULTS.parents[1] / "results" / "peers.json").read_text())["contenders"]
    pace = {name: f"{one['images_per_second']:.1f}" for name, one in recorded.items()}
    timm, loops = pace["KD, timm"], pace["KD, torchdistill"]
    assert f"| KD | {pace['KD, store']} | {pace['KD, live']} | timm {timm}, torchdistill {loops} |" in readme
    released = pace["ScaleKD, released code"]
    assert f"| ScaleKD | {pace['ScaleKD, store']} | {pace['ScaleKD, live']} | released code {released} |" in readme
