"""The student's own classification losses, on class indices or soft labels.

Class index NO_LABEL (-1) marks a sample without a label. It takes no part in the loss, which is the mean over labelled
samples, and 0 with a gradient of zeros where there are none: processes of a group have gradients for all parameters.

Shape legend: B batch, K classes.
"""

import torch.nn.functional as F
from torch import Tensor

from feature_store.errors import InputError
from feature_store.inputs.base import NO_LABEL
from student_trainer.methods.precision import at_least_float32


def cross_entropy(logits_BK: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean over labelled samples of -sum_k target_k log softmax(logits)_k.

    Args:
        logits_BK: The student's logits.
        targets: Class indices int [B], NO_LABEL for none; or soft labels [B, K].
        label_smoothing: epsilon of the target (1 - epsilon) * target + epsilon / K.

    Returns:
        The loss, a scalar in float32 or wider.

    Raises:
        InputError: Targets that are neither [B] integers nor [B, K] scores.
    """
    _check_targets(logits_BK, targets)
    if targets.is_floating_point():
        logits_BK, targets = at_least_float32(logits_BK, targets)
        return F.cross_entropy(logits_BK, targets, label_smoothing=label_smoothing)
    (logits_BK,), targets = at_least_float32(logits_BK), targets.long()
    total = F.cross_entropy(logits_BK, targets, ignore_index=NO_LABEL, reduction="sum", label_smoothing=label_smoothing)
    return total / _labelled(targets)


def binary_cross_entropy(logits_BK: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Sigmoid cross entropy summed over classes, mean over labelled samples.

    Args:
        logits_BK: The student's logits.
        targets: Class indices int [B], NO_LABEL for none; or soft labels [B, K].
        label_smoothing: epsilon of the target (1 - epsilon) * target + epsilon / K.

    Returns:
        The loss, a scalar in float32 or wider.

    Raises:
        InputError: Targets that are neither [B] integers nor [B, K] scores.
    """
    _check_targets(logits_BK, targets)
    classes, weight_B1, count = logits_BK.shape[1], None, len(logits_BK)
    if not targets.is_floating_point():
        weight_B1, count = (targets != NO_LABEL).float()[:, None], _labelled(targets)
        targets = F.one_hot(targets.long().where(targets != NO_LABEL, 0), classes).to(logits_BK.dtype)
    logits_BK, targets = at_least_float32(logits_BK, targets)
    targets = (1 - label_smoothing) * targets + label_smoothing / classes
    return F.binary_cross_entropy_with_logits(logits_BK, targets, weight_B1, reduction="sum") / count


TASK_LOSSES = {"ce": cross_entropy, "bce": binary_cross_entropy}


def _labelled(targets_B: Tensor) -> Tensor:
    """Number of labelled samples, at least 1; stays on the device."""
    return (targets_B != NO_LABEL).sum().clamp_min(1)


def _check_targets(logits_BK: Tensor, targets: Tensor) -> None:
    expected = logits_BK.shape if targets.is_floating_point() else logits_BK.shape[:1]
    if targets.shape != expected:
        raise InputError(
            f"targets are {targets.dtype} {tuple(targets.shape)} for logits {tuple(logits_BK.shape)}; "
            "expected class indices [B] of an integer dtype or soft labels [B, K] of a float dtype"
        )
