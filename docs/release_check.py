"""Checks that a release is ready: versions, changelog, generated files, clean tree. Run by ``make release-check``."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from runpy import run_path

ROOT = Path(__file__).parents[1]


def versions() -> dict[str, str]:
    """The version in each file that names it."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        found = {"pyproject.toml": tomllib.load(file)["project"]["version"]}
    for name, pattern in {
        "CITATION.cff": r"^version: (\S+)$",
        "deploy/helm/scalekd-cache/Chart.yaml": r'^appVersion: "(\S+)"$',
        "CHANGELOG.md": r"^## (\d\S*?),? ",
    }.items():
        match = re.search(pattern, (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)
        found[name] = match[1] if match else "none"
    return found


def stale() -> list[str]:
    """Generated files that differ from what their scripts make."""
    pages = {
        f"docs/reference/{name}": text for name, text in run_path(str(ROOT / "docs/make_reference.py"))["PAGES"].items()
    }
    pages["docs/map.md"] = run_path(str(ROOT / "docs/make_map.py"))["text"]
    pages["docs/flow.svg"] = run_path(str(ROOT / "docs/make_flow.py"))["text"]
    return [name for name, text in pages.items() if (ROOT / name).read_text(encoding="utf-8") != text()]


def problems() -> list[str]:
    """Reasons against a release of the tree; empty if nothing does."""
    found = versions()
    wrong = [] if len(set(found.values())) == 1 else [f"versions differ: {found}; set all to the one to be released"]
    wrong += [f"{name} is not current; run its script in docs/" for name in stale()]
    heading = re.search(r"^## .*$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    if heading is None or not re.search(r"\d{4}-\d\d-\d\d", heading[0]):
        wrong.append(f"CHANGELOG.md begins with {heading and heading[0]!r}, expected '## VERSION, YYYY-MM-DD'")
    changed = subprocess.run(
        ["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    if changed:
        wrong.append(f"{len(changed.splitlines())} files are not committed; commit them")
    return wrong


if __name__ == "__main__":
    print("\n".join(problems()) or "ready")
    sys.exit(1 if problems() else 0)
