"""Names in the files of deploy/: metrics, options and environment variables that do not exist are found."""

import re
from pathlib import Path

import pytest
from command_lines import DEPLOY, OTHERS, every_option, invocations, known_variables, unknown_options
from prometheus_client.metrics_core import Metric
from tiny_store import tiny_manifest

from teacher_service.cache.decode import Task
from teacher_service.cache.observers import Metrics as JobMetrics
from teacher_service.serve.metrics import Metrics as ServiceMetrics

FOLDERS = ("helm", "kubernetes", "monitoring", "slurm", "check")
FILES = [
    path
    for folder in FOLDERS
    for path in sorted((DEPLOY / folder).rglob("*"))
    if path.is_file() and not path.is_symlink() and path.suffix not in (".pyc", ".json") and "/files/" not in str(path)
] + [DEPLOY / "OPERATIONS.md"]
DOCUMENTS = [path for path in FILES if path.suffix == ".md"]
FOREIGN_OPTIONS = {"--array", "--requeue", "--strict"}
"""Options of sbatch or helm that documents name alone."""


def _id(path: Path) -> str:
    return path.relative_to(DEPLOY).as_posix()


@pytest.fixture(scope="module")
def metrics() -> set[str]:
    """Names of metrics as they are exposed, and their families."""
    with JobMetrics("127.0.0.1", 0, tiny_manifest(), [Task(0, range(1))]) as job:
        from urllib.request import urlopen

        with urlopen(job.url, timeout=10) as response:
            text = response.read().decode() + ServiceMetrics().text().decode()
    names = set(re.findall(r"^# TYPE (\w+) ", text, re.MULTILINE))
    families: list[Metric] = list(ServiceMetrics().registry.collect())
    suffixes = [
        f"{each.name}{end}" for each in families if each.type == "histogram" for end in ("_bucket", "_count", "_sum")
    ]
    return names | set(suffixes)


@pytest.mark.parametrize("path", FILES, ids=_id)
def test_file_names_no_metric_that_does_not_exist(path: Path, metrics: set[str]) -> None:
    named = set(re.findall(r"\b(?:scalekd|teacher_service)_[a-z_]*[a-z]\b(?!\.)", path.read_text()))
    assert named - metrics - {"teacher_service", "scalekd_cache"} == set()


@pytest.mark.parametrize("path", FILES, ids=_id)
def test_file_names_no_option_that_does_not_exist(path: Path) -> None:
    text = path.read_text()
    assert unknown_options(text) == []
    if path in DOCUMENTS:
        alone = set(re.findall(r"`(--[a-z][\w.-]*)", text))
        assert alone - every_option() - FOREIGN_OPTIONS == set()


@pytest.mark.parametrize("path", FILES, ids=_id)
def test_file_names_no_environment_variable_that_nothing_reads(path: Path) -> None:
    named = set(
        re.findall(
            r"\b(?:SCALEKD|FEATURE_STORE|TEACHER_SERVICE|STUDENT_TRAINER|AWS|PROMETHEUS)_[A-Z0-9_]+", path.read_text()
        )
    )
    assert (
        named - known_variables() - OTHERS.keys() - {"SCALEKD_TEST_SLURM", "SCALEKD_TEST_PODS", "AWS_SECRET_ACCESS_KEY"}
        == set()
    )


@pytest.mark.parametrize("path", DOCUMENTS, ids=_id)
def test_links_of_a_document_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[\w-]+)?\)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


def test_the_finder_sees_command_lines_and_what_is_wrong_with_them() -> None:
    text = (
        "teacher-service serve --store a \\\n  --prot 1 && feature-store verify --quick --fast\n`feature-store inspect`"
    )
    assert [command for _, command, _ in invocations(text)] == ["serve", "verify"]
    assert unknown_options(text) == [
        "teacher-service serve --prot",
        "feature-store verify --fast",
        "feature-store inspect",
    ]
    assert sum(len(invocations(path.read_text())) for path in DOCUMENTS) >= 20
