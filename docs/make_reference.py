"""Writes the generated pages of docs/reference: command lines, presets, errors, HTTP, Python."""

import ast
import contextlib
import importlib
import inspect
import io
import os
import re
import textwrap
from pathlib import Path
from typing import Any

import feature_store.errors
import feature_store.tools.cli
import student_trainer.cli
import teacher_service.cli
from student_trainer.recipes import PRESETS
from teacher_service.serve.app import create_app
from teacher_service.serve.config import ServeConfig
from teacher_service.serve.service import Service

FOLDER = Path(__file__).parent / "reference"
MADE = "Made by `python docs/make_reference.py`."
PROGRAMS = {
    "teacher-service": teacher_service.cli.main,
    "student-trainer": student_trainer.cli.main,
    "feature-store": feature_store.tools.cli.main,
}
PUBLIC = {
    "feature_store": ("open_store", "connect", "RowId", "FeatureSource"),
    "feature_store.store": ("Store",),
    "feature_store.views": ("ViewPolicy", "draw_view", "apply_view"),
    "feature_store.teacher": ("split_teacher",),
    "feature_store.teacher.model": ("load_teacher",),
    "teacher_service.config": ("CacheConfig",),
    "teacher_service.cache.job": ("cache",),
    "student_trainer.train": ("train", "TrainResult"),
    "student_trainer.evaluate": ("evaluate",),
    "student_trainer.export": ("export",),
    "student_trainer.methods": (
        "Method",
        "Needs",
        "StudentOutput",
        "StudentShape",
        "DistillBatch",
        "TeacherOutput",
        "TeacherShape",
        "Terms",
        "ScaleKD",
        "KD",
        "FD",
        "CrossAttentionProjector",
    ),
    "student_trainer.students.student": ("Student",),
}
"""Names of the Python page, by module."""


def help_text(program: str, command: str = "") -> str:
    """Output of ``program command --help`` on a terminal of 100 columns."""
    output = io.StringIO()
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100"
    try:
        with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
            PROGRAMS[program]([*command.split(), "--help"])
    finally:
        os.environ.pop("COLUMNS") if before is None else os.environ.update(COLUMNS=before)
    return _without_frames(output.getvalue())


def subcommands(program: str, command: str = "") -> list[str]:
    """The commands below a program or a command that runs nothing by itself."""
    found = re.match(rf"usage: {program} {command} ?\[-h\] \{{(.*?)\}}", help_text(program, command).replace("\n", ""))
    if not found:
        found = re.match(rf"usage: {program} ?\[-h\] \{{(.*?)\}}", help_text(program, command).replace("\n", ""))
    names = found[1].replace(" ", "").split(",") if found else []
    return [f"{command} {name}".strip() for name in names]


def command_lines() -> str:
    """The page of all commands."""
    lines = ["# Command lines", "", MADE, ""]
    for program in PROGRAMS:
        lines += [f"## {program}", ""]
        for command in subcommands(program):
            for leaf in subcommands(program, command) or [command]:
                lines += [f"### {program} {leaf}", "", "```text", help_text(program, leaf), "```", ""]
    return "\n".join(lines)


