"""The classification losses against their formulas."""

import pytest
import torch
import torch.nn.functional as F

from feature_store.errors import InputError
from student_trainer.methods.criterion import TASK_LOSSES, binary_cross_entropy, cross_entropy

LOGITS = torch.tensor([[2.0, -1.0, 0.5, 0.0], [0.1, 0.2, 3.0, -4.0]], dtype=torch.float64)
LABELS = torch.tensor([0, 3])
SOFT = torch.tensor([[0.7, 0.3, 0.0, 0.0], [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)


def one_hot(smoothing: float = 0.0) -> torch.Tensor:
    return (1 - smoothing) * torch.eye(4, dtype=torch.float64)[LABELS] + smoothing / 4


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_follows_formula_when_labels_are_smoothed(smoothing):
    expected = -(one_hot(smoothing) * LOGITS.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(cross_entropy(LOGITS, LABELS, smoothing), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_binary_cross_entropy_sums_over_classes_and_averages_over_batch_when_given_labels(smoothing):
    target, p = one_hot(smoothing), LOGITS.sigmoid()
    expected = -(target * p.log() + (1 - target) * (1 - p).log()).sum() / 2
    torch.testing.assert_close(binary_cross_entropy(LOGITS, LABELS, smoothing), expected)


def test_losses_take_scores_in_place_of_one_hot_when_labels_are_soft():
    torch.testing.assert_close(cross_entropy(LOGITS, SOFT), -(SOFT * LOGITS.log_softmax(1)).sum(1).mean())
    p = LOGITS.sigmoid()
    expected = -(SOFT * p.log() + (1 - SOFT) * (1 - p).log()).sum() / 2
    torch.testing.assert_close(binary_cross_entropy(LOGITS, SOFT), expected)


@pytest.mark.parametrize("loss", TASK_LOSSES.values())
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_loss_is_summed_in_float32_when_logits_are_half_precision(loss, dtype):
    value = loss(LOGITS.bfloat16(), LABELS.to(dtype))
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(LOGITS.bfloat16().float(), LABELS))


@pytest.mark.parametrize("loss", TASK_LOSSES.values())
@pytest.mark.parametrize("targets", [LABELS[:1], SOFT[:, :3], LABELS.double(), SOFT.long()])
def test_loss_names_the_shapes_when_targets_do_not_fit(loss, targets):
    with pytest.raises(InputError, match=r"targets are .* for logits \(2, 4\)"):
        loss(LOGITS, targets)


@pytest.mark.parametrize("loss", TASK_LOSSES.values())
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_the_mean_over_labelled_samples_when_some_have_no_label(loss, smoothing):
    logits = torch.cat([LOGITS[:1], torch.full((2, 4), 7.0, dtype=torch.float64), LOGITS[1:]]).requires_grad_()
    value = loss(logits, torch.tensor([0, -1, -1, 3]), smoothing)
    target, p = one_hot(smoothing), LOGITS.sigmoid()
    formulas = {
        cross_entropy: -(target * LOGITS.log_softmax(1)).sum() / 2,
        binary_cross_entropy: -(target * p.log() + (1 - target) * (1 - p).log()).sum() / 2,
    }
    torch.testing.assert_close(value, formulas[loss])
    value.backward()
    assert logits.grad[1:3].count_nonzero() == 0
    assert logits.grad[[0, 3]].count_nonzero() == 8


@pytest.mark.parametrize("loss", TASK_LOSSES.values())
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_zero_with_a_gradient_of_zeros_when_no_sample_has_a_label(loss, smoothing):
    logits = LOGITS.clone().requires_grad_()
    value = loss(logits, torch.tensor([-1, -1]), smoothing)
    value.backward()
    assert value == 0
    assert torch.equal(logits.grad, torch.zeros_like(LOGITS))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses_are_bitwise_those_of_torch_when_every_sample_has_a_label(smoothing):
    logits, labels = torch.randn(33, 10, generator=torch.Generator().manual_seed(0)), torch.arange(33) % 10
    assert torch.equal(
        cross_entropy(logits, labels, smoothing), F.cross_entropy(logits, labels, label_smoothing=smoothing)
    )
    target = (1 - smoothing) * F.one_hot(labels, 10).float() + smoothing / 10
    expected = F.binary_cross_entropy_with_logits(logits, target, reduction="sum") / 33
    assert torch.equal(binary_cross_entropy(logits, labels, smoothing), expected)
