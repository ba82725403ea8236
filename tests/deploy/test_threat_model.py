"""docs/threat-model.md: the tests it names exist, and options it names are options."""

import re
from pathlib import Path

from command_lines import every_option

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/threat-model.md").read_text()


def test_named_tests_exist():
    named = set(re.findall(r"`(test_\w+)`", TEXT))
    defined = {
        name
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)
    }
    assert len(named) > 30
    assert named - defined == set()


def test_named_options_exist():
    assert set(re.findall(r"`(--[\w*-]+)", TEXT)) - every_option() - {"--max-*"} == set()
