"""No file of deploy/ names an option, a metric, an environment variable that does not exist."""

import contextlib
import io
import re
from functools import cache
from pathlib import Path

import pytest

import feature_store.tools.cli
import student_trainer.cli
import teacher_service.cli

ROOT = Path(__file__).parents[2]
PROGRAMS = {
    "feature-store": (feature_store.tools.cli.main, ("info", "verify", "repair", "bench", "plot")),
    "student-trainer": (student_trainer.cli.main, ("train", "presets", "evaluate", "export", "compare")),
    "teacher-service": (teacher_service.cli.main, ("plan", "cache", "verify", "serve", "token create")),
}
COMMANDS = [(program, command) for program, (_, commands) in PROGRAMS.items() for command in commands]
FILES = [
    path for path in sorted((ROOT / "deploy").rglob("*")) if path.is_file() and path.suffix not in (".pyc", ".json")
]
PACKAGES = ("feature_store", "teacher_service", "student_trainer")
OPTION = re.compile(r"(?<![\w\"/$-])--[a-z][\w.-]*\w")
SAMPLES = ("", "_total", "_bucket", "_sum", "_count", "_created")


@cache
def options(program: str, command: str) -> frozenset[str]:
    """Options a command has."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert PROGRAMS[program][0]([*command.split(), "--help"]) == 0
    return frozenset(OPTION.findall(output.getvalue()))


def lines(file: Path) -> list[str]:
    """A file's lines, those that go on in the next one joined."""
    return re.sub(r"\\\n", " ", file.read_text()).splitlines()


def invocations(text: str) -> list[tuple[str, str, list[str]]]:
    """Program, command and options of every command of ours in a line, up to what ends a shell command."""
    found = []
    for program, command in COMMANDS:
        for rest in re.findall(rf'{program}["\']? {command}\b([^;|&<>)`]*)', text):
            found.append((program, command, OPTION.findall(rest)))
    return found


def sources() -> str:
    return "\n".join(path.read_text() for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


@cache
def metrics() -> frozenset[str]:
    """Names of samples that the programs expose."""
    return frozenset(name + end for name in re.findall(r'"(scalekd_[a-z_]+)"', sources()) for end in SAMPLES)


@cache
def variables() -> frozenset[str]:
    """Variables of ours that the programs read or that deploy/ defines for its own files."""
    defined = [
        name
        for file in FILES
        if file.name.endswith((".env", ".env.example"))
        for name in re.findall(r"^#? ?([A-Z_]+)=", file.read_text(), re.MULTILINE)
    ]
    template = (ROOT / "deploy/nginx/teacher-service.conf.template").read_text()
    described = re.findall(r"^#   ([A-Z_]+(?:, [A-Z_]+)*) ", template, re.MULTILINE)
    read = re.findall(r'"([A-Z]+(?:_[A-Z0-9]+)+)"', sources())
    for test in (ROOT / "tests").rglob("*.py"):
        read += re.findall(r'environ(?:\.get)?[\[(]"([A-Z_]+)"', test.read_text())
    return frozenset([*defined, *read, *(name for names in described for name in names.split(", "))])


def name(path: Path) -> str:
    return path.relative_to(ROOT / "deploy").as_posix()


@pytest.mark.parametrize("file", FILES, ids=name)
def test_options_in_command_lines_are_those_of_their_commands(file):
    wrong = [
        (program, command, option)
        for line in lines(file)
        for program, command, given in invocations(line)
        for option in given
        if option not in options(program, command)
    ]
    assert wrong == []


@pytest.mark.parametrize("file", FILES, ids=name)
def test_variables_of_ours_exist(file):
    text = file.read_text()
    named = set(re.findall(r"\b((?:SCALEKD|FEATURE_STORE)_[A-Z][A-Z_]*[A-Z])\b", text))
    assert named - variables() == set()


@pytest.mark.parametrize("file", [file for file in FILES if "nginx" not in file.parts], ids=name)
def test_metrics_exist(file):
    named = set(re.findall(r"\bscalekd_[a-z_]+[a-z]\b", file.read_text())) - {"scalekd_cache"}  # the wheel's name
    assert named - metrics() == set()


def test_command_lines_are_found_in_scripts_units_and_comments():
    found = {(program, command) for file in FILES for line in lines(file) for program, command, _ in invocations(line)}
    assert {("teacher-service", "serve"), ("teacher-service", "token create"), ("feature-store", "verify")} <= found


def test_wrong_option_is_found_in_a_command_line():
    ((program, command, given),) = invocations(
        "/opt/bin/teacher-service serve --store s --no-such-option 1 | cat --other"
    )
    assert [option for option in given if option not in options(program, command)] == ["--no-such-option"]


def test_metrics_and_variables_are_collected():
    assert {"scalekd_http_requests_total", "scalekd_http_request_seconds_bucket", "scalekd_rows_total"} <= metrics()
    assert {"FEATURE_STORE_TOKEN", "SCALEKD_STORE", "SCALEKD_TAR_INDEX", "SCALEKD_HTTPS_PORT"} <= variables()
