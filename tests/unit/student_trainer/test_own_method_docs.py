"""The method of docs/how-to/own-method.md learns two steps."""

import re
from pathlib import Path

import pytest
import torch
from method_batches import small_batch

from feature_store.errors import InputError
from student_trainer.methods import find_method

PAGE = (Path(__file__).parents[3] / "docs" / "how-to" / "own-method.md").read_text()


@pytest.fixture
def module(own_module):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    own_module("my_methods", code)
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


def test_own_options_are_refused_when_impossible(module):
    with pytest.raises(InputError, match="weight is -1"):
        find_method(f"{module}:LogitMSE").Config(-1)
