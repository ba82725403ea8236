"""Benchmarks: what `make bench` runs needs no options, and folders of the user are left as they were."""

import importlib
import json
import re
from pathlib import Path

import pytest

from benchmarks import opening

MAKEFILE = Path(__file__).parents[2] / "Makefile"
(NAMES,) = re.findall(r"for name in ([\w ]+); do", MAKEFILE.read_text())


@pytest.mark.parametrize("name", [name for name in NAMES.split() if name != "preset_flops"])  # which has no options
def test_every_option_of_a_benchmark_has_a_default(name):
    module = importlib.import_module(f"benchmarks.{name}")
    options = getattr(module, "Config", None) or module.Setting
    assert options() == options()


def test_benchmark_removes_nothing_but_what_it_wrote(tmp_path, capsys):
    (tmp_path / "mine").write_text("kept")
    opening.main(opening.Config(folder=tmp_path, units=2, samples=3, repeats=1))
    assert json.loads(capsys.readouterr().out)["records"] == 2
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"mine": "kept"}
