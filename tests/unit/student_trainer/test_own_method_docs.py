"""The method of docs/how-to/own-method.md learns two steps."""

import re
from pathlib import Path

import pytest
import torch
from method_batches import small_batch

from feature_store.errors import InputError
from student_trainer.methods import find_method
from student_trainer.methods.criterion import cross_entropy

PAGE = (Path(__file__).parents[3] / "docs" / "how-to" / "own-method.md").read_text()


@pytest.fixture
def module(own_module):
    own_module("my_methods", "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)))
    return "my_methods"


def test_own_method_learns_when_named_by_module(module):
    assert f"--method {module}:LogitMSE" in PAGE
    small = small_batch()
    method = small.build(f"{module}:LogitMSE", weight=0.3)
    optimizer = torch.optim.SGD([small.student.logits], lr=0.1)
    totals = []
    for _ in range(2):
        terms = small.terms(method)
        totals.append(terms.total.item())
        optimizer.zero_grad()
        terms.total.backward()
        optimizer.step()
    difference = (small.student.logits - small.batch.teacher.logits).square().mean()
    assert totals[1] < totals[0]
    terms = small.terms(method)
    torch.testing.assert_close(terms.total, terms.raw["task"] + 0.3 * difference)


def test_own_projector_learns_from_a_tap(module):
    small = small_batch()
    kind = find_method(f"{module}:TokenMSE")
    method = kind(kind.Config(), small.shape, small.teacher, cross_entropy)
    terms = small.terms(method)
    terms.total.backward()
    assert terms.raw["tokens"] > 0
    assert method.projector.weight.grad.abs().max() > 0


def test_own_options_are_refused_when_impossible(module):
    with pytest.raises(InputError, match="weight is -1"):
        find_method(f"{module}:LogitMSE").Config(-1)