def presets() -> str:
    """The page of presets and their sources."""
    lines = [
        "# Presets", "", MADE, "",
        "Settings of the released pairs of teacher and student. `student-trainer presets NAME` prints one, and",
        "`student-trainer train --preset NAME` trains with them. Accuracies are the paper's ImageNet-1K top-1 in",
        "percent, without and with ScaleKD; they were not reproduced here. The config is a file of the released code.",
        "",
        "| preset | teacher | schedule | paper | config |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for name, preset in PRESETS.items():
        paper = (
            f"{preset.published.baseline:.2f} to {preset.published.scalekd:.2f}" if preset.published else "not given"
        )
        path = preset.source.file
        source = f"[{Path(path).stem}](https://github.com/deep-optimization/ScaleKD/blob/{preset.source.commit}/{path})"
        lines.append(f"| `{name}` | `{preset.teacher.name}` | {preset.schedule.name} | {paper} | {source} |")
    lines += ["", "## Differences from the released settings", ""]
    for name, preset in PRESETS.items():
        lines += [f"### {name}", "", *(f"- {field}: {why}" for field, why in preset.differs.items()), ""]
    return "\n".join(lines)


def errors() -> str:
    """The page of errors and exit codes."""
    lines = [
        "# Errors and exit codes", "", MADE, "",
        "Each command prints one line on stderr: what, got, expected, next step. Python raises the same errors, from",
        "`feature_store.errors`.", "",
        "| exit code | meaning |", "|---|---|",
        "| 0 | done |",
        "| 1 | a check or a run failed, or a store is damaged |",
        "| 2 | an argument or an input cannot be used |",
        "| 3 | disk, network or device failed |",
        "| 128 + n | ended by signal n: 130 Ctrl-C, 143 SIGTERM |", "",
        "| error | is a | exit code | meaning |", "|---|---|---|---|",
    ]  # fmt: skip
    for name, kind in vars(feature_store.errors).items():
        if inspect.isclass(kind) and issubclass(kind, feature_store.errors.UserError):
            first = " ".join((inspect.getdoc(kind) or "").partition("\n\n")[0].split())
            lines.append(f"| `{name}` | `{kind.__base__.__name__}` | {kind.exit_code} | {first} |")
    return "\n".join([*lines, ""])


def http() -> str:
    """The page of the service's paths, from its OpenAPI."""
    api = create_app(Service(ServeConfig(store="store.zarr"))).openapi()
    lines = [
        "# HTTP", "", MADE, "",
        "The same as JSON, with schemas and examples: `GET /openapi.json`. Scopes, frames and errors in words:",
        "[the HTTP service](../how-to/http.md).", "",
    ]  # fmt: skip
    for path, methods in api["paths"].items():
        for method, operation in methods.items():
            lines += [f"## {method.upper()} {path}", "", " ".join(operation.get("description", "").split()), ""]
            parameters = operation.get("parameters", [])
            if parameters:
                lines += ["| parameter | in | required | meaning |", "|---|---|---|---|"]
                for each in parameters:
                    meaning = " ".join(each.get("description", each["schema"].get("description", "")).split())
                    lines.append(f"| `{each['name']}` | {each['in']} | {_yes(each.get('required'))} | {meaning} |")
                lines.append("")
            lines += ["Status codes: " + ", ".join(sorted(operation["responses"])) + ".", ""]
    return "\n".join(lines)


def python() -> str:
    """The page of the public names, from their docstrings."""
    lines = ["# Python", "", MADE, ""]
    for module, names in PUBLIC.items():
        lines += [f"## {module}", ""]
        for name in names:
            thing = getattr(importlib.import_module(module), name)
            signature = "" if inspect.isclass(thing) else _signature(thing)
            about = f"{name}{signature}\n\n{inspect.getdoc(thing) or ''}".strip()
            lines += [f"### {name}", "", "```text", about, "```", ""]
            if inspect.isclass(thing):
                lines += [*_methods(thing), ""]
    return "\n".join(lines)


def _signature(function: Any) -> str:
    """Arguments and result as the source has them, the same with every version of Python."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    assert isinstance(node, ast.FunctionDef)
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"({ast.unparse(node.args)}){returns}"


def _methods(thing: type) -> list[str]:
    found = []
    for name, value in vars(thing).items():
        function = getattr(value, "__func__", value)  # of a classmethod
        if not name.startswith("_") and inspect.isfunction(function):
            first = (inspect.getdoc(function) or "").partition("\n")[0]
            found.append(f"- `{name}{_signature(function)}`: {first}")
    return found


def _yes(value: object) -> str:
    return "yes" if value else "no"


def _without_frames(text: str) -> str:
    lines = [line.rstrip() for line in text.splitlines() if not re.fullmatch(r" *-{20,}", line.rstrip())]
    text = "\n".join(lines).strip()
    # feature_store.processes.usable_cpus is the default of these: it differs from machine to machine
    return re.sub(r"(Processes(?: that compare checksums)?\.) \(default: \d+\)", r"\1 (default: usable CPUs)", text)


PAGES = {"cli.md": command_lines, "presets.md": presets, "errors.md": errors, "http.md": http, "python.md": python}

if __name__ == "__main__":
    for file, text in PAGES.items():
        (FOLDER / file).write_text(text(), encoding="utf-8")
