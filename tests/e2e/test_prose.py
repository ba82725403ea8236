"""House style of pages, docstrings, help texts and messages: spelling, words, openings, length of sentences."""

import ast
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
STYLE = tomllib.loads((ROOT / "tests/house_style.toml").read_text())
PACKAGES = ("feature_store", "teacher_service", "student_trainer")
PROGRAMS = ("benchmarks", "demo", "deploy", "docs", "examples")  # of which docstrings are checked
GENERATED = {ROOT / "docs/map.md", *(ROOT / "docs/reference" / f"{n}.md" for n in ("cli", "errors", "http", "python"))}
PAGES = sorted(
    {
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "deploy").rglob("*.md"),
        *ROOT.glob("*.md"),
        ROOT / "benchmarks/README.md",
        ROOT / "feature_store/FORMAT.md",
    }
    - GENERATED
)
MODULES = sorted(module for folder in (*PACKAGES, *PROGRAMS) for module in (ROOT / folder).rglob("*.py"))
ITEM = rf"^ +[\w.]+: (?:{'|'.join(w for w in STYLE['openings'] if w.isalpha())}) .*"
"""An attribute, argument or error of a docstring's section with such an opening."""
SPELLED = ["docs", "deploy", "demo", "examples", "benchmarks", *PACKAGES, *(p.name for p in ROOT.glob("*.md"))]


def paragraphs_of_page(text: str) -> Iterator[str]:
    """Paragraphs, headings and cells; code in backquotes is ``CODE``, blocks are left out."""
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type == "inline":
            parts = ("CODE" if part.type == "code_inline" else part.content for part in token.children or ())
            yield re.sub(r"\s+", " ", "".join(part or " " for part in parts))


def paragraphs_of_docstring(text: str) -> Iterator[str]:
    """Paragraphs and items of sections; drawings, formulas and tables, which are indented, are left out."""
    for block in re.split(r"\n\s*\n", text):
        for item in re.split(r"\n(?= *[\w ]+: )", block):
            if not re.match(r" {4}(?! *[\w ]+: )|[├=*]", item) and "├" not in item and "  = " not in item:
                yield re.sub(r"`+[^`]*`+", "CODE", re.sub(r"\s+", " ", item)).strip()


def texts_of_module(source: str) -> tuple[list[str], list[str]]:
    """Docstrings, and all other texts of at least four words; what an f-string fills in is ``CODE``."""
    tree = ast.parse(source)
    loose = [node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)]
    docstrings = [inspect.cleandoc(n.value) for n in loose if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    joined = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    inside = {id(node) for text in joined for node in ast.walk(text)} | {id(node) for node in loose}
    messages = ["".join(v.value if isinstance(v, ast.Constant) else "CODE" for v in text.values) for text in joined]
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            messages.append(node.value)
    return docstrings, [text for text in messages if text.count(" ") >= 3]


def faults(paragraph: str) -> list[str]:
    """Words the house does not use, and sentences that are too long."""
    found = [
        f"{match[0]!r}: write {better}; in: {paragraph[:100]}"
        for words, better in STYLE["words"].items()
        if (match := re.search(rf"\b(?:{words})\b", paragraph, re.IGNORECASE))
    ]
    for sentence in re.split(r"(?<=[.!?:;])\s", paragraph):
        words = sentence.split()
        if len(words) > STYLE["max_words"]:
            found.append(f"{len(words)} words, at most {STYLE['max_words']}: {sentence[:100]}")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_page_keeps_the_house_style(page):
    assert [fault for paragraph in paragraphs_of_page(page.read_text()) for fault in faults(paragraph)] == []


@pytest.mark.parametrize("package", [*PACKAGES, *PROGRAMS])
def test_docstrings_and_messages_keep_the_house_style(package):
    wrong = []
    for module in MODULES:
        if module.is_relative_to(ROOT / package):
            docstrings, messages = texts_of_module(module.read_text())
            messages = messages if package in PACKAGES else []  # elsewhere also configuration files
            paragraphs = [p for text in docstrings for p in paragraphs_of_docstring(text)]
            found = [
                fault for text in (*paragraphs, *(" ".join(m.split()) for m in messages)) for fault in faults(text)
            ]
            opening = tuple(f"{word} " for word in STYLE["openings"])
            found += [f"item: {item}" for text in docstrings for item in re.findall(ITEM, text, re.MULTILINE)]
            found += [f"opens with {text.split()[0]}: {text[:80]}" for text in docstrings if text.startswith(opening)]
            wrong += [f"{module.relative_to(ROOT)}: {fault}" for fault in found]
    assert wrong == []


def test_spelling_is_right():
    """codespell knows common misspellings; words it takes for one are listed in pyproject.toml."""
    done = subprocess.run(
        [sys.executable, "-m", "codespell_lib", *SPELLED],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_faults_are_found():
    assert faults("Nobody mends it.")[0].startswith("'Nobody'")
    assert len(faults("Nobody mends it.")) == 2
    assert faults("word " * 36)[0].startswith("36 words")
    assert faults("word " * 30 + "end. " + "word " * 30) == []
    page = "---\na: nobody\n---\n# Anew\n\n| `anew` | by now |\n|---|---|\n\n```\nwhoever\n```\n"
    assert [len(faults(p)) for p in paragraphs_of_page(page)] == [1, 0, 1]
    docstrings, messages = texts_of_module('"""What it is."""\nraise ValueError(f"{a} goes on for now, see {b}")\n')
    assert docstrings == ["What it is."]
    assert [len(faults(m)) for m in messages] == [1]
