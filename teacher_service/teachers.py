"""Teachers by name: their sizes, without weights."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import timm

from feature_store.errors import InputError
from feature_store.format.layout import StoreLayout
from feature_store.format.manifest import Manifest, TarInfo
from feature_store.teacher.own import is_own
from feature_store.views import view_policy
from teacher_service.config import StorageSpec, TeacherListConfig, TeacherSpec
from teacher_service.plan.survey import TeacherOutline, outline_teacher, tap_infos

_SAMPLES = 1000  # of the unit whose bytes are divided among its views


@dataclass(frozen=True)
class TeacherEntry:
    """Content of a teacher's store with default options.

    Attributes:
        name: timm model name, or ``package.module:build``.
        input_size: Height and width of its images, in pixels.
        grid: (H, W) of the final feature map; their product are its tokens.
        channels: Of the final feature map.
        blocks: Number of taps by block, block0 and so on.
        num_classes: Of its logits; 0 without a classifier.
        later_blocks: Family of its later blocks, which TPP runs; None without them.
        view_bytes: Of one view of one sample in the store, with the default codecs.
    """

    name: str
    input_size: tuple[int, int]
    grid: tuple[int, int]
    channels: int
    blocks: int
    num_classes: int
    later_blocks: str | None
    view_bytes: int


@dataclass(frozen=True)
class TeacherList:
    """Teachers that match a pattern.

    Attributes:
        teachers: Those that can be used, by name.
        left_out: Why each of the others cannot, by name.
    """

    teachers: list[TeacherEntry] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def list_teachers(
    config: TeacherListConfig, progress: Callable[[int, int], None] = lambda done, total: None
) -> TeacherList:
    """Sizes of the teachers that match a pattern; models are built on the meta device, but a user's own.

    Args:
        config: Which ones.
        progress: Called with the number of models done, and of all.

    Raises:
        InputError: Nothing matches, or the only one that does cannot be used.
    """
    names = _names(config.pattern)
    found = TeacherList()
    for done, name in enumerate(names, 1):
        try:
            found.teachers.append(_entry(name, config.model_kwargs))
        except InputError as error:
            if len(names) == 1:
                raise
            found.left_out[name] = str(error)
        progress(done, len(names))
    return found


def teacher_lines(found: TeacherList) -> list[str]:
    """A plain table of teachers, one a line, at any width of the terminal."""
    rows = [("teacher", "input", "tokens", "channels", "blocks", "classes", "bytes a view", "later blocks")]
    for each in found.teachers:
        size, grid = ("x".join(map(str, pair)) for pair in (each.input_size, each.grid))
        numbers = (str(each.channels), str(each.blocks), str(each.num_classes or "none"), f"{each.view_bytes:,}")
        rows.append((each.name, size, grid, *numbers, each.later_blocks or "none: TPP is off"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *middle, last in rows:
        cells = [cell.rjust(width) for cell, width in zip(middle, widths[1:-1], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells, last]))
    if found.left_out:
        lines.append(f"left out: {len(found.left_out)} that cannot be teachers; --json gives the reasons")
    return lines


def _names(pattern: str) -> list[str]:
    """Names of a pattern: an own teacher, a model with or without a tag, wildcards, or a part of names."""
    if is_own(pattern) or timm.is_model(pattern):
        return [pattern]
    names = timm.list_models(pattern) or timm.list_models(f"*{pattern}*")
    if not names:
        raise InputError(
            f"timm {timm.__version__} has no model that matches {pattern!r}; give a part of a name such as dinov2, a "
            "pattern such as '*swin*', or a function of your own as package.module:build"
        )
    return names


def _entry(name: str, model_kwargs: dict[str, Any]) -> TeacherEntry:
    with warnings.catch_warnings(action="ignore"):  # of names that timm deprecates
        outline = outline_teacher(TeacherSpec(name=name, model_kwargs=model_kwargs))
    info, split = outline.info, outline.split
    return TeacherEntry(
        name=name,
        input_size=info.input_size,
        grid=split.output_grid,
        channels=split.output_dim,
        blocks=len(outline.taps.blocks),
        num_classes=info.num_classes,
        later_blocks=split.family if split.has_later_blocks else None,
        view_bytes=_view_bytes(outline),
    )


def _view_bytes(outline: TeacherOutline) -> int:
    """Bytes of a view, as ``plan`` counts them for a whole store."""
    storage = StorageSpec()
    manifest = Manifest(
        teacher=outline.info,
        split=outline.split,
        blocks_sha256="",
        taps=tap_infos(outline, storage),
        logits_codec=storage.logits_codec if outline.info.num_classes else None,
        policy=view_policy("rrc_flip", outline.info.input_size),
        seed=0,
        num_views=1,
        tars=(TarInfo("", _SAMPLES, ""),),
        capacity=_SAMPLES,
        key_width=1,
        software={},
    )
    layout = StoreLayout(manifest)
    return round(sum(layout.object_bytes(array, _SAMPLES) for array in layout.per_view) / _SAMPLES)
