"""Every curl of docs/how-to/http.md runs against a service; what it says of scopes and problems is what there is."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from PIL import Image
from service_process import running_service
from training_world import shared_world

from feature_store.client import frames
from feature_store.client.problems import KINDS
from feature_store.store import open_store
from teacher_service.cli import main
from teacher_service.serve.app import create_app
from teacher_service.serve.config import ServeConfig
from teacher_service.serve.service import Service

DOCS = (Path(__file__).parents[2] / "docs" / "how-to" / "http.md").read_text()


@pytest.fixture(scope="module")
def world():
    return shared_world("vit")


def test_curls_work_when_pasted_in_order(world, tmp_path, capsys):
    (made,) = re.findall(r"teacher-service (token create .*) > token.txt\)$", DOCS, re.MULTILINE)
    assert main([*shlex.split(made)[:-1], str(tmp_path / "tokens.jsonl")]) == 0
    token = capsys.readouterr().out.strip()
    Image.new("RGB", (80, 60), (200, 40, 90)).save(tmp_path / "image.png")
    environment = {**os.environ, "TOKEN": token, "KEY": open_store(world.store).keys(0)[0]}
    name, _ = world.teacher
    options = ("--teacher", name, "--checkpoint", str(world.checkpoint), "--device", "cpu")
    with running_service(world.store, "--tokens", str(tmp_path / "tokens.jsonl"), *options) as running:
        commands = re.findall(r"^curl .*$", DOCS, re.MULTILINE)
        assert len(commands) == 8
        for command in commands:
            asked = command.replace("http://127.0.0.1:8000", running.url)
            done = subprocess.run(asked, shell=True, cwd=tmp_path, env=environment, capture_output=True, timeout=60)
            assert done.returncode == 0, (command, done.stdout, done.stderr)
    for file in ("row", "rows", "unit", "live"):
        arrays, strings = frames.decode((tmp_path / f"{file}.safetensors").read_bytes())
        assert "stage4" in arrays
        assert "crc32c.stage4" in strings
    assert len((tmp_path / "part.bin").read_bytes()) == 100


def test_page_names_every_problem_and_each_paths_scope():
    listed = re.search(r"one of\n`([^`]+)`", DOCS)
    assert listed is not None
    assert listed[1].split() == list(KINDS)
    table = create_app(Service(ServeConfig(store="store.zarr"))).state.table
    for paths, scope in re.findall(r"^\| (`.*?) \| (none|read|compute|admin) \|", DOCS, re.MULTILINE):
        for path in re.findall(r"`(?:GET |POST )?(/[^`?]*)", paths):
            assert (table.rule(path.replace("{", "").replace("}", "")).scope or "none") == scope, path
