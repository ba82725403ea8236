"""Pages: blocks are run or opted out, links and options exist, generated pages are current, the site builds."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from runpy import run_path
from urllib.request import urlopen

import pytest
from command_lines import every_option, unknown_options
from tiny_store import tiny_manifest

from teacher_service.cache.decode import Task
from teacher_service.cache.observers import Metrics as JobMetrics
from teacher_service.serve.metrics import Metrics as ServiceMetrics

ROOT = Path(__file__).parents[2]
PAGES = [
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "deploy").rglob("*.md")),
    *sorted(ROOT.glob("*.md")),
    ROOT / "feature_store/FORMAT.md",
    ROOT / "benchmarks/README.md",
]
GENERATED = ("cli.md", "presets.md", "errors.md", "http.md", "python.md")
FOREIGN_OPTIONS = {
    "--array", "--requeue", "--strict", "--shm-size", "--ipc", "--nproc-per-node", "--build-arg", "--gpus", "--peers",
    "--tars", "--samples", "--backbone", "--profile", "--max-", "--sample", "--quick", "--signal", "--help",
    "--data", "--only",
}  # fmt: skip
"""Options of docker, torchrun, sbatch, helm and of the benchmarks, demo and examples."""


def _id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def code_blocks(text: str) -> list[tuple[int, str, str]]:
    """Line, language and the last line before each block; of fenced ones and of those that are indented."""
    found, fence, before, lines = [], "", "", text.splitlines()
    for number, line in enumerate(lines, 1):
        opening = re.match(r" *(`{3,})(.*)", line)
        if fence:
            fence = "" if line.strip() == fence else fence
            before = "block" if not fence else before
        elif opening:
            found.append((number, opening[2].strip(), before))
            fence = opening[1]
        elif line.startswith("    ") and line.strip() and number > 1 and not lines[number - 2].strip():
            if not re.match(r"[-*\d]", before):
                found.append((number, "indented", before))
            before = line
        elif line.strip():
            before = line
    return found


def unaccounted(text: str, page: str) -> list[str]:
    """Blocks without a comment that names a test which reads the page, or gives a reason why none runs it."""
    wrong = []
    for number, language, before in code_blocks(text):
        if language == "text" or (language.startswith("{") and "code" not in language):  # output, drawings, directives
            continue
        # The build and test_notebooks.py execute the cells of notebooks.
        if language == "{code-cell} python" and "docs/notebooks/" in page:
            continue
        runs, reason = re.match(r"<!-- runs: (\S+) -->", before), re.match(r"<!-- not run: (.*) -->", before)
        named = re.findall(r"tests/[\w/]+\.py", before)
        if not (runs or (reason and len(reason[1].split()) >= 4)):
            wrong.append(f"line {number}: no comment says which test runs it, or why none does")
        elif missing := [name for name in named if not (ROOT / name).is_file()]:
            wrong.append(f"line {number}: {missing[0]} is not there")
        elif runs and Path(page).name not in (ROOT / runs[1]).read_text() and "demo" not in runs[1]:
            wrong.append(f"line {number}: {runs[1]} does not name {Path(page).name}")
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_every_block_of_a_page_is_run_or_opted_out(page):
    assert unaccounted(page.read_text(), _id(page)) == []


def test_blocks_without_a_word_about_them_are_found():
    text = "A:\n\n```\nls\n```\n\n<!-- not run: no -->\n```bash\nls\n```\n\nB:\n\n    ls\n\n"
    text += "<!-- runs: tests/none.py -->\n```\n```\n"
    assert [line.partition(":")[0] for line in unaccounted(text, "a.md")] == ["line 3", "line 8", "line 14", "line 17"]
    assert unaccounted("```text\nout\n```\n\n<!-- not run: it needs a GPU -->\n```\nls\n```\n", "a.md") == []
    assert len(unaccounted("```{code-cell} python\nprint()\n```\n", "docs/start/index.md")) == 1
    assert sum(len(code_blocks(page.read_text())) for page in PAGES) >= 60


def anchors(text: str) -> set[str]:
    """Anchors of a page's headings, as code hosts and MyST make them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_links_of_a_page_lead_somewhere(page):
    text = re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE))
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([\w-]+))?\)", text):
        if target.startswith(("http", "mailto:")):
            continue
        path = page.parent / target if target else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text()), f"{target}#{anchor}"


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in ("CHANGELOG.md", *GENERATED)], ids=_id)
def test_options_named_on_a_page_exist(page):
    text = page.read_text()
    assert unknown_options(text) == []
    alone = {option.rstrip(".") for option in re.findall(r"`(--[a-z][\w.-]*)", text)}
    alone = {option for option in alone if not option.startswith(("--expect", "--scalekd", "--kd", "--fd", "--optim"))}
    assert alone - every_option() - FOREIGN_OPTIONS == set()


@pytest.mark.parametrize("name", GENERATED)
def test_generated_page_is_current(name):
    text = run_path(str(ROOT / "docs/make_reference.py"))["PAGES"][name]()
    assert (ROOT / "docs/reference" / name).read_text() == text, "run `python docs/make_reference.py`"


def test_version_is_the_same_wherever_it_is_named():
    release = run_path(str(ROOT / "docs/release_check.py"))
    assert len(set(release["versions"]().values())) == 1, release["versions"]()
    assert release["stale"]() == []


def test_citation_and_issue_forms_fit_their_schemas():
    for schema, files in {
        "vendor.citation-file-format": ["CITATION.cff"],
        "vendor.github-issue-forms": sorted(
            str(file) for file in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if file.stem != "config"
        ),
    }.items():
        assert files
        command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *files]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout


def test_flow_picture_is_current():
    text = run_path(str(ROOT / "docs/make_flow.py"))["text"]()
    assert (ROOT / "docs/flow.svg").read_text() == text, "run `python docs/make_flow.py`"


@cache
def texts_of_the_code() -> list[str]:
    """Every string of the packages; what an f-string fills in is ``...``."""
    found = []
    for package in ("feature_store", "teacher_service", "student_trainer"):
        for module in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(module.read_text())):
                if isinstance(node, ast.JoinedStr):
                    found.append("".join(v.value if isinstance(v, ast.Constant) else "..." for v in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


def test_messages_of_the_troubleshooting_page_are_the_codes():
    messages = re.findall(r"^\| `(.*?)` \|", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)
    assert len(messages) >= 20
    for message in messages:
        pattern = re.compile(".*".join(map(re.escape, message.split("..."))), re.DOTALL)
        assert any(map(pattern.match, texts_of_the_code())), message


def test_metrics_page_names_every_metric_and_no_other():
    with (
        JobMetrics("127.0.0.1", 0, tiny_manifest(), [Task(0, range(1))]) as job,
        urlopen(job.url, timeout=10) as response,
    ):
        text = response.read().decode() + ServiceMetrics().text().decode()
    exposed = re.findall(r"^# HELP ((?:scalekd|teacher_service)_\w+)", text, re.MULTILINE)
    named = re.findall(r"^\| `(\w+_\w+)` \|", (ROOT / "docs/reference/metrics.md").read_text(), re.MULTILINE)
    assert set(named) == {name for name in exposed if not name.endswith("_created")}


def test_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-c", "docs", ".", str(tmp_path / "site")]
    command += ["-D", "nb_execution_mode=off"]  # test_notebooks.py runs them
    done = subprocess.run(
        [*command, "-d", str(tmp_path / "cache")], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    for page in ("index", "docs/index", "docs/reference/cli", "deploy/README", "feature_store/FORMAT"):
        assert (tmp_path / "site" / f"{page}.html").is_file()
