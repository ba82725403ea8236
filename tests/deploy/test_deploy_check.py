"""The runner of `make deploy-check`, on steps of the test's own, and the scripts as shellcheck sees them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CHECK = Path(__file__).parents[2] / "deploy/check"
SCRIPTS = [CHECK / "run", *sorted(CHECK.glob("*.sh")), *sorted(CHECK.glob("lib/*.sh"))]


def run(folder: Path, steps: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    """The runner over steps, by the text of each."""
    check = folder / "deploy/check"
    check.mkdir(parents=True)
    shutil.copy(CHECK / "run", check)
    shutil.copytree(CHECK / "lib", check / "lib")
    for name, text in steps.items():
        (check / f"{name}.sh").write_text(f'#!/usr/bin/env bash\n. "$(dirname "$0")/lib/steps.sh"\n{text}\n')
        (check / f"{name}.sh").chmod(0o755)
    environment = {**os.environ, "TMPDIR": str(folder)}
    return subprocess.run([check / "run", *words], capture_output=True, text=True, check=False, env=environment)


def test_steps_run_in_order_and_are_counted(tmp_path):
    done = run(tmp_path, {"b": "echo second", "a": "echo first; skip no such machine"})
    assert done.returncode == 0
    assert done.stdout.index("first") < done.stdout.index("second")
    assert "skipped: no such machine" in done.stdout
    assert "1 passed, 0 failed, 1 skipped" in done.stdout
    assert (tmp_path / "build/deploy-check/b.log").read_text() == "second\n"


def test_run_fails_when_a_step_does(tmp_path):
    done = run(tmp_path, {"a": "fail a reason", "b": "true"})
    assert done.returncode == 1
    assert "FAILED: a reason" in done.stdout
    assert "1 passed, 1 failed" in done.stdout


def test_only_the_steps_named_run(tmp_path):
    done = run(tmp_path, {"images": "echo images-ran", "install": "echo install-ran"}, "image")
    assert ("images-ran" in done.stdout, "install-ran" in done.stdout) == (True, False)


def test_run_fails_when_no_step_has_the_name(tmp_path):
    assert run(tmp_path, {"a": "true"}, "z").returncode == 1


def test_working_folder_is_removed_when_a_step_fails(tmp_path):
    run(tmp_path, {"a": 'touch "$WORK/file"; false'})
    assert list(tmp_path.glob("scalekd-check.*")) == []


@pytest.mark.parametrize(("command", "code"), [
    ("refused 2 needed sh -c 'echo needed >&2; exit 2'", 0),
    ("refused 2 needed sh -c 'echo needed >&2; exit 3'", 1),
    ("refused 2 needed sh -c 'echo other >&2; exit 2'", 1),
    ("refused 2 needed sh -c 'echo Traceback needed >&2; exit 2'", 1),
    ("refused 2 needed true", 1),
    ("wait_for 1 false", 1),
    ("wait_for 1 true", 0),
])  # fmt: skip
def test_functions_of_steps_notice_what_is_wrong(tmp_path, command, code):
    assert run(tmp_path, {"a": command}).returncode == code


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_script_passes_shellcheck(script):
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, "-x", script], capture_output=True, text=True, check=False, cwd=CHECK.parents[1])
    assert (done.returncode, done.stdout) == (0, "")


def test_steps_are_executable():
    assert [script.name for script in SCRIPTS if script.parent == CHECK and not os.access(script, os.X_OK)] == []
