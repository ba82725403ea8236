"""deploy/systemd: units that systemd accepts, hardened, whose command serves with what they allow."""

import http.client
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny_store import tiny_store

from teacher_service.serve.config import ServeConfig
from teacher_service.serve.tokens import create_token

UNITS = Path(__file__).parents[2] / "deploy/systemd"
SERVICES = ("teacher-service.service", "feature-store-verify.service")
MOST_EXPOSED = 20  # 2.0
INSTALLED = "/opt/scalekd/bin/"
REFUSED = ("mbind", "set_mempolicy")
"""Calls of OpenBLAS's that the unit refuses, as container engines do; it goes on without them."""
needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
needs_strace = pytest.mark.skipif(
    shutil.which("strace") is None or shutil.which("systemd-analyze") is None,
    reason="strace or systemd-analyze is not installed (apt-get install strace)",
)


def settings(unit: str) -> dict[str, list[str]]:
    """Values by key, in their order."""
    found: dict[str, list[str]] = {}
    for line in (UNITS / unit).read_text().replace("\\\n", " ").splitlines():
        key, given, value = line.partition("=")
        if given and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


def environment() -> dict[str, str]:
    lines = (UNITS / "teacher-service.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def command(unit: str, values: dict[str, str], credentials: Path) -> list[str]:
    """A unit's command with this environment's programs."""
    (text,) = settings(unit)["ExecStart"]
    text = re.sub(r"\$\{(\w+)\}", lambda found: values[found[1]], text).replace("%d", str(credentials))
    program, *arguments = shlex.split(text)
    module = {"teacher-service": "teacher_service", "feature-store": "feature_store"}[program.removeprefix(INSTALLED)]
    return [sys.executable, "-m", module, *arguments]


@contextmanager
def started(folder: Path, *before: str):
    """The service as its unit starts it, ready; gives its port, its token, its process."""
    store = tiny_store(folder / "store").path
    token = create_token(folder / "tokens", "check", ("read",))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    values = environment() | {"SCALEKD_STORE": str(store), "SCALEKD_PORT": str(port)}
    process = subprocess.Popen(
        [*before, *command("teacher-service.service", values, folder)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        for _ in range(600):
            if status(port, "/readyz") == 200:
                break
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        yield port, token, process
    finally:
        os.kill(traced(process) if before else process.pid, signal.SIGTERM)
        process.communicate(timeout=60)


def traced(process: subprocess.Popen) -> int:
    """The program that strace runs."""
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])


def status(port: int, path: str, token: str | None = None) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {token}"} if token else {})
        return connection.getresponse().status
    except OSError:
        return 0
    finally:
        connection.close()


def served(port: int, path: str, token: str) -> int:
    """Status of a request, repeated as clients do: another worker may not be ready yet."""
    for _ in range(300):
        if (found := status(port, path, token)) != 503:
            break
        time.sleep(0.1)
    return found


@needs_systemd
def test_units_are_accepted_by_systemd(tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("teacher-service", "feature-store"):
        (programs / name).write_text("#!/bin/sh\n")
        (programs / name).chmod(0o755)
    files = []
    for unit in sorted(UNITS.glob("*.service")) + sorted(UNITS.glob("*.timer")):
        file = tmp_path / unit.name
        file.write_text(unit.read_text().replace(INSTALLED, f"{programs}/"))
        files.append(str(file))
    assert len(files) == 3
    done = subprocess.run(["systemd-analyze", "verify", *files], capture_output=True, text=True, check=False)
    assert [line for line in done.stderr.splitlines() if str(tmp_path) in line or "/deploy/" in line] == []
    assert done.returncode == 0, done.stderr


@needs_systemd
@pytest.mark.parametrize("unit", SERVICES)
def test_services_are_exposed_at_most_two(unit):
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", f"--threshold={MOST_EXPOSED}", UNITS / unit],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-500:]
    assert float(re.search(r"exposure level for \S+: ([\d.]+)", done.stdout)[1]) <= MOST_EXPOSED / 10


def test_service_has_more_time_to_stop_than_it_drains():
    (text,) = settings("teacher-service.service")["ExecStart"]
    words = shlex.split(text)
    drain = float(words[words.index("--drain-seconds") + 1]) + ServeConfig(store="s").drain_delay
    (stop,) = settings("teacher-service.service")["TimeoutStopSec"]
    assert float(stop) > drain + 1


def test_every_variable_of_the_units_has_a_value():
    used = {name for unit in SERVICES for name in re.findall(r"\$\{(\w+)\}", (UNITS / unit).read_text())}
    assert used == environment().keys()


def test_service_serves_with_its_token_and_drains(tmp_path):
    with started(tmp_path) as (port, token, process):
        assert status(port, "/v1/manifest") == 401
        assert served(port, "/v1/manifest", token) == 200
    assert process.returncode == 0


def test_verification_reports_a_damaged_store_by_its_exit_code(tmp_path):
    store = tiny_store(tmp_path / "store").path
    words = command("feature-store-verify.service", {"SCALEKD_STORE": str(store)}, tmp_path)
    whole = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (whole.returncode, json.loads(whole.stdout)["findings"]) == (0, [])
    shard = store / "taps/stage4/c/0/0/0/0"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert subprocess.run(words, capture_output=True, check=False).returncode == 1


@needs_strace
def test_service_makes_only_the_system_calls_its_unit_allows(tmp_path):
    log = tmp_path / "strace.log"
    refused = f"inject={','.join(REFUSED)}:error=EPERM"
    with started(tmp_path, "strace", "-f", "-qq", "-e", "signal=none", "-e", refused, "-o", str(log)) as (
        port,
        token,
        _,
    ):
        assert served(port, "/v1/units/0/views/0?start=0&count=2", token) == 200
        assert served(port, "/v1/zarr/taps/stage4/c/0/0/0/0", token) == 200
    calls = log.read_text(errors="replace").splitlines()
    made = {found[1] for line in calls if (found := re.match(r"\d+ +(\w+)\(", line))}
    allowed, denied = settings("teacher-service.service")["SystemCallFilter"]
    assert {"read", "mmap", "accept4"} <= made
    assert made - (system_calls(allowed) - system_calls(*denied.removeprefix("~").split())) <= {*REFUSED}
    # MemoryDenyWriteExecute
    assert [line for line in calls if "PROT_WRITE|PROT_EXEC" in line or re.search(r"mprotect\(.*PROT_EXEC", line)] == []


def system_calls(*groups: str) -> set[str]:
    """System calls of groups of systemd's, with the groups they hold."""
    found: set[str] = set()
    for group in groups:
        text = subprocess.run(
            ["systemd-analyze", "syscall-filter", group], capture_output=True, text=True, check=True
        ).stdout
        names = re.findall(r"^ {4}([@\w-]+)$", text, re.MULTILINE)
        found |= {name for name in names if not name.startswith("@")}
        found |= system_calls(*(name for name in names if name.startswith("@")))
    return found
