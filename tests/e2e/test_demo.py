"""The demo's whole path in its quick form: files, ten settings, and a report that says what results.json says."""

import base64
import json
import re
import shlex
from contextlib import redirect_stdout
from html.parser import HTMLParser
from io import BytesIO, StringIO
from pathlib import Path

import numpy as np
import pytest
from command_lines import PROGRAMS
from PIL import Image

from demo.__main__ import main

ROOT = Path(__file__).parents[2]
METHODS = ["No distillation", "KD", "FD", "ScaleKD, store", "ScaleKD, live"]


class ReportReader(HTMLParser):
    """Collects the results table's cells, the pictures and the findings."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.pictures: list[bytes] = []
        self.findings: list[str] = []
        self.addresses: list[str] = []
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag
        if tag == "tr":
            self.rows.append([])
        if tag == "li":
            self.findings.append("")
        for name, value in attrs:
            if name in ("src", "srcset", "href"):
                self.addresses.append(value or "")

    def handle_data(self, data: str) -> None:
        if self._inside == "td":
            self.rows[-1].append(data)
        if self._inside == "li":
            self.findings[-1] += data

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "out"
    printed = StringIO()
    with redirect_stdout(printed):
        assert main(["--quick", "--out", str(folder)]) == 0
    (folder / "stdout.txt").write_text(printed.getvalue())
    return folder


@pytest.fixture(scope="module")
def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def report(out: Path) -> ReportReader:
    return ReportReader((out / "report.html").read_text())


def test_demo_results_hold_all_ten_settings_when_quick(results):
    settings = [(row["labels"], row["method"]) for row in results["settings"]]
    assert settings == [(labels, method) for labels in ("few", "all") for method in METHODS]
    assert {row["steps"] for row in results["settings"]} == {4}
    assert all(len(row["curves"][0]) == 4 for row in results["settings"])


def test_demo_only_live_runs_spend_teacher_seconds_when_students_train(results):
    spent = {row["method"]: row["teacher_seconds"] > 0 for row in results["settings"]}
    assert spent == {method: method == "ScaleKD, live" for method in METHODS}
    assert results["store"]["teacher_seconds"] > 0


def test_demo_store_and_live_losses_agree_when_seed_is_the_same(results):
    by_name = {(row["labels"], row["method"]): row["curves"][0] for row in results["settings"]}
    for labels in ("few", "all"):
        store, live, plain = (by_name[labels, name] for name in (METHODS[3], METHODS[4], METHODS[0]))
        np.testing.assert_allclose(store, live, rtol=1e-2)
        assert store[0] == pytest.approx(plain[0], rel=1e-5)  # same weights, same views, same labels
        assert store[-1] != plain[-1]


def test_demo_report_table_equals_results_when_read_back(results, report):
    expected = [
        [
            f"{row['labels']} ({row['images']})",
            row["method"],
            f"{sum(row['top1']) / len(row['top1']):.1f}",
            "-",
            "1",
            f"{row['seconds_per_step']:.3f}",
            f"{row['teacher_seconds']:.1f}",
        ]
        for row in results["settings"]
    ]
    assert [cells for cells in report.rows if cells] == expected


def test_demo_terminal_shows_the_same_numbers_when_done(out, results):
    printed = (out / "stdout.txt").read_text()
    numbers = re.findall(r"^ *(?:few|all) \(\d+\)  +(\S.*?)  +([\d.]+) ", printed, re.MULTILINE)
    assert numbers == [(row["method"], f"{row['mean']:.1f}") for row in results["settings"]]


def test_demo_pictures_are_pngs_with_content_when_decoded(report):
    assert len(report.addresses) == 6  # three plots, each for a light and a dark page
    for address in report.addresses:
        kind, encoded = address.split(",", 1)
        assert kind == "data:image/png;base64"  # nothing is fetched from anywhere
        image = Image.open(BytesIO(base64.b64decode(encoded, validate=True)))
        assert image.format == "PNG"
        assert min(image.size) > 200
        pixels = np.asarray(image.convert("RGBA"))
        assert pixels.std(axis=(0, 1)).max() > 10


def test_demo_report_says_it_was_a_rehearsal_when_quick(report):
    assert "rehearsal" in report.findings[0]
    assert len(report.findings) == 8


def test_demo_refuses_a_folder_when_it_holds_something_else(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("do not delete")
    assert main(["--quick", "--out", str(tmp_path)]) == 2
    assert "choose another folder" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "do not delete"


def test_commands_of_the_digits_tutorial_run_on_what_the_demo_leaves(out, capsys):
    text = (ROOT / "docs/tutorials/digits.md").read_text()
    lines = "".join(re.findall(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE)).splitlines()
    assert len(lines) == 5
    for line in lines:
        program, *words = shlex.split(line.replace("demo/out", str(out)))
        words += ["--workers", "0"] if words[0] == "evaluate" else []
        assert PROGRAMS[program](words) == 0, line
    printed = capsys.readouterr().out
    assert "sound" in printed
    assert "top-1" in printed
    assert list((out / "plots").glob("*.html"))
    assert (out / "student/model.safetensors").is_file()
