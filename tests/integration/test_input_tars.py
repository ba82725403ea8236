"""Every command that opens tars takes the same ones: of equal names, from a program, with a long temporary folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from app_transport import TestClient, service_app
from tiny_jobs import TinyTeacher, noise_samples, write_tar

from feature_store import open_store
from feature_store.tools.cli import main as store_main
from student_trainer.cli import main as trainer_main
from teacher_service.cli import main as teacher_main

SMALL = ("--workers", "0", "--batch-size", "4")


def _cache(teacher: TinyTeacher, store: Path, *arguments: str) -> int:
    given = [*teacher.arguments, "--checkpoint", str(teacher.checkpoint), "--store", str(store), "--tap-codec", "f16"]
    return teacher_main(["cache", *given, *SMALL, *arguments])


def _train(run: Path, *arguments: str) -> int:
    return trainer_main(
        ["train", "--run", str(run), "--student", "test_resnet", "--method", "none", "--epochs", "1", "--device", "cpu",
         "--no-report", "--no-progress", *SMALL, *arguments]
    )  # fmt: skip


def test_every_command_takes_tars_of_one_name_when_a_store_was_written_from_them(
    tmp_path: Path, tiny_swin: TinyTeacher
) -> None:
    tars = []
    for name in "ab":
        (tmp_path / name).mkdir()
        tars.append(write_tar(tmp_path / name / "00000.tar", noise_samples(name, 4, ord(name))))
    store, run = tmp_path / "store", tmp_path / "run"
    assert _cache(tiny_swin, store, *tars) == 0
    tars = tars[::-1]

    assert _train(run, "--store", str(store), "--tars", *tars, "--val-tars", *tars) == 0
    assert _train(run, "--store", str(store), "--tars", *tars, "--val-tars", *tars, "--resume") == 0
    assert trainer_main(["evaluate", "--run", str(run), "--device", "cpu", *SMALL, "--tars", *tars]) == 0
    assert teacher_main(["verify", *tars, "--store", str(store), "--checkpoint", str(tiny_swin.checkpoint)]) == 0
    assert store_main(["plot", str(store), "--out", str(tmp_path / "plots"), "--tars", *tars]) == 0
    client = TestClient(service_app(str(store), tars=tuple(tars)), base_url="http://localhost")
    assert [client.get(f"/v1/browse/units/{unit}/views/0/rows/0/view.png").status_code for unit in (0, 1)] == [200, 200]


def test_every_command_takes_a_program_when_it_is_allowed(
    tmp_path: Path, tiny_swin: TinyTeacher, capsys: pytest.CaptureFixture[str]
) -> None:
    tar = f"pipe:cat {write_tar(tmp_path / 'a.tar', noise_samples('a', 8))}"
    allowed = ("--allow-pipe", "--scratch", str(tmp_path / "scratch"))
    store, run = str(tmp_path / "store"), str(tmp_path / "run")
    assert _cache(tiny_swin, tmp_path / "store", tar, *allowed) == 0

    commands = {
        "train": lambda *more: _train(Path(run), "--store", store, "--tars", tar, "--val-tars", tar, *more),
        "evaluate": lambda *more: trainer_main(
            ["evaluate", "--run", run, "--device", "cpu", *SMALL, "--tars", tar, *more]
        ),
        "verify": lambda *more: teacher_main(
            ["verify", tar, "--store", store, "--checkpoint", str(tiny_swin.checkpoint), *more]
        ),
        "plot": lambda *more: store_main(["plot", store, "--out", str(tmp_path / "plots"), "--tars", tar, *more]),
    }
    for name, command in commands.items():
        capsys.readouterr()
        assert command() == 2, name
        assert "give --allow-pipe" in capsys.readouterr().err, name
        assert command(*allowed) == 0, name
    app = service_app(store, tars=(tar,), allow_pipe=True, scratch=tmp_path / "scratch")
    view = TestClient(app, base_url="http://localhost").get("/v1/browse/units/0/views/0/rows/0/view.png")
    assert view.status_code == 200


def test_train_takes_a_store_when_an_earlier_version_gave_a_hidden_file_a_place(
    tmp_path: Path, tiny_swin: TinyTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = {"__key__": "d/", "DS_Store": b"x"}
    tar = write_tar(tmp_path / "a.tar", [hidden, *noise_samples("d/a", 8)])
    with monkeypatch.context() as patch:
        patch.setattr("feature_store.inputs.tar_index.HIDDEN_FILES", re.compile("(?!)"))
        patch.setenv("SCALEKD_TAR_INDEX", "/dev/null")
        assert _cache(tiny_swin, tmp_path / "store", tar) == 0
    assert open_store(tmp_path / "store").keys(0)[0] == "d/"

    assert _train(tmp_path / "run", "--store", str(tmp_path / "store"), "--tars", tar) == 0


def test_cache_says_before_the_teacher_is_loaded_that_no_sample_can_be_used(
    tmp_path: Path, tiny_swin: TinyTeacher, capsys: pytest.CaptureFixture[str]
) -> None:
    tar = write_tar(tmp_path / "a.tar", [{"__key__": "a", "png": b"no image", "cls": b"1"}])
    for command in ("plan", "cache"):
        argv = [command, tar, *tiny_swin.arguments, "--store", str(tmp_path / "store")]
        more = ["--checkpoint", str(tmp_path / "missing.safetensors")] if command == "cache" else []
        assert teacher_main([*argv, *more]) == 2
        assert "none of the 1 samples of 1 tars can be used" in capsys.readouterr().err


def test_plan_counts_the_samples_that_cannot_be_used(
    tmp_path: Path, tiny_swin: TinyTeacher, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = [*noise_samples("a", 3), {"__key__": "b", "png": b"x"}]
    assert teacher_main(["plan", write_tar(tmp_path / "a.tar", samples), *tiny_swin.arguments]) == 0
    assert "1 of 4 samples cannot be used; the first, 'b' of" in capsys.readouterr().out


LOADERS = {
    "cache": (
        "from teacher_service.cache.decode import Task, ViewDataset, batch_spans, read_batches\n"
        "def batches(tars, policy):\n"
        "    spans = batch_spans([Task(0, range(1))], [len(tars[0])], 4)\n"
        "    return read_batches(ViewDataset(tars, policy, 0), spans, most_images=4, workers=1, pin_memory=False)\n"
    ),
    "train": (
        "from feature_store.format.addressing import RowId\n"
        "from student_trainer.data.batch import ViewDataset\n"
        "from student_trainer.data.loader import BatchLoader\n"
        "from student_trainer.data.replayed import DrawnViews\n"
        "def batches(tars, policy):\n"
        "    rows = [[RowId(0, position, 0)] for position in range(2)]\n"
        "    return BatchLoader(ViewDataset(tars, DrawnViews(policy)), rows, workers=1)\n"
    ),
}
PROGRAM = (
    "import sys\n"
    "from feature_store.inputs.tar import open_tars\n"
    "from feature_store.views import view_policy\n"
    "{}"
    "if __name__ == '__main__':\n"
    "    print(len(list(batches(open_tars(sys.argv[1:]), view_policy('center', (8, 8))))))\n"
)


@pytest.mark.parametrize("loader", LOADERS)
def test_workers_run_when_the_temporary_folder_has_a_long_name(tmp_path: Path, loader: str) -> None:
    long = tmp_path / ("job" * 40)
    long.mkdir()
    tar = write_tar(tmp_path / "a.tar", noise_samples("a", 8))
    (tmp_path / "program.py").write_text(PROGRAM.format(LOADERS[loader]))
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])

    done = subprocess.run(
        [sys.executable, str(tmp_path / "program.py"), tar],
        env=os.environ | {"TMPDIR": str(long), "PYTHONPATH": path},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip

    assert (done.stdout, done.returncode) == ("2\n", 0), done.stderr
