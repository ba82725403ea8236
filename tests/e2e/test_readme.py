"""Every command and snippet of the README runs, on tiny stand-ins for ImageNet, Swin-L and ResNet-50."""

import json
import os
import re
import shlex
import stat
import subprocess
import sys
from pathlib import Path
from runpy import run_path

import pytest
from tiny_jobs import noise_samples, write_tar

import feature_store.tools.cli
import student_trainer.cli
import teacher_service.cli

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PROGRAMS = {
    "teacher-service": teacher_service.cli.main,
    "feature-store": feature_store.tools.cli.main,
    "student-trainer": student_trainer.cli.main,
}
PRINTED = {
    "plan": r"samples\W+8 in 2 units.*views\W+4 per sample, 32 images",
    "cache": r"swin_l.zarr: 2 units written, 0 already committed, 0 samples quarantined; 32 images in .* predicted \d",
    "info": r"views\W+4 by policy a1.*rows\W+32 committed of 32.*quarantined\W+0\b",
    "train": r"steps\W+2\b.*teacher seconds\W+0\.0\b",
    "evaluate": r"samples\W+4\b.*unreadable\W+0\b",
    "export": r"^resnet50-scalekd/config.json\s+resnet50-scalekd/model.safetensors$",
    "verify": r"swin_l.zarr: 2 units, .*; compared every byte\s+sound",
    "repair": r"nothing was changed",
    "token": r"^skc_\S+$",
}
"""What each command prints on the stand-ins, by its name."""
PACKAGES = ("feature_store", "teacher_service", "student_trainer", "examples", "demo", "benchmarks")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    lines = "".join(blocks("")).replace("\\\n", " ").splitlines()
    lines = [re.sub(r"^\(umask 077; (.*)\)$", r"\1", line) for line in lines]
    words = [shlex.split(line, comments=True) for line in lines if line.startswith(tuple(PROGRAMS))]
    assert len(words) >= 6
    return words


