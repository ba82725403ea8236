"""The student's own classification losses, on class indices or soft labels.

Shape legend: B batch, K classes.
"""

import torch.nn.functional as F
from torch import Tensor

from feature_store.errors import InputError
from student_trainer.methods.precision import at_least_float32


def cross_entropy(logits_BK: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean over the batch of -sum_k target_k log softmax(logits)_k.

    Args:
        logits_BK: The student's logits.
        targets: Class indices int [B], or soft labels [B, K].
        label_smoothing: epsilon of the target (1 - epsilon) * target + epsilon / K.

    Returns:
        The loss, a scalar in float32 or wider.

    Raises:
        InputError: Targets that are neither [B] integers nor [B, K] scores.
    """
    _check_targets(logits_BK, targets)
    if targets.is_floating_point():
        logits_BK, targets = at_least_float32(logits_BK, targets)
    else:
        (logits_BK,), targets = at_least_float32(logits_BK), targets.long()
    return F.cross_entropy(logits_BK, targets, label_smoothing=label_smoothing)


def binary_cross_entropy(logits_BK: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Sigmoid cross entropy summed over classes, mean over the batch.

    Args:
        logits_BK: The student's logits.
        targets: Class indices int [B], or soft labels [B, K].
        label_smoothing: epsilon of the target (1 - epsilon) * target + epsilon / K.

    Returns:
        The loss, a scalar in float32 or wider.

    Raises:
        InputError: Targets that are neither [B] integers nor [B, K] scores.
    """
    _check_targets(logits_BK, targets)
    classes = logits_BK.shape[1]
    if not targets.is_floating_point():
        targets = F.one_hot(targets.long(), classes).to(logits_BK.dtype)
    logits_BK, targets = at_least_float32(logits_BK, targets)
    targets = (1 - label_smoothing) * targets + label_smoothing / classes
    return F.binary_cross_entropy_with_logits(logits_BK, targets, reduction="sum") / len(logits_BK)


TASK_LOSSES = {"ce": cross_entropy, "bce": binary_cross_entropy}


def _check_targets(logits_BK: Tensor, targets: Tensor) -> None:
    expected = logits_BK.shape if targets.is_floating_point() else logits_BK.shape[:1]
    if targets.shape != expected:
        raise InputError(
            f"targets are {targets.dtype} {tuple(targets.shape)} for logits {tuple(logits_BK.shape)}; "
            "expected class indices [B] of an integer dtype or soft labels [B, K] of a float dtype"
        )
