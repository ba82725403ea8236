"""DIST against its formula."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_batches import logits_batch
from scipy.special import softmax

from feature_store.errors import InputError
from student_trainer.methods import DISTConfig
from student_trainer.methods.criterion import cross_entropy
from student_trainer.methods.dist import pearson_distance


def logits(batch: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    s, z = torch.randn(2, batch, classes, dtype=torch.float64)
    return s, z


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's, with the released 1e-8 beside the norms: it shows where the probabilities of a class hardly differ."""
    a, b = a - a.mean(), b - b.mean()
    return a @ b / (np.linalg.norm(a) * np.linalg.norm(b) + 1e-8)


@settings(max_examples=25, deadline=None)
@given(
    beta=st.floats(0, 4),
    gamma=st.floats(0, 4),
    tau=st.floats(0.5, 6),
    batch=st.integers(2, 6),
    classes=st.integers(3, 7),
)
def test_dist_equals_the_written_out_correlations(beta, gamma, tau, batch, classes):
    s, z = logits(batch, classes)
    small = logits_batch(s, z)
    y_s, y_t = softmax(s.numpy() / tau, axis=1), softmax(z.numpy() / tau, axis=1)
    inter = 1 - np.mean([correlation(y_s[n], y_t[n]) for n in range(batch)])
    intra = 1 - np.mean([correlation(y_s[:, k], y_t[:, k]) for k in range(classes)])
    terms = small.terms(small.build("dist", beta=beta, gamma=gamma, tau=tau))
    assert terms.raw["inter"].item() == pytest.approx(tau**2 * inter, rel=1e-9, abs=1e-12)
    assert terms.raw["intra"].item() == pytest.approx(tau**2 * intra, rel=1e-9, abs=1e-12)
    task = cross_entropy(s, small.batch.labels).item()
    assert terms.total.item() == pytest.approx(task + tau**2 * (beta * inter + gamma * intra), rel=1e-9)


def test_pearson_distance_ignores_shift_and_scale_of_rows():
    a, b = logits(3, 6)
    shift, scale = torch.tensor([[1.0], [-2.0], [3.0]]), torch.tensor([[2.0], [0.5], [7.0]])
    torch.testing.assert_close(pearson_distance(scale * a + shift, b), pearson_distance(a, b), rtol=1e-6, atol=1e-7)
    assert pearson_distance(a, a).item() == pytest.approx(0, abs=1e-7)
    assert pearson_distance(a, -a).item() == pytest.approx(2, abs=1e-7)


def test_pearson_distance_of_a_constant_row_is_one_with_a_finite_gradient():
    a = torch.ones(1, 4, requires_grad=True)
    distance = pearson_distance(a, torch.randn(1, 4))
    assert distance.item() == 1
    distance.backward()
    assert a.grad.isfinite().all()


def test_dist_is_summed_in_float32_when_logits_are_half_precision():
    s, z = logits(4, 6)
    low, high = logits_batch(s.bfloat16(), z.bfloat16()), logits_batch(s.bfloat16().float(), z.bfloat16().float())
    got, expected = (small.terms(small.build("dist")).raw for small in (low, high))
    assert got["inter"].dtype == got["intra"].dtype == torch.float32
    torch.testing.assert_close(got, expected)


def test_dist_has_the_released_weights_when_left_alone():
    small = logits_batch(*logits(2, 3))
    method = small.build("dist")
    assert small.terms(method).weights == {"task": 1.0, "inter": 2.0, "intra": 2.0}
    assert method.config.tau == 1.0
    assert tuple(method.needs) == ((), True, False, False, False)


def test_dist_is_refused_when_the_teacher_has_no_classifier_or_other_classes():
    with pytest.raises(InputError, match="the dist method needs teacher logits"):
        logits_batch(torch.zeros(2, 3), torch.zeros(2, 0)).build("dist")
    small = logits_batch(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(InputError, match=r"\(2, 3\), the teacher's \(2, 4\)"):
        small.terms(small.build("dist"))


@pytest.mark.parametrize(("name", "value"), [("beta", -0.1), ("gamma", -0.1), ("tau", 0.0), ("tau", float("nan"))])
def test_dist_config_refuses_when_a_value_is_impossible(name, value):
    with pytest.raises(InputError, match=f"{name} of DIST is {value}, expected a number"):
        DISTConfig(**{name: value})
    assert DISTConfig(beta=0.0, gamma=0.0, tau=0.1).beta == 0