@pytest.fixture
def readme_world(tmp_path, monkeypatch, tiny_swin):
    """The README's folder, with two training tars and one for validation, as the commands name them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "imagenet").mkdir()
    for unit in (0, 1):
        keys = ["n01440764_10026"] if unit == 0 else []
        samples = noise_samples(f"train{unit}-", 4, unit)
        for sample, key in zip(samples, keys, strict=False):
            sample["__key__"] = key
        write_tar(tmp_path / f"imagenet/train-{unit:04}.tar", samples)
    write_tar(tmp_path / "imagenet/val-00.tar", noise_samples("val", 4, 9))
    return tiny_swin


def partition(words: list[str], at: str) -> tuple[list[str], list[str], list[str]]:
    """``str.partition`` for words."""
    index = words.index(at) if at in words else len(words)
    return words[:index], words[index : index + 1], words[index + 1 :]


def shrunk(words: list[str], teacher) -> list[str]:
    """The same command on the stand-ins: other names and sizes, the same options."""
    swaps = {
        "imagenet/train-{0000..1280}.tar": "imagenet/train-{0000..0001}.tar",
        "imagenet/val-{00..49}.tar": "imagenet/val-00.tar",
        "swin_large_patch4_window7_224.ms_in22k_ft_in1k": teacher.name,
        "resnet50": "test_resnet",
    }
    words = [swaps.get(word, word) for word in words[1:]]
    if words[0] in ("plan", "cache"):
        words += ["--model-kwargs", json.dumps(teacher.model_kwargs)]
    if words[0] == "cache":
        words += ["--checkpoint", str(teacher.checkpoint), "--workers", "0", "--device", "cpu"]
    if words[0] == "train":
        words += ["--epochs", "1", "--batch-size", "4", "--workers", "0", "--device", "cpu"]
    if words[0] == "evaluate":
        words += ["--workers", "0", "--device", "cpu"]
    if words[0] == "verify" and "--sample" in words:
        words += ["--checkpoint", str(teacher.checkpoint), "--device", "cpu"]
    return words


@pytest.fixture
def served():
    """Services that commands started; told to stop in the end."""
    running: list[subprocess.Popen] = []
    yield running
    for service in running:
        with service:
            service.terminate()
            assert service.wait(30) == 0


def serve(words: list[str]) -> tuple[subprocess.Popen, str]:
    """A service in a process of its own, and where it listens."""
    command = [sys.executable, "-m", "teacher_service", *words[1:], "--port", "0"]
    service = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert service.stdout is not None
    url = json.loads(service.stdout.readline())["url"]
    return service, f"http://127.0.0.1:{url.rpartition(':')[2]}"


def test_readme_commands_and_snippets_run_in_order(readme_world, served, capsys):
    url, accuracies = "", list[str]()
    for words in commands():
        if words[1] == "serve":
            service, url = serve(words)
            served.append(service)
            continue
        words, _, redirected = partition(words, ">")
        words = [word.replace("http://teacher-host:8000", url) for word in words]
        capsys.readouterr()
        assert PROGRAMS[words[0]](shrunk(words, readme_world)) == 0, words
        out = capsys.readouterr().out
        assert re.search(PRINTED[words[1]], out.strip(), re.DOTALL), out
        accuracies += re.findall(r"^\W*(?:best )?top-1\W+([\d.]+ %)", out, re.MULTILINE)
        if redirected:
            Path(redirected[0]).write_text(out)
    assert len(accuracies) == 2  # of the run with validation, and of its student evaluated
    assert len({*accuracies}) == 1
    assert Path("resnet50-scalekd/model.safetensors").is_file()
    (snippet,) = blocks("python")
    scope: dict = {}
    exec(snippet.replace('"cuda"', '"cpu"'), scope)
    assert scope["batch"].taps["stage4"].shape[0] == 1
    assert scope["batch"].logits.shape == (1, 4)


def test_map_of_modules_is_the_generated_one():
    script = run_path(str(ROOT / "docs/make_map.py"))
    assert (ROOT / "docs/map.md").read_text() == script["text"](), "run `python docs/make_map.py`"


@pytest.mark.parametrize("package", ["feature_store", "teacher_service", "student_trainer"])
def test_first_lines_of_modules_say_one_thing_in_at_most_twelve_words(package):
    first_line = run_path(str(ROOT / "docs/make_map.py"))["first_line"]
    lines = {module: first_line(module) for module in (ROOT / package).rglob("*.py") if module.name != "__main__.py"}
    assert {str(m): line for m, line in lines.items() if len(line.split()) > 12 or " and " in line} == {}


def test_readme_tree_names_every_folder_of_the_packages_and_no_other():
    (tree,) = re.findall(r"^```text\n(feature_store/ .*?)^```", README, re.DOTALL | re.MULTILINE)
    found, above = set(), []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        names = re.findall(r"(\w+)/(?=\s)", line.strip().partition("   ")[0] + " ")
        above = above[:depth] + names[:1]
        found |= {"/".join([*above[:-1], name]) for name in names}
    packages = [module.parent for package in PACKAGES for module in (ROOT / package).rglob("*.py")]
    assert found - {"deploy", "docs", "tests"} == {folder.relative_to(ROOT).as_posix() for folder in packages}


def test_modules_named_to_read_first_exist():
    _, _, text = README.partition("read these first:")
    named = re.findall(r"`([\w/]+\.py)`", text.partition("\n\n")[0])
    assert len(named) >= 5
    assert [name for name in named if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("page", ["README.md", "docs/how-to/http.md", "deploy/OPERATIONS.md"])
def test_a_token_is_written_to_a_file_of_its_owner_alone(page, tmp_path):
    (line,) = re.findall("^.*teacher-service token create .*> token.txt.*$", (ROOT / page).read_text(), re.MULTILINE)
    program = tmp_path / "teacher-service"
    program.write_text("#!/bin/sh\necho skc_1\n")
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["sh", "-c", f"umask 022; {line}"], cwd=tmp_path, env=environment, check=True, timeout=60)
    assert (tmp_path / "token.txt").read_text() == "skc_1\n"
    assert stat.S_IMODE((tmp_path / "token.txt").stat().st_mode) == 0o600


def test_list_options_of_all_programs_are_known(capsys):
    found: dict[str, set[str]] = {program: set() for program in PROGRAMS}
    for command in (
        "feature-store bench", "feature-store plot", "student-trainer train", "student-trainer evaluate",
        "student-trainer compare", "teacher-service plan", "teacher-service cache", "teacher-service verify",
        "teacher-service serve", "teacher-service token create",
    ):  # fmt: skip
        program, *words = command.split()
        assert PROGRAMS[program]([*words, "--help"]) == 0
        found[program] |= set(re.findall(r"(--[\w-]+)\s(?:\{None\}\|)?\{?\[", capsys.readouterr().out))
    assert found == {
        "feature-store": set(feature_store.tools.cli.LISTS),
        "teacher-service": set(teacher_service.cli.LISTS),
        "student-trainer": set(student_trainer.cli.LISTS),
    }
