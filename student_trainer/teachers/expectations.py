"""Comparison of a run's teacher and views with what its preset expects."""

from collections.abc import Iterator
from typing import Any

from feature_store.errors import MismatchError
from feature_store.format.manifest import SplitInfo, TeacherInfo
from feature_store.views import ViewPolicy, view_policy
from student_trainer.config import ExpectConfig, TrainConfig


def require_expected(
    config: TrainConfig, policy: ViewPolicy, teacher: TeacherInfo | None, split: SplitInfo | None
) -> None:
    """Refuse features of another teacher, or of other views, than the run expects.

    Args:
        config: The run; ``config.expect`` says what is expected.
        policy: What its views are drawn from.
        teacher: The teacher of its features; None if it has none.
        split: Where that teacher is cut.

    Raises:
        MismatchError: Names the first field that differs, and the option that accepts it.
    """
    command = f"student-trainer presets {config.preset or 'NAME'} --cache-command"
    for option, field, expected, got in _compared(config.expect, policy, teacher, split):
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
