"""A preset's expectations of a run's teacher."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from feature_store.errors import MismatchError
from feature_store.format.manifest import SplitInfo, TeacherInfo
from feature_store.tools.options import JsonObject
from feature_store.views import PolicyName, ViewPolicy, view_policy


@dataclass(frozen=True)
class ExpectConfig:
    """Required properties of the teacher features; set by presets, and None accepts any.

    Attributes:
        teacher: timm architecture of the teacher; its pretrained tag does not count.
        model_kwargs: Extra arguments of timm.create_model it was built with, as JSON.
        input_size: Height and width of its views, in pixels.
        depth: Number of its later blocks.
        prefix: Prefix tokens that students run the later blocks with: none, cached or dropped.
        policy: View policy its views were drawn from; every field is compared but the label.
    """

    teacher: str | None = None
    model_kwargs: JsonObject | None = None
    input_size: tuple[int, int] | None = None
    depth: int | None = None
    prefix: Literal["none", "cached", "dropped"] | None = None
    policy: PolicyName | None = None


def require_expected(
    expect: ExpectConfig, preset: str | None, policy: ViewPolicy, teacher: TeacherInfo | None, split: SplitInfo | None
) -> None:
    """Refuse features of another teacher, or of other views, than the run expects.

    Args:
        expect: Expected properties.
        preset: Name of the preset that expects it, if one does.
        policy: Policy of its views.
        teacher: The teacher of its features; None if it has none.
        split: Where that teacher is cut.

    Raises:
        MismatchError: Names the first field that differs, and the option that accepts it.
    """
    command = f"student-trainer presets {preset or 'NAME'} --cache-command"
    for option, field, expected, got in _compared(expect, policy, teacher, split):
        if expected is not None and expected != got:
            raise MismatchError(
                f"expect.{field}",
                where="the run",
                expected=expected,
                got=got,
                remedy=f"`{command}` prints the teacher and view options it expects; or give "
                f"--expect.{option.replace('_', '-')} None to train with this one all the same",
            )


def _compared(
    expect: ExpectConfig, policy: ViewPolicy, teacher: TeacherInfo | None, split: SplitInfo | None
) -> Iterator[tuple[str, str, Any, Any]]:
    """Option, dotted field, expected and found value."""
    if teacher is not None:
        yield "teacher", "teacher", expect.teacher, teacher.name.split(".")[0]
    yield "input_size", "input_size", expect.input_size, policy.size
    if split is not None:
        yield "depth", "depth", expect.depth, split.depth
        yield "prefix", "prefix", expect.prefix, split.prefix
    if teacher is not None:
        yield "model_kwargs", "model_kwargs", expect.model_kwargs, teacher.model_kwargs
    if expect.policy is not None:
        expected, got = view_policy(expect.policy, policy.size).to_dict(), policy.to_dict()
        for name in expected:
            if name != "name":  # a label, without influence on the pixels
                yield "policy", f"policy.{name}", expected[name], got[name]
