"""Sweep files: a base run, settings that change it, seeds."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import tyro

from feature_store.errors import InputError
from feature_store.tools.options import build_config, check_fields, require
from student_trainer.config import TrainConfig
from student_trainer.recipes import PRESETS, preset_config
from student_trainer.sweeps.values import merge, parse_assignments, read_yaml
from student_trainer.teachers.config import TeacherOptions

PACKAGED = Path(__file__).with_name("ready")  # ready sweeps, found by name

_TEACHER = frozenset(field.name for field in fields(TeacherOptions))  # the teacher's, as on the command line
_CHOSEN = ("run", "seed", "resume")  # what a sweep sets itself


@dataclass(frozen=True)
class SweepFile:
    """Content of a sweep file.

    Attributes:
        settings: Changes of each named setting to the base run; the order is the table's.
        base: Options of ``train`` that all runs share; ``preset`` names a released pair that they are set over.
        seeds: Seeds of weights, order and dropout; every setting is run with each.
        baseline: Name of the setting the others are compared with; default the first.
        score: Compare accuracies after the last epoch, or of the best epoch (chosen by the validation set itself).
        title: Title of the report; default the file's name.
    """

    settings: dict[str, Any]
    base: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)
    baseline: str | None = None
    score: Literal["last", "best"] = "last"
    title: str | None = None

    def __post_init__(self) -> None:
        """Refuse values of another type."""
        check_fields(self)


@dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
        setting: Name of its setting.
        seed: Its seed.
        config: All of it; resumes where its folder says.
    """

    setting: str
    seed: int
    config: TrainConfig


@dataclass(frozen=True)
class Sweep:
    """A sweep ready to run.

    Attributes:
        title: Title of the report.
        settings: Names of the settings, in the table's order.
        baseline: The setting the others are compared with.
        score: ``last`` or ``best``, see SweepFile.
        runs: Every setting with every seed, seed by seed: what is finished early can be compared early.
    """

    title: str
    settings: tuple[str, ...]
    baseline: str
    score: Literal["last", "best"]
    runs: tuple[Run, ...]


def read_sweep(path: Path, out: Path, changes: Sequence[str] = (), seeds: Sequence[int] = ()) -> Sweep:
    """Read a sweep file.

    Args:
        path: The file, or the name of a ready one (``ablation``, ``baselines``...).
        out: Folder of the sweep; each run gets its own in ``out/runs``.
        changes: ``NAME=VALUE`` set in the base run, e.g. ``store=swin_l.zarr`` or ``optim.lr=0.1``.
        seeds: Instead of the file's.

    Raises:
        InputError: The file, a setting or a change cannot be used.
    """
    path = _find(path)
    values = read_yaml(path)
    file = build_config(SweepFile, {**values, "seeds": seeds} if seeds else values, f"{path}: ")
    _check(file, path)
    base = merge(file.base, parse_assignments(changes, "--set"))
    folders = {name: _slug(name) for name in file.settings}
    if len(set(folders.values())) < len(folders):
        raise InputError(f"{path}: two settings share a folder name; got {', '.join(folders)}, rename one")
    runs = tuple(
        Run(name, seed, _config(path, name, merge(base, own or {}), out / "runs" / f"{folders[name]}-seed{seed}", seed))
        for seed in file.seeds
        for name, own in file.settings.items()
    )
    baseline = file.baseline or next(iter(file.settings))
    return Sweep(file.title or path.stem, tuple(file.settings), baseline, file.score, runs)


def _config(path: Path, name: str, values: Mapping[str, Any], run: Path, seed: int) -> TrainConfig:
    where = f"{path}: {name}: "
    for chosen in _CHOSEN:
        if chosen in values:
            raise InputError(f"{where}{chosen} is chosen by the sweep; remove it (seeds are listed under seeds)")
    values = _with_preset(values)
    asked = {name: value for name, value in values.items() if name in _TEACHER}
    teacher = build_config(TeacherOptions, asked, where).config()
    others = {name: value for name, value in values.items() if name not in _TEACHER}
    chosen = {"run": str(run), "seed": seed, "resume": True, "teacher": teacher}
    config = build_config(TrainConfig, {**others, **chosen}, where)
    if not config.val_tars:
        raise InputError(f"{where}val_tars is missing; without validation there is nothing to compare")
    return config


def _with_preset(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values over those of the preset they name, if they name one."""
    own = {name: value for name, value in values.items() if name != "preset"}
    if values.get("preset") is None:
        return own
    preset = preset_config(PRESETS, str(values["preset"]))
    set_by_preset = {
        field.name for field in fields(preset) if getattr(preset, field.name) not in (tyro.MISSING, _default(field))
    }
    return merge({name: value for name, value in asdict(preset).items() if name in set_by_preset}, own)


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _find(path: Path) -> Path:
    """The file itself, or the packaged sweep of that name."""
    packaged = PACKAGED / f"{path}.yaml"
    if not path.is_file() and len(path.parts) == 1 and packaged.is_file():
        return packaged
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in PACKAGED.glob("*.yaml")))
        raise InputError(f"sweep file {path} does not exist; give a YAML file, or one of the ready ones: {names}")
    return path


def _check(file: SweepFile, path: Path) -> None:
    require(len(file.settings) > 0, f"{path}: settings", "empty", "at least one named setting")
    require(len(file.seeds) > 0, f"{path}: seeds", "empty", "at least one seed")
    require(len(set(file.seeds)) == len(file.seeds), f"{path}: seeds", list(file.seeds), "each seed once")
    for name, own in file.settings.items():
        if not isinstance(own, Mapping | None):
            raise InputError(f"{path}: {name} is {own!r}, expected a mapping of what it changes")
    if file.baseline is not None and file.baseline not in file.settings:
        raise InputError(f"{path}: baseline is {file.baseline!r}, expected one of {', '.join(file.settings)}")


def _slug(name: str) -> str:
    """A folder name of a setting's name."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower().replace("+", "plus ")).strip("-.") or "setting"
