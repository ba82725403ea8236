"""Writes docs/map.md: every module with the first line of its docstring."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("feature_store", "teacher_service", "student_trainer", "examples", "demo", "benchmarks")
HEAD = """# Map of modules

Made by `python docs/make_map.py` from the first lines of the modules; the tree of folders is in the README.
"""


def first_line(module: Path) -> str:
    """First line of a module's docstring; empty without one."""
    docstring = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]


def folders() -> list[Path]:
    """Folders that hold modules, parents first."""
    found = {module.parent for package in PACKAGES for module in (ROOT / package).rglob("*.py")}
    return sorted(found, key=lambda folder: (PACKAGES.index(folder.relative_to(ROOT).parts[0]), folder))


def section(folder: Path) -> str:
    """One folder's heading and table."""
    package = folder / "__init__.py"
    about = first_line(package) if package.exists() else ""
    rows = [f"| `{m.stem}` | {first_line(m)} |" for m in sorted(folder.glob("*.py")) if not m.name.startswith("__")]
    lines = [f"## {folder.relative_to(ROOT).as_posix()}/", ""] + ([about, ""] if about else [])
    return "\n".join(lines + (["| module | purpose |", "|---|---|", *rows, ""] if rows else []))


def text() -> str:
    """The whole page."""
    return "\n".join([HEAD, *map(section, folders())])


if __name__ == "__main__":
    (ROOT / "docs/map.md").write_text(text(), encoding="utf-8")
