"""pip's settings of this machine, for builds in containers.

``torch cp311`` prints a requirement for a CPU build of torch that pip's find-links folders hold, or nothing. ``mounts FOLDER``
writes the settings to FOLDER/pip.conf and prints, one a line, the options of ``buildah build`` that show them to a build:
an index, a proxy's certificate, folders of wheels.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

_PATH = re.compile(r"(?:file://)?(/[^\s'\"]+)")


def settings() -> dict[str, str]:
    """Options of pip by name, from its files and from the environment, which comes last."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = [line.partition("=") for line in listed.splitlines() if "=" in line]
    found = {name: str(ast.literal_eval(value)) for name, _, value in sorted(lines, key=lambda parts: parts[0][0] == ":")}
    return {name.rpartition(".")[2]: value for name, value in found.items()}


def torch_requirement(tag: str) -> str:
    """``torch==X+cpu`` of the newest wheel for a Python; empty if there is none."""
    folders = [Path(urlsplit(folder).path) for folder in settings().get("find-links", "").split()]
    names = [wheel.name for folder in folders for wheel in folder.glob(f"torch-*+cpu-{tag}-*.whl")]
    versions = sorted((name.split("-")[1] for name in names), key=lambda text: [*map(int, re.findall(r"\d+", text))])
    return f"torch=={versions[-1]}" if versions else ""


def mounts(folder: Path) -> list[str]:
    """Options of ``buildah build``; the settings are written to the folder first."""
    found = settings()
    file = folder / "pip.conf"
    file.write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in found.items()))
    named = {path for value in found.values() for path in _PATH.findall(value) if Path(path).exists()}
    above = {str(Path(path).parent) if path.endswith("/simple") else path for path in named}  # its links go to ../files
    shown = {str(file): "/etc/pip.conf", **{path: path for path in sorted(above)}}
    return [f"--volume={here}:{there}:ro" for here, there in shown.items()]


if __name__ == "__main__":
    if sys.argv[1] == "torch":
        print(torch_requirement(sys.argv[2]))
    else:
        print("\n".join(mounts(Path(sys.argv[2]))))
