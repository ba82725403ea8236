"""Kubernetes manifests: their schemas, and the command lines of their containers."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import tyro
from command_lines import OTHERS, known_variables, options
from jsonschema import Draft202012Validator

from student_trainer.config import TrainConfig
from student_trainer.recipes import PRESETS
from teacher_service.config import CacheConfig
from teacher_service.serve.config import ServeConfig

VERSIONS = ("1.29", "1.34")
"""Kubernetes versions whose schemas are tried."""
_CUSTOM = json.loads((Path(__file__).parent / "crd_schemas.json").read_text())


def validate(manifest: dict[str, Any]) -> None:
    """Refuse a manifest that the API server would refuse, or of which it would drop a field."""
    if manifest["kind"] in _CUSTOM:
        Draft202012Validator(_CUSTOM[manifest["kind"]]).validate(manifest["spec"])
        if manifest["kind"] == "RayJob":
            for pod in pods(manifest):
                _validate_core({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": pod})
        return
    _validate_core(manifest)


def _validate_core(manifest: dict[str, Any]) -> None:
    for version in VERSIONS:
        kubernetes_validate.validate(manifest, version, strict=True)


def pods(manifest: Any) -> Iterator[dict[str, Any]]:
    """Every pod specification within a manifest."""
    if isinstance(manifest, dict):
        if "containers" in manifest:
            yield manifest
        else:
            for value in manifest.values():
                yield from pods(value)
    elif isinstance(manifest, list):
        for value in manifest:
            yield from pods(value)


def arguments(manifest: dict[str, Any]) -> Iterator[list[str]]:
    """Program and arguments of every container that has a command, and of a RayJob's driver."""
    for pod in pods(manifest):
        for container in pod["containers"]:
            if "command" in container:
                yield [*container["command"], *container.get("args", [])]
    if manifest["kind"] == "RayJob":
        yield shlex.split(manifest["spec"]["entrypoint"])


def parse(argv: list[str]) -> Any:
    """The configuration a command line gives: unknown options, unusable values and contradictions are refused."""
    if argv[:2] == ["bash", "-c"]:
        script = re.sub(r"\\\n\s*", " ", argv[2])
        argv = ["student-trainer", *shlex.split(script.split("-m -- student_trainer ")[1])]
    program, command, *rest = argv
    if (program, command) == ("student-trainer", "train"):
        preset = PRESETS[rest.pop(rest.index("--preset") + 1)]
        rest.remove("--preset")
        return tyro.cli(TrainConfig, args=rest, default=preset.config(), config=(tyro.conf.FlagCreatePairsOff,))
    kind = {("teacher-service", "serve"): ServeConfig, ("teacher-service", "cache"): CacheConfig}[program, command]
    assert options(program, command)
    return tyro.cli(tyro.conf.OmitArgPrefixes[kind], args=rest, config=(tyro.conf.FlagCreatePairsOff,))


def unknown_variables(manifest: dict[str, Any]) -> set[str]:
    """Environment variables of containers that nothing reads."""
    given = {
        each["name"] for pod in pods(manifest) for container in pod["containers"] for each in container.get("env", [])
    }
    return given - known_variables() - OTHERS.keys()
