"""Commands and code of docs/tutorials/imagenet.md and docs/how-to/own-loop.md run on small stand-ins."""

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from command_lines import PROGRAMS
from image_folders import class_samples, write_folder
from packaging.version import Version
from PIL import Image
from training_world import make_teacher, shared_world, write_store

DOCS = Path(__file__).parents[2] / "docs"


def blocks(page: str, language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)
    return [code for found, code in fenced if found == language]


def _without_rehearsal() -> list[str]:
    return [block for block in blocks("tutorials/imagenet.md", "") if "rehearsal" not in block]


def shrunk(words: list[str], teacher) -> list[str]:
    """The same command with the stand-ins' names and sizes."""
    swaps = {"swin_large_patch4_window7_224.ms_in22k_ft_in1k": teacher.name, "resnet50": "test_resnet", "1000": "4"}
    words = [swaps.get(word, word) for word in words]
    more = {
        "pack": ["--unit-samples", "8"],
        "plan": ["--model-kwargs", json.dumps(teacher.model_kwargs)],
        "cache": [
            "--model-kwargs", json.dumps(teacher.model_kwargs), "--checkpoint", str(teacher.checkpoint),
            "--workers", "0", "--device", "cpu",
        ],
        "train": ["--epochs", "1", "--batch-size", "4", "--workers", "0", "--device", "cpu"],
        "evaluate": ["--workers", "0", "--device", "cpu"],
    }  # fmt: skip
    return words + more.get(words[0], [])


def test_rehearsal_of_the_imagenet_tutorial_runs(tmp_path, monkeypatch, capsys, tiny_swin):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "imagenet/val", class_samples(8))
    (block,) = (block for block in blocks("tutorials/imagenet.md", "") if "rehearsal" in block)
    *shell, random_weights = block.splitlines()[:3]
    subprocess.run(["bash", "-ec", "\n".join(shell)], check=True)
    subprocess.run(shlex.split(random_weights.replace("python", sys.executable, 1)), check=True)
    assert Path("rehearsal/random.safetensors").stat().st_size > 100e6
    for program, *words in map(shlex.split, block.splitlines()[3:]):
        given = {"rehearsal/random.safetensors": str(tiny_swin.checkpoint), "resnet18": "test_resnet"}
        words = [given.get(word, word) for word in words]
        words += ["--model-kwargs", json.dumps(tiny_swin.model_kwargs)] if words[0] == "cache" else []
        words += ["--workers", "0", "--device", "cpu"] if words[0] in ("cache", "train", "evaluate") else []
        assert PROGRAMS[program](words) == 0, capsys.readouterr()
    assert Path("rehearsal/student/model.safetensors").is_file()


def test_imagenet_tutorial_goes_from_a_folder_to_an_exported_student(tmp_path, monkeypatch, capsys, tiny_swin):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "imagenet/train", class_samples(16))
    write_folder(tmp_path / "imagenet/val", class_samples(8, seed=1))
    lines = [shlex.split(line) for line in "".join(_without_rehearsal()).splitlines()]
    assert [words[1] for words in lines] == [
        "pack", "pack", "plan", "cache", "info", "verify", "train", "train", "evaluate", "export",
    ]  # fmt: skip
    for program, *words in lines:
        assert PROGRAMS[program](shrunk(words, tiny_swin)) == 0, capsys.readouterr()
    out = capsys.readouterr().out
    assert "64 committed of 64" in re.sub(r"\s+", " ", out)
    assert len(list(Path("packed/train").glob("*.tar"))) == 2
    code, from_folder = blocks("tutorials/imagenet.md", "python")
    names: dict = {}
    options = json.loads(Path("resnet50-scalekd/config.json").read_text())
    kwargs = f'"test_resnet", num_classes={options["num_classes"]}'
    exec(code.replace('"resnet50"', kwargs), names)
    assert names["model"].num_classes == options["num_classes"]
    if Version(timm.__version__) >= Version("1.0.31"):  # earlier ones read no safetensors from a folder
        exec(from_folder, names)
        assert names["transform"](Image.new("RGB", (50, 40))).shape == names["model"].pretrained_cfg["input_size"]
        assert names["names"] is None  # tars with class indexes


def test_own_loop_trains_two_steps(tmp_path, monkeypatch, capsys):
    world = shared_world("swin")
    monkeypatch.chdir(tmp_path)
    shutil.copy(world.tars[1], tmp_path / "train.tar")
    write_store(tmp_path / "store", ["train.tar"], make_teacher(world.teacher, tmp_path / "teacher.safetensors"))
    (code,) = blocks("how-to/own-loop.md", "python")
    names: dict = {}
    exec(compile(code, "own-loop.md", "exec"), names)
    printed = [ast.literal_eval(line) for line in capsys.readouterr().out.splitlines()]
    assert [set(line) for line in printed] == [set(names["terms"].raw)] * 2
    assert set(printed[0]) >= {"task", "kd", "stage3_original", "stage4_alternative"}
    assert next(names["student"].parameters()).grad.abs().sum() > 0


@pytest.mark.parametrize("page", ["tutorials/imagenet.md", "how-to/own-loop.md"])
def test_page_has_no_block_of_another_language(page):
    languages = re.findall(r"^```(\w*)\n", (DOCS / page).read_text(), re.MULTILINE)
    assert set(languages) <= {"", "python"}
