"""Security audit: ``python audit.py FOLDER``, with the interpreter of the development environment.

Writes to FOLDER: requirements.txt (every distribution that scalekd-cache[all] needs, as installed), licences.txt,
vulnerabilities.json (pip-audit), bandit.txt, sbom.json (CycloneDX). Exit code 1 if there is a known vulnerability, a
licence that is not allowed or not known, or a finding of bandit; each exception is written down here, with its reason.
Exit code 3 if nothing was found, but the advisory database could not be asked about some distributions.
"""

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[3]
PROJECT, EXTRA = "scalekd-cache", "all"
TOOLS = ("pip-audit>=2.9", "bandit>=1.9", "cyclonedx-bom>=7")
PACKAGES = ("feature_store", "teacher_service", "student_trainer")

ALLOWED = re.compile(
    r"apache|mit\b|mit-|bsd|isc|psf|python software|mpl|mozilla|hpnd|zlib|unlicense|cc0|lgpl|lesser general"
    r"|public domain",
    re.IGNORECASE,
)
REFUSED = re.compile(r"(?<!l)(?<!lesser )\b(a?gpl|affero|general public licen[sc]e|sspl|busl)", re.IGNORECASE)
LICENCES: dict[str, str] = {}
"""Licences of distributions whose metadata names none that is known here, with where it was read."""
PROPRIETARY = re.compile(r"^(nvidia-|cuda-)")
"""NVIDIA's libraries, which torch's wheels for CUDA need: under NVIDIA's own terms."""
ACCEPTED: dict[str, str] = {}
"""Vulnerabilities that cannot be met here, by id, with the reason."""


def own_requirements(extra: str) -> list[Requirement]:
    """Requirements in pyproject.toml, with an extra and the extras that it names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = []
    for requirement in map(Requirement, [*project["dependencies"], *project["optional-dependencies"].get(extra, ())]):
        if requirement.name == PROJECT:
            found += [each for name in requirement.extras for each in own_requirements(name)]
        else:
            found.append(requirement)
    return found


def needed(requirements: Iterable[Requirement], found: dict[str, str], extras: Iterable[str] = ()) -> dict[str, str]:
    """Versions by name of what requirements name, as installed, and of what that needs in turn."""
    environments = [{"extra": extra} for extra in ("", *extras)]
    for requirement in requirements:
        if requirement.marker is not None and not any(map(requirement.marker.evaluate, environments)):
            continue
        key = canonicalize_name(requirement.name)
        if key in found and not requirement.extras:
            continue
        try:
            about = distribution(key)
        except PackageNotFoundError:
            raise SystemExit(f"{key} is not installed; run make test first") from None
        found[key] = about.version
        needed(map(Requirement, about.requires or ()), found, requirement.extras)
    return found


def licence(name: str) -> str:
    """Licence that a distribution states."""
    if name in LICENCES:
        return LICENCES[name]
    about = distribution(name).metadata
    classifiers = [
        line.rpartition(" :: ")[2] for line in about.get_all("Classifier") or () if line.startswith("License ::")
    ]
    stated = about.get("License-Expression") or "; ".join(classifiers) or (about.get("License") or "").strip()
    return " ".join(stated.split())[:100] or "unknown"


def licences(versions: dict[str, str], out: Path) -> list[str]:
    """Write the list; what is not allowed."""
    found = {name: licence(name) for name in sorted(versions)}
    out.write_text("".join(f"{name} {versions[name]}: {text}\n" for name, text in found.items()))
    return [
        f"licence of {name}: {text}"
        for name, text in found.items()
        if not PROPRIETARY.match(name) and (REFUSED.search(text) or not ALLOWED.search(text))
    ]


def ask_advisories(tools: Path, requirements: Path, out: Path) -> list[dict[str, Any]]:
    """Entries of PyPI's advisory database for each distribution, as pip-audit writes it.

    Raises:
        SystemExit: pip-audit failed.
    """
    out.unlink(missing_ok=True)
    command = [
        tools / "pip-audit",
        "--requirement",
        requirements,
        "--no-deps",
        "--disable-pip",
        "--format",
        "json",
        "--output",
        out,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not out.is_file():
        raise SystemExit(f"pip-audit failed: {done.stderr.strip()[-500:]}")
    return json.loads(out.read_text())["dependencies"]


def vulnerabilities(rows: list[dict[str, Any]]) -> list[str]:
    """Findings that are not accepted."""
    return [
        f"{row['name']} {row['version']}: {found['id']}, fixed in {', '.join(found['fix_versions']) or 'no release'}"
        for row in rows
        for found in row.get("vulns", ())
        if found["id"] not in ACCEPTED
    ]


def insecure_code(tools: Path, out: Path) -> list[str]:
    """Patterns that bandit finds; exceptions are in pyproject.toml, or beside the line as ``nosec``."""
    command = [tools / "bandit", "-q", "-r", "-c", "pyproject.toml", "-f", "txt", "-o", out, *PACKAGES]
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    return (
        []
        if code == 0
        else re.findall(r">> Issue: (.*?)\n.*?Location: (\S+)", out.read_text(), re.DOTALL) or ["bandit failed"]
    )


def main(folder: Path) -> int:
    """Run the audit."""
    folder.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    tools = folder / "tools/bin"
    if not (tools / "python").exists():
        subprocess.run([sys.executable, "-m", "venv", folder / "tools"], check=True)
        subprocess.run([tools / "python", "-m", "pip", "install", "-qq", *TOOLS], check=True)
    versions = needed(own_requirements(EXTRA), {})
    requirements = folder / "requirements.txt"
    requirements.write_text(
        "".join(f"{name}=={version.partition('+')[0]}\n" for name, version in sorted(versions.items()))
    )
    sbom = [
        "requirements",
        requirements,
        "--pyproject",
        ROOT / "pyproject.toml",
        "--output-reproducible",
        "-o",
        folder / "sbom.json",
    ]
    subprocess.run([tools / "cyclonedx-py", *sbom], check=True, stderr=subprocess.DEVNULL)
    advisories = ask_advisories(tools, requirements, folder / "vulnerabilities.json")
    found = [
        *licences(versions, folder / "licences.txt"),
        *vulnerabilities(advisories),
        *map(str, insecure_code(tools, folder / "bandit.txt")),
    ]
    print(f"{len(versions)} distributions; {', '.join(sorted(each.name for each in folder.glob('*.*')))} in {folder}")
    for each in found:
        print(f"FOUND: {each}")
    unasked = sum("skip_reason" in row for row in advisories)
    if unasked:
        print(f"the advisory database could not be asked about {unasked} of {len(advisories)} distributions")
    return 1 if found else 3 if unasked else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
