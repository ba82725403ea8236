"""pip's settings of this machine, for builds in containers.

``python pip_settings.py FOLDER`` writes FOLDER/pip.conf and prints the options of ``buildah build``, one a line, that
show it and what it names to a build: an index, a proxy's certificate, folders of wheels.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

_PATH = re.compile(r"(?:file://)?(/[^\s'\"]+)")


def settings() -> dict[str, str]:
    """Options of pip by name, from its files and from the environment, which comes last."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = [line.partition("=") for line in listed.splitlines() if "=" in line]
    found = {
        name: str(ast.literal_eval(value)) for name, _, value in sorted(lines, key=lambda parts: parts[0][0] == ":")
    }
    return {name.rpartition(".")[2]: value for name, value in found.items()}


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
    print("\n".join(mounts(Path(sys.argv[1]))))
