"""Mutation testing: the share of changed programs that the tests notice, by module.

Run with ``make mutants``. mutmut changes one expression at a time; here each change is tried with the module's own
tests, those in TESTS: fast ones, in one process. That is a lower bound, for the rest of the suite is not run. The
trials are forks of a process that has imported the tests once (``mutmut run`` imports them five times a module, and
runs every test that reaches a function). ``--sample N`` tries N mutants of each module, drawn with ``--seed``; 0 tries
all of them (hours). Prints one JSON object, in which a mutant that ran into the time limit is killed; what the
survivors changed goes to stderr. ``mutants/`` keeps the work.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

_STORE = "tests/unit/feature_store/test_"
_TRAINER = "tests/unit/student_trainer/test_"
TESTS = {  # what notices a change, by module
    "feature_store/format/codecs/[!t]*.py": [f"{_STORE}codecs.py"],
    "feature_store/format/codecs/top_k.py": [f"{_STORE}top_k.py", f"{_STORE}codecs.py"],
    "feature_store/commits/[!l]*.py": [f"{_STORE}commits.py"],
    "feature_store/commits/l*.py": [f"{_STORE}commits.py", f"{_STORE}file_systems.py"],
    "feature_store/format/[al]*.py": [f"{_STORE}layout.py", f"{_STORE}addressing.py"],
    "feature_store/views/augment.py": [f"{_STORE}augment.py"],
    "feature_store/views/draws.py": [f"{_STORE}draws.py"],
    "feature_store/views/image_structure.py": [f"{_STORE}image_structure.py"],
    "feature_store/views/decode.py": [f"{_STORE}images.py"],
    "feature_store/views/files.py": [f"{_STORE}materialised.py"],
    "feature_store/views/apply.py": [f"{_STORE}views.py"],
    "feature_store/views/policies.py": [f"{_STORE}policies.py"],
    "student_trainer/data/batch.py": [f"{_TRAINER}data_batches.py"],
    "student_trainer/evaluate.py": [f"{_TRAINER}evaluate_accuracy.py"],
    "student_trainer/data/loader.py": [f"{_TRAINER}loader_workers.py"],
    "student_trainer/data/labels.py": [f"{_TRAINER}labels.py"],
    "student_trainer/data/materialised.py": [f"{_TRAINER}materialised_rows.py"],
    "student_trainer/methods/attention_transfer.py": [f"{_TRAINER}attention_transfer.py", f"{_TRAINER}methods_base.py"],
    "student_trainer/methods/base.py": [f"{_TRAINER}methods_base.py"],
    "student_trainer/methods/cap.py": [f"{_TRAINER}cap.py"],
    "student_trainer/methods/criterion.py": [f"{_TRAINER}criterion.py"],
    "student_trainer/methods/dfm.py": [f"{_TRAINER}dfm.py"],
    "student_trainer/methods/dist.py": [f"{_TRAINER}dist.py", f"{_TRAINER}methods_base.py"],
    "student_trainer/methods/fd.py": [f"{_TRAINER}fd.py", f"{_TRAINER}methods_base.py"],
    "student_trainer/methods/kd.py": [f"{_TRAINER}kd.py", f"{_TRAINER}methods_base.py"],
    "student_trainer/methods/nkd.py": [f"{_TRAINER}nkd.py", f"{_TRAINER}methods_base.py"],
    "student_trainer/methods/registry.py": [f"{_TRAINER}methods_base.py"],
    "student_trainer/methods/resize.py": [f"{_TRAINER}fd.py"],
    "student_trainer/methods/scalekd.py": [f"{_TRAINER}scalekd.py"],
    "student_trainer/methods/several.py": [f"{_TRAINER}several.py"],
    "student_trainer/methods/tpp.py": [f"{_TRAINER}tpp.py", f"{_TRAINER}scalekd.py"],
    "student_trainer/methods/none.py": [f"{_TRAINER}methods_base.py"],
    "student_trainer/methods/precision.py": [f"{_TRAINER}criterion.py"],
    "student_trainer/engine/checkpoint.py": [f"{_TRAINER}checkpoint_files.py"],
    "student_trainer/engine/distributed.py": [f"{_TRAINER}distributed_group.py"],
    "student_trainer/engine/failures.py": [f"{_TRAINER}failures_errors.py"],
    "student_trainer/engine/loggers.py": [f"{_TRAINER}loggers_log.py"],
    "student_trainer/engine/metrics.py": [f"{_TRAINER}metrics_log.py"],
    "student_trainer/engine/numerics.py": [f"{_TRAINER}numerics_modes.py"],
    "student_trainer/engine/optimizer.py": [f"{_TRAINER}optimizer_steps.py"],
    "student_trainer/engine/progress.py": [f"{_TRAINER}progress_run.py"],
    "student_trainer/engine/run_folder.py": [f"{_TRAINER}run_folder_files.py"],
    "student_trainer/engine/stopping.py": [f"{_TRAINER}stop_signals.py"],
    "student_trainer/engine/terms.py": [f"{_TRAINER}terms_means.py"],
    "student_trainer/data/sampler.py": [f"{_TRAINER}sampler_epochs.py"],
    "student_trainer/data/replayed.py": [f"{_TRAINER}replay_views.py"],
    "student_trainer/plan.py": [f"{_TRAINER}plan_options.py"],
}
_WORK = Path("mutants")
_COPIED = ("feature_store", "student_trainer", "teacher_service", "tests", "benchmarks", "pyproject.toml")
_PYTEST = ("-p", "no:cacheprovider", "-p", "no:xdist", "--hypothesis-profile=mutants", "--rootdir=.", "-q")
_CONFIG = r"""
[mutmut]
source_paths =
    feature_store
    student_trainer
    teacher_service
