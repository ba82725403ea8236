"""The store's numpy loss terms against the trainer's, gradients by autograd."""

import numpy as np
import pytest
import torch

from feature_store.tools.loss_terms import FEATURE_TERMS, distillation
from student_trainer.methods.dfm import alternative_view_loss, original_view_loss
from student_trainer.methods.kd import kd_loss

TORCH = {"original": original_view_loss, "alternative": alternative_view_loss}


@pytest.mark.parametrize("name", FEATURE_TERMS)
def test_feature_terms_and_gradients_equal_the_trainers(name):
    rng = np.random.default_rng(0)
    student, teacher = (rng.standard_normal((3, 9, 5)) + 0.5 for _ in range(2))
    p = torch.tensor(student, requires_grad=True)
    expected = TORCH[name](p, torch.tensor(teacher))
    expected.backward()
    loss, gradient = FEATURE_TERMS[name](student, teacher)
    assert np.isclose(loss, expected.item(), rtol=1e-12)
    assert np.allclose(gradient, p.grad.numpy(), rtol=1e-9, atol=1e-12)


def test_distillation_and_its_gradient_equal_the_trainers():
    rng = np.random.default_rng(1)
    student, teacher = 9 * rng.standard_normal((4, 7)), 9 * rng.standard_normal((4, 7))
    s = torch.tensor(student, requires_grad=True)
    expected = kd_loss(s, torch.tensor(teacher).softmax(dim=1))
    expected.backward()
    loss, gradient = distillation(student, teacher)
    assert np.isclose(loss, expected.item(), rtol=1e-12)
    assert np.allclose(gradient, s.grad.numpy(), rtol=1e-9, atol=1e-12)
