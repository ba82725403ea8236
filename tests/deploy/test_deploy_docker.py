"""deploy/docker without an engine: lint, targets, users, commands; `make deploy-check` builds and runs the images."""

import json
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
import tyro

from teacher_service.serve.config import ServeConfig

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy/docker/Dockerfile"
PROGRAMS = {
    "client": "feature-store",
    "serve": "teacher-service",
    "cache": "teacher-service",
    "train": "student-trainer",
}
USER = "10001:10001"


def stages() -> dict[str, list[tuple[str, str]]]:
    """Instructions by stage, those of the stages it is made from first."""
    text = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE))
    found: dict[str, list[tuple[str, str]]] = {}
    current: list[tuple[str, str]] = []
    for line in filter(None, text.splitlines()):
        instruction, _, rest = line.partition(" ")
        if instruction == "FROM":
            base, _, name = rest.partition(" AS ")
            current = found[name] = [*found.get(base, [])]
        current.append((instruction, re.sub(r" +", " ", rest.strip())))
    return found


def last(stage: str, instruction: str) -> str:
    return [rest for name, rest in stages()[stage] if name == instruction][-1]


def test_dockerfile_passes_hadolint():
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize(("target", "program"), PROGRAMS.items())
def test_target_runs_its_program_as_pid_1_without_root(target, program):
    assert json.loads(last(target, "ENTRYPOINT")) == [program]
    assert isinstance(json.loads(last(target, "CMD")), list)
    assert last(target, "USER") == USER
    names = [name for name, _ in stages()[target]]
    assert "RUN" not in names[names.index("USER") :]
    assert any(name == "HEALTHCHECK" for name in names)
    assert program in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


def test_command_of_serve_is_one_the_program_reads():
    command, *options = json.loads(last("serve", "CMD"))
    assert command == "serve"
    config = tyro.cli(tyro.conf.OmitArgPrefixes[ServeConfig], args=options, config=(tyro.conf.FlagCreatePairsOff,))
    assert (config.port, config.host) == (8000, "0.0.0.0")
    assert last("serve", "EXPOSE") == "8000"
    assert f"http://127.0.0.1:{config.port}/readyz" in last("serve", "HEALTHCHECK")


@pytest.mark.parametrize("target", PROGRAMS)
def test_target_installs_extras_that_exist(target):
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    (named,) = re.findall(r"\.whl\)\[([\w,]+)\]", " ".join(rest for name, rest in stages()[target] if name == "RUN"))
    assert set(named.split(",")) <= extras
    assert ("teacher" in named or "student" in named) == (target in ("cache", "train"))


def test_build_context_holds_the_packages_and_nothing_that_is_no_source():
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"
    kept = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = {source for _, rest in stages()["wheel"] if _ == "COPY" for source in rest.split()[:-1]}
    assert copied == kept
    assert all((ROOT / name).exists() for name in kept)
    assert [
        name for name in (".git", ".env", "tests", "deploy", "runs", "demo") if any(fnmatch(name, k) for k in kept)
    ] == []
