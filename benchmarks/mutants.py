"""Mutation testing: the share of changed programs that the tests notice, by module.

Run with ``make mutants``. mutmut (configured in pyproject.toml) changes one expression at a time and runs the tests
that reach it. ``--sample N`` tries N mutants of each module, drawn with ``--seed``; 0 tries all of them (hours).
A mutant that runs into the time limit counts as killed. Prints one JSON object.
"""

import argparse
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

from mutmut.stats import status_by_exit_code

_KILLED = {"killed", "timeout", "segfault", "suspicious"}


def exit_codes() -> dict[str, dict[str, int | None]]:
    """Exit codes of the tests, by source file and mutant; None where a mutant was not tried."""
    return {
        str(path.relative_to("mutants")).removesuffix(".meta"): json.loads(path.read_text())["exit_code_by_key"]
        for path in sorted(Path("mutants").rglob("*.meta"))
    }


def mutmut(*arguments: str) -> None:
    """Run mutmut; its exit status says only whether every mutant was killed."""
    subprocess.run([sys.executable, "-m", "mutmut", *arguments], stdout=sys.stderr, check=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, default=40, help="mutants tried of each module; 0 = all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--modules", nargs="*", default=[], help="source files; default: all of pyproject.toml")
    arguments = parser.parse_args()
    mutmut("run", "none")  # no mutant has this name: generates the mutants, finds the tests that reach each
    draws = random.Random(arguments.seed)
    drawn: dict[str, list[str]] = {}
    for module, codes in exit_codes().items():
        if codes and (not arguments.modules or module in arguments.modules):
            names = sorted(codes)
            drawn[module] = draws.sample(names, min(arguments.sample or len(names), len(names)))
    mutmut("run", *(name for names in drawn.values() for name in names))
    results, tried = {}, exit_codes()
    for module, names in drawn.items():
        statuses = Counter(status_by_exit_code[tried[module][name]] for name in names)
        killed = sum(statuses[status] for status in _KILLED)
        results[module] = {
            "mutants": len(tried[module]),
            "tried": len(names),
            "killed": killed,
            "share": round(killed / len(names), 3),
            "survivors": [name for name in names if status_by_exit_code[tried[module][name]] not in _KILLED],
        }
    tried_all, killed_all = (sum(result[key] for result in results.values()) for key in ("tried", "killed"))
    json.dump(
        {"tried": tried_all, "killed": killed_all, "share": round(killed_all / tried_all, 3), "modules": results},
        sys.stdout,
        indent=1,
    )
    print()


if __name__ == "__main__":
    main()
