"""NKD against its formula."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_batches import logits_batch
from torch import Tensor

from feature_store.errors import InputError
from student_trainer.methods import NKDConfig


def written_out(s: Tensor, z: Tensor, labels: Tensor, gamma: float, temperature: float) -> tuple[float, float, float]:
    """Task, target and gamma times the non-target term, class by class."""
    task = target = non_target = 0.0
    for student, teacher, t in zip(s.tolist(), z.tolist(), labels.tolist(), strict=True):
        log_S_t = student[t] - math.log(sum(map(math.exp, student)))
        T_t = math.exp(teacher[t]) / sum(map(math.exp, teacher))
        task -= log_S_t / len(s)
        target -= T_t * log_S_t / len(s)
        others = [k for k in range(len(student)) if k != t]
        sum_S = sum(math.exp(student[k] / temperature) for k in others)
        sum_T = sum(math.exp(teacher[k] / temperature) for k in others)
        for k in others:
            N_T, N_S = math.exp(teacher[k] / temperature) / sum_T, math.exp(student[k] / temperature) / sum_S
            non_target -= gamma * temperature**2 * N_T * math.log(N_S) / len(s)
    return task, target, non_target


@settings(max_examples=25, deadline=None)
@given(
    gamma=st.floats(0, 4), temperature=st.floats(0.5, 6), batch=st.integers(1, 5), classes=st.integers(2, 7),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_nkd_equals_the_written_out_formula(gamma, temperature, batch, classes, seed):
    torch.manual_seed(seed)
    s, z = torch.randn(2, batch, classes, dtype=torch.float64)
    labels = torch.randint(classes, (batch,))
    small = logits_batch(s, z, labels)
    terms = small.terms(small.build("nkd", gamma=gamma, temperature=temperature))
    expected = written_out(s, z, labels, gamma, temperature)
    assert [term.item() for term in terms.weighted.values()] == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert terms.total.item() == pytest.approx(sum(expected), rel=1e-9)


def test_nkd_depends_on_the_labels():
    torch.manual_seed(0)
    s, z = torch.randn(2, 3, 4)
    values = [
        {name: logits.terms(logits.build("nkd")).raw[name].item() for name in ("target", "non_target")}
        for logits in (logits_batch(s, z, torch.tensor(labels)) for labels in ([0, 1, 2], [3, 1, 2]))
    ]
    assert values[0]["target"] != values[1]["target"]
    assert values[0]["non_target"] != values[1]["non_target"]


@pytest.mark.parametrize("gap", [1e2, 1e4])
def test_nkd_stays_finite_when_teacher_or_student_is_certain(gap):
    certain = torch.tensor([[gap, 0.0, 0.0], [0.0, gap, 0.0]])
    small = logits_batch(certain.clone().requires_grad_(), certain, torch.tensor([0, 0]))
    terms = small.terms(small.build("nkd"))
    terms.total.backward()
    assert terms.total.isfinite()
    assert small.student.logits.grad.isfinite().all()


def test_nkd_is_summed_in_float32_when_logits_are_half_precision():
    torch.manual_seed(0)
    s, z = torch.randn(2, 4, 6).bfloat16()
    low, high = logits_batch(s, z), logits_batch(s.float(), z.float())
    got, expected = (small.terms(small.build("nkd")).raw for small in (low, high))
    assert got["target"].dtype == got["non_target"].dtype == torch.float32
    torch.testing.assert_close(got, expected)


def test_nkd_has_the_released_weights_when_left_alone():
    small = logits_batch(torch.zeros(2, 3), torch.zeros(2, 3))
    method = small.build("nkd")
    assert small.terms(method).weights == {"task": 1.0, "target": 1.0, "non_target": 1.5}
    assert method.config.temperature == 1.0
    assert tuple(method.needs) == ((), True, True, False, False)


def test_nkd_is_refused_when_the_teacher_has_no_classifier_or_other_classes():
    with pytest.raises(InputError, match="the nkd method needs teacher logits"):
        logits_batch(torch.zeros(2, 3), torch.zeros(2, 0)).build("nkd")
    small = logits_batch(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(InputError, match=r"\(2, 3\), the teacher's \(2, 4\)"):
        small.terms(small.build("nkd"))


@pytest.mark.parametrize(("name", "value"), [("gamma", -0.1), ("temperature", 0.0), ("temperature", float("nan"))])
def test_nkd_config_refuses_when_a_value_is_impossible(name, value):
    with pytest.raises(InputError, match=f"{name} of NKD is {value}, expected a number"):
        NKDConfig(**{name: value})
    assert NKDConfig(gamma=0.0, temperature=0.1).gamma == 0
