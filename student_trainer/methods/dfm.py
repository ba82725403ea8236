"""DFM, dual-view feature mimicking: two losses on projected features.

Shape legend: B batch, N grid positions, D channels.
"""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from feature_store.errors import InputError
from student_trainer.methods.precision import at_least_float32


def original_view_loss(projected_BND: Tensor, teacher_BND: Tensor) -> Tensor:
    """L_ori = sum_n ||p_n / |p_n| - t_n / |t_n|||^2 / B = 2 sum_n (1 - cos(p_n, t_n)) / B.

    Args:
        projected_BND: The student's projected tokens p.
        teacher_BND: The teacher's final feature map F^t as tokens, same order.

    Returns:
        The unweighted loss, a scalar in float32 or wider.

    Raises:
        InputError: The shapes differ.
    """
    projected_BND, teacher_BND = _comparable(projected_BND, teacher_BND)
    difference = F.normalize(projected_BND, dim=-1) - F.normalize(teacher_BND, dim=-1)
    return difference.square().sum() / len(projected_BND)


def alternative_view_loss(projected_BND: Tensor, teacher_BND: Tensor) -> Tensor:
    """L_alt: the original-view loss of phi(p) and phi(F^t).

    phi = IDCT(zero the (0, 0) coefficient of DCT) subtracts each channel's spatial mean, for any scaling of the
    transform; it is computed as that subtraction.

    Args:
        projected_BND: The student's projected tokens p.
        teacher_BND: The teacher's final feature map F^t as tokens, same order.

    Returns:
        The unweighted loss, a scalar in float32 or wider.

    Raises:
        InputError: The shapes differ.
    """
    projected_BND, teacher_BND = _comparable(projected_BND, teacher_BND)
    return original_view_loss(without_spatial_mean(projected_BND), without_spatial_mean(teacher_BND))


def without_spatial_mean(x_BND: Tensor) -> Tensor:
    """The map less the mean over positions of each sample's channels: phi of the paper."""
    return x_BND - x_BND.mean(dim=1, keepdim=True)


VIEW_LOSSES = {"original": original_view_loss, "alternative": alternative_view_loss}


def dual_view_losses(stage: str, projected: Mapping[str, Tensor], teacher_BND: Tensor) -> dict[str, Tensor]:
    """The unweighted loss of each projected view path, as ``<stage>_<view path>``.

    Args:
        stage: Where the features come from.
        projected: Tokens [B, N, D] by view path, ``original`` and ``alternative`` or one of them.
        teacher_BND: F^t as tokens.
    """
    return {f"{stage}_{view}": VIEW_LOSSES[view](p_BND, teacher_BND) for view, p_BND in projected.items()}


def _comparable(projected_BND: Tensor, teacher_BND: Tensor) -> tuple[Tensor, ...]:
    if projected_BND.shape != teacher_BND.shape:
        raise InputError(
            f"projected features have shape {tuple(projected_BND.shape)}, the teacher's have "
            f"{tuple(teacher_BND.shape)}; both must be [B, N, D] on the teacher's final grid"
        )
    return at_least_float32(projected_BND, teacher_BND)
