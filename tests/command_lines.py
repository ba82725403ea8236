"""Command lines in pages or deploy/, compared with what the programs and the code accept."""

import contextlib
import io
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import feature_store.tools.cli
import student_trainer.cli
import teacher_service.cli

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
PROGRAMS = {
    "teacher-service": teacher_service.cli.main,
    "student-trainer": student_trainer.cli.main,
    "feature-store": feature_store.tools.cli.main,
}
_MODULE = {"student_trainer": "student-trainer", "teacher_service": "teacher-service"}
"""Programs by what ``python -m`` or ``torchrun -m`` runs."""

OTHERS = {
    "OMP_NUM_THREADS": "torch, numpy",
    "PATH": "shell",
    "HOME": "shell",
    "HF_HOME": "huggingface_hub: timm's weights",
    "HF_HUB_OFFLINE": "huggingface_hub",
    "TMPDIR": "Python's tempfile",
    "JOB_COMPLETION_INDEX": "set by Kubernetes in pods of Indexed Jobs",
    "NCCL_DEBUG": "NCCL",
    "SLURM_CONF": "Slurm",
}
"""Environment variables that other software reads."""


@cache
def options(program: str, command: str) -> frozenset[str]:
    """Options that ``program command --help`` lists; empty for a command that does not exist."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(io.StringIO()):
        PROGRAMS[program]([*command.split(), "--help"])
    text = output.getvalue()
    if not text.startswith(f"usage: {program} {command} "):
        return frozenset()
    return frozenset(re.findall(r"(?<![\w-])--[a-z][\w.-]*[\w]", text))


_LINE = re.compile(r"(?P<first>^|[`;&|] *)?(?<![\w./-])(?P<program>" + "|".join(PROGRAMS) + r") "
                   r"(?P<command>[a-z][a-z-]*(?: create)?)\b(?P<rest>[^|;&`\n]*)")  # fmt: skip


def _matches(text: str) -> Iterator[re.Match[str]]:
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        yield from _LINE.finditer(re.sub(r"-m -- (\w+)", lambda match: _MODULE.get(match[1], match[1]), line))


def invocations(text: str) -> list[tuple[str, str, list[str]]]:
    """Program, command and options of each command line in a text; prose that follows a program's name is left out."""
    return [
        (found["program"], found["command"], re.findall(r"(?<![\w-])--[a-z][\w.-]*", found["rest"]))
        for found in _matches(text)
        if options(found["program"], found["command"])
    ]


def unknown_options(text: str) -> list[str]:
    """Options that their programs do not have, and commands, where a line or a quotation begins with the program."""
    wrong = [f"{program} {command} {option}" for program, command, given in invocations(text) for option in given
             if option not in options(program, command)]  # fmt: skip
    commands = [
        f"{found['program']} {found['command']}"
        for found in _matches(text)
        if found["first"] is not None and not options(found["program"], found["command"])
    ]
    return wrong + commands


def every_option() -> frozenset[str]:
    """All options of all commands: for options that a text names alone, in backquotes."""
    commands = {
        "teacher-service": ("plan", "cache", "verify", "pack", "serve", "token create"),
        "student-trainer": ("train", "presets", "evaluate", "export", "compare"),
        "feature-store": ("info", "verify", "repair", "bench", "plot", "card", "copy"),
    }
    return frozenset().union(*(options(program, each) for program, names in commands.items() for each in names))


@cache
def known_variables() -> frozenset[str]:
    """Environment variables that the code reads, by their string literals."""
    texts = [path.read_text() for package in ("feature_store", "teacher_service", "student_trainer")
             for path in (ROOT / package).rglob("*.py")]  # fmt: skip
    return frozenset(name for text in texts for name in re.findall(r'"([A-Z][A-Z0-9]*_[A-Z0-9_]+)"', text))
