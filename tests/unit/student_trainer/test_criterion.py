"""The classification losses against their formulas."""

import pytest
import torch

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
