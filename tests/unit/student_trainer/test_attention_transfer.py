"""Attention transfer against its formula."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_batches import maps_batch

from feature_store.errors import InputError
from student_trainer.methods import AttentionTransferConfig
from student_trainer.methods.resize import resized


@settings(max_examples=25, deadline=None)
@given(
    beta=st.floats(0, 1e4), p=st.sampled_from([1.0, 1.5, 2.0, 3.0]), batch=st.integers(1, 3),
    channels=st.integers(1, 5), height=st.integers(1, 4), width=st.integers(1, 4),
)  # fmt: skip
def test_attention_transfer_equals_the_written_out_formula(beta, p, batch, channels, height, width):
    torch.manual_seed(0)
    A_S = torch.randn(batch, channels, height, width, dtype=torch.float64)
    A_T = torch.randn(batch, height * width, 3, dtype=torch.float64)
    small = maps_batch(A_S, A_T, (height, width))
    expected = 0.0
    for n in range(batch):
        Q_S = np.mean(np.abs(A_S[n].numpy()) ** p, axis=0).flatten()
        Q_T = np.mean(np.abs(A_T[n].numpy()) ** p, axis=1)
        expected += np.mean((Q_S / np.sqrt(Q_S @ Q_S) - Q_T / np.sqrt(Q_T @ Q_T)) ** 2) / batch
    terms = small.terms(small.build("attention_transfer", beta=beta, p=p))
    assert terms.raw["attention"].item() == pytest.approx(expected, rel=1e-9, abs=1e-15)
    assert terms.total.item() == pytest.approx(beta * expected, rel=1e-9, abs=1e-12)


def test_attention_transfer_resizes_the_student_when_grids_differ():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 4, 7, 3), torch.randn(2, 10, 6)
    small = maps_batch(student, teacher, (5, 2))
    same = maps_batch(resized(student, (5, 2)), teacher, (5, 2))
    got, expected = (each.terms(each.build("attention_transfer")).raw["attention"] for each in (small, same))
    torch.testing.assert_close(got, expected)


def test_attention_transfer_vanishes_when_maps_attend_to_the_same_places():
    """Widths, and the scale of a whole map, do not count."""
    attention = torch.rand(2, 1, 3, 3)
    student, teacher = -3 * attention.expand(-1, 5, -1, -1), attention.flatten(2).mT.expand(-1, -1, 2)
    small = maps_batch(student, teacher, (3, 3))
    assert small.terms(small.build("attention_transfer")).raw["attention"].item() == pytest.approx(0, abs=1e-12)


def test_attention_transfer_is_summed_in_float32_when_maps_are_half_precision():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 4, 3, 3).bfloat16(), torch.randn(2, 9, 6).half()
    low, high = maps_batch(student, teacher, (3, 3)), maps_batch(student.float(), teacher.float(), (3, 3))
    got, expected = (each.terms(each.build("attention_transfer")).raw["attention"] for each in (low, high))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected)


def test_attention_transfer_needs_the_final_map_alone():
    small = maps_batch(torch.randn(1, 2, 2, 2), torch.randn(1, 4, 2), (2, 2))
    method = small.build("attention_transfer")
    assert tuple(method.needs) == (("stage4",), False, False, False, False)
    assert small.terms(method).weights == {"task": 1.0, "attention": 1000.0}
    assert method.config.p == 2
    assert [*method.parameters()] == []


@pytest.mark.parametrize(("name", "value"), [("beta", -0.1), ("p", 0.9), ("p", float("nan"))])
def test_attention_transfer_config_refuses_when_a_value_is_impossible(name, value):
    with pytest.raises(InputError, match=f"{name} of attention transfer is {value}, expected a number"):
        AttentionTransferConfig(**{name: value})
    assert AttentionTransferConfig(beta=0.0, p=1.0).p == 1
