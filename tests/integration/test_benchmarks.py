"""Benchmarks: `make bench` runs without options, folders of the user are left as they were, contenders alternate."""

import importlib
import json
import re
from pathlib import Path

import pytest

from benchmarks import opening
from benchmarks.turns import ratio, take_turns

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


def test_contenders_take_turns_and_each_round_starts_with_another():
    calls = []
    turns = {name: lambda number, name=name: calls.append(name) or number for name in "abc"}
    assert take_turns(turns, 3) == {name: [1, 2, 3] for name in "abc"}  # 0 warms up
    assert "".join(calls) == "abcbcacababc"


def test_ratio_is_of_times_of_the_same_round():
    assert ratio({"a": [1, 20, 3], "b": [2, 40, 3]}, "b", "a") == 2  # the medians' ratio would be 1