only_mutate =
    {modules}
# the wording of errors is not tried
do_not_mutate_patterns = ^\s*(raise |return InputError\(|f?".*"[,)]*$)
# processes that tests start import the main module, which is this one
also_copy = benchmarks
# mutmut shall generate, and find nothing to run
pytest_add_cli_args_test_selection = tests/unit/feature_store/test_errors.py
"""


def generate(modules: Sequence[str]) -> Path:
    """A copy of the project that holds every mutant of these modules, switched off."""
    shutil.rmtree(_WORK, ignore_errors=True)
    _WORK.mkdir()
    for name in _COPIED:
        if Path(name).is_dir():
            shutil.copytree(name, _WORK / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(name, _WORK)
    (_WORK / "setup.cfg").write_text(_CONFIG.format(modules="\n    ".join(modules)))
    told = mutmut("run")
    if not list(_WORK.rglob("*.meta")):
        sys.exit(f"mutmut made no mutants:\n{told[-5000:]}")
    return _WORK / "mutants"


def mutmut(*arguments: str) -> str:
    """Output of mutmut."""
    command = [sys.executable, "-m", "mutmut", *arguments]
    return subprocess.run(
        command, cwd=_WORK, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    ).stdout


def mutants_of(meta: Path) -> list[str]:
    """Names of a module's mutants."""
    return sorted(json.loads(meta.read_text())["exit_code_by_key"])


def trial(mutant: str, tests: Sequence[str], limit: float) -> int | None:
    """Exit status of the tests with a mutant switched on (none: as written), forked; None after ``limit`` seconds."""
    process = os.fork()
    if not process:
        os.setsid()
        os.environ["MUTANT_UNDER_TEST"] = mutant
        silent = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(silent, stream)
        os._exit(pytest.main([*_PYTEST, "-x", *tests]))
    begun = time.monotonic()
    while time.monotonic() < begun + limit:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


def time_limit(tests: Sequence[str]) -> float:
    """Seconds after which tests are ended that pass without a mutant."""
    begun = time.monotonic()
    if (status := trial("", tests, 1800)) != 0:
        sys.exit(f"the tests do not pass as they are (pytest: {status}): {', '.join(tests)}")
    return 60 + 10 * (time.monotonic() - begun)


def measure(
    module: str, names: list[str], tests: Sequence[str], limit: float, draws: random.Random, sample: int
) -> dict[str, Any]:
    """Mutants of a sample that a module's tests notice; the working directory is the generated copy."""
    drawn = draws.sample(names, min(sample or len(names), len(names)))
    statuses = {name: trial(name, tests, limit) for name in drawn}
    survivors = [name for name, status in statuses.items() if status == 0]
    killed = len(drawn) - len(survivors)
    print(f"{module}: {killed} of {len(drawn)}; survived: {survivors}", file=sys.stderr, flush=True)
    return {
        "mutants": len(names),
        "tried": len(drawn),
        "killed": killed,
        "timeouts": sum(status is None for status in statuses.values()),
        "share": round(killed / len(drawn), 3),
        "survivors": survivors,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, default=40, help="mutants tried of each module; 0 = all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--modules", nargs="*", default=["*"], help="patterns of the lines of TESTS to take")
    arguments = parser.parse_args()
    chosen = {line: tests for line, tests in TESTS.items() if any(fnmatch(line, like) for like in arguments.modules)}
    home, generated = Path.cwd(), generate(list(chosen)).resolve()
    os.chdir(generated)
    sys.path[:] = [str(generated), *(path for path in sys.path if Path(path or ".").resolve() != home)]
    os.environ["PYTHONPATH"] = str(generated)
    os.environ["MUTANT_UNDER_TEST"] = ""
    files = sorted({file for tests in chosen.values() for file in tests})
    with redirect_stdout(sys.stderr):
        if pytest.main([*_PYTEST, "-qq", "--collect-only", *files]):  # imports them, for the forks
            sys.exit("the tests cannot be collected")
    limits = {line: time_limit(tests) for line, tests in chosen.items()}  # first, for they may fail
    results: dict[str, dict[str, Any]] = {}
    for line, tests in chosen.items():
        for meta in sorted(Path().glob(f"{line}.meta")):
            module, names, draws = str(meta).removesuffix(".meta"), mutants_of(meta), random.Random(arguments.seed)
            if names:
                results[module] = measure(module, names, tests, limits[line], draws, arguments.sample)
    os.chdir(home)
    for name in (name for result in results.values() for name in result["survivors"]):
        print(mutmut("show", name), file=sys.stderr)
    tried, killed = (sum(result[key] for result in results.values()) for key in ("tried", "killed"))
    summary = {"seed": arguments.seed, "tried": tried, "killed": killed, "share": round(killed / tried, 3)}
    print(json.dumps({**summary, "modules": results}, indent=1))


if __name__ == "__main__":
    main()
