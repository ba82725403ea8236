"""`make audit` finds what it is for: licences, vulnerabilities, missing answers."""

from pathlib import Path
from runpy import run_path

import pytest
from packaging.requirements import Requirement

AUDIT = run_path(str(Path(__file__).parents[2] / "deploy/check/lib/audit.py"))


@pytest.mark.parametrize(("stated", "fine"), [
    ("MIT License", True), ("Apache-2.0 WITH LLVM-exception", True), ("LGPL-2.1-or-later", True),
    ("GNU Lesser General Public License v3 (LGPLv3)", True), ("BSD-3-Clause OR GPL-2.0", False),
    ("GPL-3.0-only", False),
    ("GNU General Public License v2 (GPLv2)", False), ("AGPL-3.0", False), ("unknown", False), ("Commercial", False),
])  # fmt: skip
def test_licence_is_found_unless_it_is_known_and_no_strong_copyleft(tmp_path, monkeypatch, stated, fine):
    monkeypatch.setitem(AUDIT["LICENCES"], "some-package", stated)
    found = AUDIT["licences"]({"some-package": "1.0"}, tmp_path / "licences.txt")
    assert found == ([] if fine else [f"licence of some-package: {stated}"])
    assert (tmp_path / "licences.txt").read_text() == f"some-package 1.0: {stated}\n"


def test_vulnerability_is_found_with_the_release_that_fixes_it():
    rows = [
        {"name": "a", "version": "1", "vulns": [{"id": "PYSEC-1", "fix_versions": ["1.1"]}]},
        {"name": "b", "version": "2"},
    ]
    assert AUDIT["vulnerabilities"](rows) == ["a 1: PYSEC-1, fixed in 1.1"]


def test_requirements_are_those_of_pyproject_and_what_they_need():
    names = {requirement.name for requirement in AUDIT["own_requirements"]("all")}
    assert {"numpy", "torch", "fastapi", "ray", "obstore", "matplotlib"} <= names
    assert "scalekd-cache" not in names
    found = AUDIT["needed"]([Requirement("fastapi"), Requirement("torch; extra == 'never'")], {})
    assert {"fastapi", "starlette", "anyio"} <= set(found)
    assert "torch" not in found
