"""A store's card says what the store holds, and every line of code in it runs."""

import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from command_lines import PROGRAMS
from image_folders import class_samples, write_folder
from service_process import running_service
from tiny_jobs import TinyTeacher, cache_config
from tiny_store import tiny_store

from feature_store import open_store
from feature_store.tools.card import SERVICE, write_card
from feature_store.tools.cli import main
from feature_store.tools.verify import verify
from teacher_service.cache.job import cache


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_swin: TinyTeacher) -> Path:
    folder = tmp_path_factory.mktemp("card")
    tree = write_folder(folder / "tree", class_samples(6))
    options = {"unit_samples": 3, "views": 2, "tap_codec": "int8", "licence_note": "CC BY 4.0"}
    cache(cache_config([str(tree)], tiny_swin, folder / "store", **options))
    return folder / "store"


def _blocks(readme: str) -> list[tuple[str, str]]:
    return re.findall(r"^```(\w+)\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)


def test_every_line_of_code_in_a_card_runs(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["card", str(store)]) == 0
    blocks = _blocks((store / "README.md").read_text())
    monkeypatch.chdir(tmp_path)
    ran: list[str] = []
    results: list[dict] = []

    with running_service(store) as running:
        for language, code in blocks:
            if language == "python":
                results.append({})
                exec(code.replace(SERVICE, running.url), results[-1])
                ran += code.splitlines()
                continue
            for line in code.splitlines():
                program, command, *arguments = shlex.split(line)
                if command == "serve":  # it runs already, on a free port
                    assert arguments == ["--store", str(store), "--port", "8000"]
                else:
                    assert PROGRAMS[program]([command, *arguments]) == 0
                ran.append(line)

    assert ran == [line for _, code in blocks for line in code.splitlines()]
    opened, array, served = results
    np.testing.assert_array_equal(opened["features"], served["features"])
    assert array["values"].shape == opened["features"].shape[1:]
    assert not verify(tmp_path / "my-copy").findings
    assert not verify(store).findings  # a card in a store does no harm


def test_card_says_what_the_store_holds(store: Path, tmp_path: Path) -> None:
    readme, page = write_card(open_store(store), tmp_path, url="s3://bucket/features")

    text = readme.read_text()
    facts = ("swin\\_tiny\\_patch4\\_window7\\_224", "12 of 12 committed", "6 in 2 units", "CC BY 4.0", "codec int8")
    more = ("4: ant, bee, cat, dog", "| found in | folder |", "at most", "open_store('s3://bucket/features')")
    for fact in (*facts, *more):
        assert fact in text, fact
    parser = _Text()
    parser.feed(page.read_text())
    for fact in ("swin_tiny_patch4_window7_224", "12 of 12 committed", "open_store('s3://bucket/features')"):
        assert fact in "".join(parser.found)


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_data(self, data: str) -> None:
        self.found.append(data)


def test_card_escapes_what_a_store_says(tmp_path: Path) -> None:
    from dataclasses import replace

    from tiny_store import tiny_manifest

    manifest = replace(tiny_manifest(), licence="<script>alert(1)</script> | [x](http://evil)")
    readme, page = write_card(tiny_store(tmp_path / "s", manifest), tmp_path / "out")

    assert "<script>" not in page.read_text()
    assert r"\<script\>alert(1)\</script\> \| \[x\]" in readme.read_text()


def test_card_of_a_store_without_rows_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_store(tmp_path / "s", units=())
    assert main(["card", str(tmp_path / "s"), "--out", str(tmp_path / "out")]) == 2
    assert "has no committed row" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["card", "plot"])
@pytest.mark.parametrize("out", ["file", "file/below"])
def test_out_is_refused_when_it_is_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, out: str
) -> None:
    tiny_store(tmp_path / "s", units=(0,))
    (tmp_path / "file").write_text("mine")
    assert main([command, str(tmp_path / "s"), "--out", str(tmp_path / out)]) == 2
    assert f"--out is {tmp_path / out}, expected a folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"
