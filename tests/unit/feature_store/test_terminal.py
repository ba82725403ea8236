import io
import json
import logging
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table
from signed_store import sign
from tiny_store import tiny_store

from feature_store.tools.cli import main
from feature_store.tools.info import print_report
from feature_store.tools.terminal import Console, LogFormatter, json_text, printable, say, say_json
from feature_store.tools.verify import verify

EVIL = "\x1b[2J\x1b]0;title\x07\x9b31m\u202eabc\r\n\x7f\udce9 [red]x[/b] :smile:"
SHOWN = r"\x1b[2J\x1b]0;title\x07\x9b31m\u202eabc\r\n\x7f\udce9 [red]x[/b] :smile:"


@given(st.text(st.characters()))
def test_printable_text_is_one_line_without_control_characters_for_any_text(text):
    shown = printable(text)
    assert shown.isprintable()
    shown.encode()  # no lone surrogates
    if text.isprintable():
        assert shown == text


def test_console_shows_markup_and_escapes_when_they_are_in_text_cells_or_titles():
    out = io.StringIO()
    console = Console(file=out, width=400)
    table = Table(EVIL, title=EVIL, title_justify="left")
    table.add_row(EVIL)
    console.print(EVIL)
    console.print(table)
    assert out.getvalue().count(SHOWN) == 4
    assert all(line.isprintable() for line in out.getvalue().splitlines())


def test_lines_and_json_are_printable_when_values_are_not(capsys):
    say(EVIL, "second")
    say(EVIL, error=True)
    say_json({EVIL: EVIL})
    out, err = capsys.readouterr()
    assert out.splitlines()[:2] == [SHOWN, "second"]
    assert err == f"{SHOWN}\n"
    assert json.loads(out.splitlines()[2]) == {EVIL: EVIL}
    assert json_text({"a": EVIL}).isprintable()


def test_log_lines_are_printable_when_messages_and_exceptions_are_not():
    try:
        raise ValueError(EVIL)
    except ValueError:
        record = logging.LogRecord("name", logging.ERROR, "file", 1, "said %s", (EVIL,), sys.exc_info())
    lines = LogFormatter("%(name)s: %(message)s").format(record).split("\n")
    assert lines[0] == f"name: said {SHOWN}"
    assert lines[1] == "Traceback (most recent call last):"
    assert all(line.isprintable() for line in lines)


@pytest.fixture
def evil(tmp_path):
    """A store whose every string is evil, at a path that is markup."""
    path = tmp_path / "runs[v2]" / "a[/b]\x1b[31m"
    path.parent.mkdir(parents=True)
    tiny_store(path, quarantined={1: EVIL})

    def change(stated):
        stated.update(licence=EVIL, software={EVIL: EVIL})
        stated["teacher"].update(name=EVIL, model_kwargs={EVIL: EVIL})
        stated["split"].update(family=EVIL, prefix=EVIL)
        stated["policy"].update(name=EVIL)
        stated["tars"][0].update(name=EVIL)

    sign(path, manifest=change, record=lambda stated: stated.update(tar=EVIL, software={EVIL: EVIL}))
    (path / EVIL.replace("/", "")).write_bytes(b"not of this format")
    return path


def test_commands_print_a_stores_strings_as_text(evil, capsys):
    assert main(["info", str(evil)]) == 0
    assert main(["verify", str(evil), "--workers", "1"]) == 0
    assert main(["repair", str(evil), "--workers", "1"]) == 0
    assert main(["info", str(evil / "missing")]) == 2
    out, err = capsys.readouterr()
    assert all(line.isprintable() for line in (out + err).splitlines())
    for shown in (r"a[/b]\x1b[31m", "[red]x[/b]", ":smile:"):
        assert shown in out.replace("\n", "")  # the title is broken to the table's width


def test_json_keeps_a_stores_strings_exactly(evil, capsys):
    assert main(["info", str(evil), "--json"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out)["licence"] == EVIL
    assert all(line.isprintable() for line in out.splitlines())


def test_reports_show_findings_about_a_stores_strings_as_text(evil):
    (evil / "label/c/0").unlink()
    out = io.StringIO()
    print_report(verify(evil), Console(file=out, width=400))
    assert "label/c/0" in out.getvalue()
    assert all(line.isprintable() for line in out.getvalue().splitlines())


def test_wrong_usage_is_told_as_text_when_arguments_hold_escapes(capsys):
    assert main(["info", "store", "--\x1b[2J"]) == 2
    assert main(["\x1b[2J"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert all(line.isprintable() for line in err.splitlines())
    assert err.count(r"\x1b[2J") == 2
