"""The loss that benchmarks/step.py compares ours with must be the same loss."""

from functools import partial

import pytest
import timm
import torch

from benchmarks.official_style import official_style_loss, without_lowest_frequency
from feature_store.teacher import split_teacher
from student_trainer.methods import (
    DistillBatch,
    ScaleKD,
    ScaleKDConfig,
    StudentOutput,
    StudentShape,
    TeacherOutput,
    TeacherShape,
)
from student_trainer.methods.dfm import without_spatial_mean


@pytest.mark.parametrize("kd_alpha", [0.5, None])
def test_official_style_loss_equals_ours_when_given_its_weights(kd_alpha):
    torch.manual_seed(0)
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=64, window_size=2, embed_dim=8, depths=(1, 1, 1, 2),
        num_heads=(1, 1, 2, 2), num_classes=0,
    ).eval()  # fmt: skip
    later = split_teacher(swin.double())[1]
    method = ScaleKD(
        ScaleKDConfig(kd_alpha=kd_alpha),
        StudentShape((6, 10), ((4, 4), (2, 2)), 5),
        TeacherShape(later.info, 5, lambda: later),
    ).double()
    inputs = [torch.randn(3, 6, 4, 4), torch.randn(3, 10, 2, 2), torch.randn(3, 5)]
    teacher = TeacherOutput({"stage4": torch.randn(3, 4, 64).double()}, torch.randn(3, 5).double())
    batch = DistillBatch(torch.empty(0), torch.tensor([0, 4, 2]), teacher)
    results = []
    for compute in (method, partial(official_style_loss, method)):
        F3, F4, logits = leaves = [leaf.double().requires_grad_() for leaf in inputs]
        terms = compute(StudentOutput((F3, F4), logits), batch)
        terms.total.backward()
        weights = [leaf.grad.clone() for leaf in method.parameters()]
        method.zero_grad()
        results.append(({**terms.weighted, "total": terms.total}, [leaf.grad for leaf in leaves] + weights))
    (ours, gradients), (theirs, expected) = results
    assert ours.keys() == theirs.keys()
    for name, term in ours.items():
        torch.testing.assert_close(term, theirs[name], rtol=1e-12, atol=0)
    for mine, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


def test_dct_by_matrices_is_the_subtraction_when_its_lowest_coefficient_is_zeroed():
    x_BND = torch.randn(2, 15, 4, dtype=torch.float64)
    torch.testing.assert_close(without_lowest_frequency(x_BND, (3, 5)), without_spatial_mean(x_BND), rtol=0, atol=1e-12)
