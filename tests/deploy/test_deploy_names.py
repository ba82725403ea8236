"""Names in the files of deploy/: metrics, options and environment variables that do not exist are found."""

import re
from pathlib import Path

import pytest
from command_lines import DEPLOY, OTHERS, invocations, known_variables, unknown_options
from prometheus_client.metrics_core import Metric
from tiny_store import tiny_manifest

from teacher_service.cache.decode import Task
from teacher_service.cache.observers import Metrics as JobMetrics
from teacher_service.serve.metrics import Metrics as ServiceMetrics

FILES = [
    path
    for path in sorted(DEPLOY.rglob("*"))
    if path.is_file() and not path.is_symlink() and path.suffix not in (".pyc", ".json") and "/files/" not in str(path)
]


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


@pytest.mark.parametrize("path", [path for path in FILES if "nginx" not in path.parts], ids=_id)  # names of zones
def test_file_names_no_metric_that_does_not_exist(path: Path, metrics: set[str]) -> None:
    named = set(re.findall(r"\b(?:scalekd|teacher_service)_[a-z_]*[a-z]\b(?!\.)", path.read_text()))
    assert named - metrics - {"teacher_service", "scalekd_cache"} == set()


@pytest.mark.parametrize("path", FILES, ids=_id)
def test_file_names_no_option_that_does_not_exist(path: Path) -> None:
    assert unknown_options(path.read_text()) == []


@pytest.fixture(scope="module")
def variables() -> set[str]:
    """Variables that the programs or their libraries read, and those that deploy/ defines for its own files."""
    defined = {
        name
        for path in FILES
        if path.name.endswith((".env", ".env.example"))
        for name in re.findall(r"^#? ?([A-Z_]+)=", path.read_text(), re.MULTILINE)
    }
    template = (DEPLOY / "nginx/teacher-service.conf.template").read_text()
    described = re.findall(r"^#   ([A-Z_]+(?:, [A-Z_]+)*) ", template, re.MULTILINE)
    of_tests = {"SCALEKD_TEST_SLURM", "SCALEKD_TEST_PODS"}
    return {
        *known_variables(),
        *OTHERS,
        *defined,
        *of_tests,
        *(name for names in described for name in names.split(", ")),
    }


@pytest.mark.parametrize("path", FILES, ids=_id)
def test_file_names_no_environment_variable_that_nothing_reads(path: Path, variables: set[str]) -> None:
    ours = r"\b(?:SCALEKD|FEATURE_STORE|TEACHER_SERVICE|STUDENT_TRAINER|PROMETHEUS)_[A-Z0-9_]+"
    assert set(re.findall(ours, path.read_text())) - variables == set()


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
    assert sum(len(invocations(path.read_text())) for path in FILES) >= 20
