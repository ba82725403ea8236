"""Mutation testing: the share of changed programs that the tests of a module notice, module by module.

Run with ``make mutants``. mutmut changes one expression at a time and runs the module's own tests, those in TESTS: fast
ones, in one process. That is a lower bound, for the rest of the suite is not run. ``--sample N`` tries N mutants of
each module, drawn with ``--seed``; 0 tries all of them (hours). Prints one JSON object, in which a mutant that ran into
the time limit is killed; what the survivors changed goes to stderr. ``mutants/`` keeps the work.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mutmut.stats import status_by_exit_code

_STORE = "tests/unit/feature_store/test_"
_TRAINER = "tests/unit/student_trainer/test_"
TESTS = {  # what notices a change, by module
    "feature_store/codecs/*.py": [f"{_STORE}{name}.py" for name in ("codecs", "top_k", "golden_store")],
    "feature_store/commits/*.py": [
        f"{_STORE}{name}.py" for name in ("store", "growth", "repair", "verify", "golden_store", "writers")
    ],
    "feature_store/layout.py": [f"{_STORE}{name}.py" for name in ("layout", "golden_store")],
    "feature_store/views/*.py": [
        f"{_STORE}{name}.py" for name in ("views", "draws", "policies", "augment", "golden_store")
    ],
    "student_trainer/data.py": [f"{_TRAINER}data_batches.py"],
    "student_trainer/evaluate.py": [f"{_TRAINER}evaluate_accuracy.py"],
    "student_trainer/labels.py": [f"{_TRAINER}labels.py"],
    "student_trainer/materialised.py": ["tests/integration/test_materialised_views.py"],
    "student_trainer/mimicking.py": [f"{_TRAINER}mimicking.py"],
    "student_trainer/optimize.py": [f"{_TRAINER}optimize_updates.py"],
    "student_trainer/order.py": [f"{_TRAINER}order_epochs.py"],
    "student_trainer/perception.py": [f"{_TRAINER}perception.py", f"{_TRAINER}scalekd.py"],
    "student_trainer/projector.py": [f"{_TRAINER}projector.py"],
    "student_trainer/replay.py": [f"{_TRAINER}replay_views.py"],
    "student_trainer/scalekd.py": [f"{_TRAINER}scalekd.py"],
    "student_trainer/tasks.py": [f"{_TRAINER}tasks.py"],
}
_WORK = Path("mutants")
_COPIED = ("feature_store", "student_trainer", "teacher_service", "tests", "pyproject.toml")
_KILLED = {"killed", "timeout", "segfault", "suspicious"}
# The wording of errors is not tried; the time limit leaves room for what mutmut does not time: imports and fixtures.
_CONFIG = r"""
[mutmut]
source_paths =
    feature_store
    student_trainer
    teacher_service
only_mutate = {modules}
do_not_mutate_patterns = ^\s*(raise |return InputError\(|f?".*"[,)]*$)
pytest_add_cli_args =
    -p
    no:cacheprovider
    -p
    no:xdist
    --hypothesis-profile=mutants
pytest_add_cli_args_test_selection =
    {tests}
process_isolation = forkserver
timeout_constant = 20
timeout_multiplier = 6
"""


def prepare(modules: str, tests: list[str]) -> Path:
    """A copy of the project in which mutmut changes these modules and runs these tests."""
    folder = _WORK / modules.removesuffix(".py").replace("/", "-").replace("*", "all")
    shutil.rmtree(folder, ignore_errors=True)
    for name in _COPIED:
        if Path(name).is_dir():
            shutil.copytree(name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(name, folder)
    (folder / "setup.cfg").write_text(_CONFIG.format(modules=modules, tests="\n    ".join(tests)))
    return folder


def mutmut(folder: Path, *arguments: str) -> str:
    """What mutmut prints; its exit status says only whether every mutant was killed."""
    command = [sys.executable, "-m", "mutmut", *arguments]
    return subprocess.run(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    ).stdout


def exit_codes(folder: Path) -> dict[str, dict[str, int | None]]:
    """Exit codes of the tests, by module and mutant; None where a mutant was not tried."""
    generated = folder / "mutants"
    return {
        str(path.relative_to(generated)).removesuffix(".meta"): codes
        for path in sorted(generated.rglob("*.meta"))
        if (codes := json.loads(path.read_text())["exit_code_by_key"])
    }


def measure(modules: str, tests: list[str], sample: int, seed: int) -> dict[str, dict[str, Any]]:
    """Results by module of a line of TESTS."""
    folder = prepare(modules, tests)
    # no mutant has this name: generates the mutants, and finds the tests that reach each
    told = mutmut(folder, "run", "none")
    if not (folder / "mutants" / "mutmut-stats.json").is_file():
        sys.exit(f"{modules}: the tests fail, or do not reach it:\n{told[-5000:]}")
    drawn: dict[str, list[str]] = {}
    for module, codes in exit_codes(folder).items():
        names = sorted(codes)
        drawn[module] = random.Random(seed).sample(names, min(sample or len(names), len(names)))
    told = mutmut(folder, "run", "--max-children", "1", *(name for names in drawn.values() for name in names))
    results, tried = {}, exit_codes(folder)
    for module, names in drawn.items():
        statuses = {name: status_by_exit_code[tried[module][name]] for name in names}
        if "not checked" in statuses.values():
            sys.exit(f"{module}: mutmut ended early:\n{told[-5000:]}")
        counts = Counter(statuses.values())
        killed = sum(counts[status] for status in _KILLED)
        survivors = [name for name in names if statuses[name] not in _KILLED]
        results[module] = {
            "mutants": len(tried[module]),
            "tried": len(names),
            "killed": killed,
            "timeouts": counts["timeout"],
            "share": round(killed / len(names), 3),
            "survivors": survivors,
        }
        print(f"{module}: {killed} of {len(names)}", file=sys.stderr)
        for name in survivors:
            print(mutmut(folder, "show", name), file=sys.stderr)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, default=40, help="mutants tried of each module; 0 = all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--modules", default="*", help="pattern of the lines of TESTS to take")
    arguments = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    for modules, tests in TESTS.items():
        if fnmatch(modules, arguments.modules):
            results |= measure(modules, tests, arguments.sample, arguments.seed)
    tried, killed = (sum(result[key] for result in results.values()) for key in ("tried", "killed"))
    summary = {"seed": arguments.seed, "tried": tried, "killed": killed, "share": round(killed / tried, 3)}
    print(json.dumps({**summary, "modules": results}, indent=1))


if __name__ == "__main__":
    main()
