"""Notebooks of docs/notebooks run from the first to the last cell and come to what their text says."""

import contextlib
import re
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest

pytestmark = pytest.mark.notebooks
NOTEBOOKS = Path(__file__).parents[2] / "docs/notebooks"


def cells(page: Path) -> list[str]:
    return re.findall(r"^```{code-cell} python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Names that a notebook leaves behind, and how many figures it drew."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def execute(name: str) -> tuple[dict, int]:
        names: dict = {"__name__": "notebook"}
        with mpl.rc_context({"backend": "agg"}), contextlib.ExitStack() as stack:
            stack.callback(plt.close, "all")
            for number, cell in enumerate(cells(NOTEBOOKS / name), 1):
                exec(compile(cell, f"{name}, cell {number}", "exec"), names)
            return names, len(plt.get_fignums())

    return execute


def test_digits_notebook_trains_both_students_and_exports_one(run):
    names, figures = run("digits.md")
    assert figures == 2
    assert names["teacher"].top1 > 85
    assert names["results"]["none"].steps == names["results"]["scalekd"].steps > 0
    assert len(names["steps"]) == names["results"]["none"].steps  # curves have every step
    assert len(names["epochs"]) == 3
    assert all(result.last_top1 > 60 for result in names["results"].values())
    assert {file.name for file in names["files"]} >= {"model.safetensors", "config.json"}


def test_store_notebook_finds_neighbours_and_orders_codecs_by_error(run):
    names, figures = run("store.md")
    labels, nearest = names["labels"], names["nearest"]
    assert figures == 4
    assert (labels[nearest[:, 0]] == labels).mean() > 0.7
    errors = {codec: rms for codec, (_, rms, _) in names["table"].items()}
    assert 0 == errors["f32"] < errors["f16"] < errors["int8"] < errors["int6"] < errors["int4"] < 0.5


def test_own_loop_notebook_learns_with_and_without_a_teacher(run):
    names, figures = run("own-loop.md")
    assert figures == 1
    assert all(accuracy > 0.6 for accuracy in names["accuracy"].values())
    history = names["runs"]["ScaleKD"][1]
    assert history[-1]["kd"] < history[0]["kd"]


def test_every_notebook_has_a_test():
    named = re.findall(r'run\("([\w-]+\.md)"\)', Path(__file__).read_text())
    assert sorted(named) == sorted(page.name for page in NOTEBOOKS.glob("*.md") if cells(page))
