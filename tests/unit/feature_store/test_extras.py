import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from tiny_store import tiny_store

import feature_store.tools.cli
from feature_store.tools.extras import MODULES, missing_extra

PROJECT = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
HEAVY = sorted({module for modules in MODULES.values() for module in modules} - {"yaml"})
BLOCKED = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
sys.argv[0] = {program!r}
from {module} import main
sys.exit(main())
"""
PROGRAMS = {
    "feature-store": "feature_store.tools.cli",
    "teacher-service": "teacher_service.cli",
    "student-trainer": "student_trainer.__main__",
}


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[><=;!~ ]", requirement, maxsplit=1)[0].lower() for requirement in requirements}


def without_extras(program: str, *arguments: object, absent: list[str] = HEAVY) -> subprocess.CompletedProcess[str]:
    """A program where modules of the extras are not installed."""
    code = BLOCKED.format(absent=absent, program=program, module=PROGRAMS[program])
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_modules_of_extras_are_those_pyproject_installs():
    extras = PROJECT["optional-dependencies"]
    known = packages_distributions()
    assert set(MODULES) | {"all", "demo", "dev", "docs"} == set(extras)
    for extra, modules in MODULES.items():
        for module in modules:
            distributions = {name.lower().replace("_", "-") for name in known.get(module, [module])}
            # starlette and anyio come with fastapi, botocore with boto3
            brought = names(extras[extra]) | ({"starlette", "anyio"} if extra == "serve" else {"botocore"})
            assert distributions & brought, (extra, module)


def test_all_names_every_extra_that_users_install():
    (everything,) = PROJECT["optional-dependencies"]["all"]
    assert set(everything.removeprefix("scalekd-cache[").removesuffix("]").split(",")) == set(MODULES)


def test_plain_dependencies_hold_no_torch_nor_server():
    assert not names(PROJECT["dependencies"]) & {"torch", "timm", "torchvision", "fastapi", "uvicorn", "scipy"}


@pytest.mark.parametrize("program", ["feature-store", "teacher-service"])
def test_help_is_printed_when_no_extra_is_installed(program):
    done = without_extras(program, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert program in done.stdout


def test_info_and_tokens_need_no_extra(tmp_path):
    tiny_store(tmp_path / "s")
    shown = without_extras("feature-store", "info", tmp_path / "s")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "test_vit" in shown.stdout
    made = without_extras("teacher-service", "token", "create", "--name", "a", "--file", tmp_path / "tokens.jsonl")
    assert (made.returncode, made.stderr) == (0, "")
    assert made.stdout.startswith("skc_")


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        ("teacher-service", ["cache", "x.tar", "--teacher", "t", "--store", "s"], "torch is not installed; {teacher}"),
        ("teacher-service", ["plan", "x.tar", "--teacher", "t"], "torch is not installed; {teacher}"),
        ("teacher-service", ["serve", "--store", "{store}"], "uvicorn is not installed; {serve}"),
        ("student-trainer", ["--help"], "torch is not installed; {student}"),
        ("student-trainer", ["train", "--run", "r"], "torch is not installed; {student}"),
    ],
)
def test_command_names_its_extra_in_one_line_when_that_is_missing(tmp_path, program, arguments, message):
    store = tiny_store(tmp_path / "s").path
    done = without_extras(program, *(argument.format(store=store) for argument in arguments))
    install = {extra: f"pip install 'scalekd-cache[{extra}]'" for extra in MODULES}
    assert done.stderr == f"{program}: error: {message.format(**install)}\n"
    assert (done.returncode, done.stdout) == (2, "")


def test_missing_module_of_no_extra_is_no_user_error(monkeypatch):
    def broken(path: str) -> None:
        raise ModuleNotFoundError("No module named 'feature_store.gone'", name="feature_store.gone")

    monkeypatch.setattr("feature_store.tools.cli.open_store", broken)
    with pytest.raises(ModuleNotFoundError, match="gone"):
        feature_store.tools.cli.main(["info", "s"])
    assert missing_extra(ModuleNotFoundError(name=None)) is None


@pytest.mark.parametrize(("preferred", "extra"), [("student", "student"), ("", "teacher"), ("serve", "teacher")])
def test_missing_extra_prefers_the_programs_own(preferred, extra):
    error = missing_extra(ModuleNotFoundError(name="timm.models"), preferred)
    assert str(error) == f"timm is not installed; pip install 'scalekd-cache[{extra}]'"
