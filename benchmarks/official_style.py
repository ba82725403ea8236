"""ScaleKD's loss written down operation by operation: the baseline of step.py.

DCT by matrices, one view path after the other, a batch of queries although all samples share them, one pass through the
later blocks per view path. It borrows the weights of a ScaleKD, so that both must give the same values.

Shape legend: B batch, C student channels, D teacher channels, H W grid, N = H*W positions, A attention heads.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from student_trainer.methods import StudentOutput
from student_trainer.methods.base import DistillBatch, Terms
from student_trainer.methods.cap import CrossAttentionProjector
from student_trainer.methods.scalekd import ScaleKD


def official_style_loss(method: ScaleKD, student: StudentOutput, batch: DistillBatch) -> Terms:
    """The terms of ``method``, all of whose parts are switched on; see ScaleKD.forward."""
    config, (F3_BCHW, F4_BCHW), teacher = method.config, student.maps, batch.teacher
    later_blocks, grid = method.perception.later_blocks, method.perception.later_blocks.info.output_grid
    raw = {"task": method.task(student.logits, batch.labels)}
    for view in ("original", "alternative"):
        y_BND = later_blocks(project(method.stage3[view], F3_BCHW, None), teacher.taps.get("stage3_prefix"))
        z_BND = project(method.stage4[view], F4_BCHW, y_BND)
        for stage, x_BND in (("stage3", y_BND), ("stage4", z_BND)):
            target_BND = teacher.taps["stage4"]
            if view == "alternative":
                x_BND, target_BND = without_lowest_frequency(x_BND, grid), without_lowest_frequency(target_BND, grid)
            raw[f"{stage}_{view}"] = mimic(x_BND, target_BND)
    if "kd" in method.weights and teacher.logits is not None:
        probabilities = torch.softmax(student.logits / config.kd_temperature, dim=1)
        target = torch.softmax(teacher.logits / config.kd_temperature, dim=1)
        cross_entropy = -(target * torch.log(probabilities)).sum(dim=1).mean()
        raw["kd"] = config.kd_temperature**2 * cross_entropy
    return Terms(raw, method.weights)


def project(cap: nn.Module, student_BCHW: Tensor, query_BND: Tensor | None) -> Tensor:
    """CAP, operation by operation."""
    assert isinstance(cap, CrossAttentionProjector)
    batch, heads = len(student_BCHW), cap.num_heads
    z_BNC = (cap.key_proj(student_BCHW) + cap.position).flatten(2).transpose(1, 2)
    if query_BND is None:
        assert cap.query is not None
        query_BND = cap.query.repeat(batch, 1, 1)
    u_BND = cap.query_proj(query_BND)
    q, k, v = (
        x.reshape(batch, x.shape[1], heads, -1).permute(0, 2, 1, 3)
        for x in (cap.to_q(u_BND), cap.to_k(z_BNC), cap.to_v(z_BNC))
    )
    attention = torch.softmax((q @ k.transpose(-2, -1)) * cap.scale, dim=-1)
    a_BND = (attention @ v).transpose(1, 2).reshape(batch, -1, cap.teacher_dim)
    n_BND = cap.norm(cap.to_out(a_BND))
    return n_BND + cap.mlp(n_BND)


def mimic(x_BND: Tensor, target_BND: Tensor) -> Tensor:
    """Squared distance of the normalised maps, summed over positions, mean over the batch."""
    x_BDN, target_BDN = x_BND.transpose(1, 2), target_BND.transpose(1, 2)
    difference = F.normalize(x_BDN, dim=1) - F.normalize(target_BDN, dim=1)
    return (difference**2).sum() / len(x_BND)


def without_lowest_frequency(x_BND: Tensor, grid: tuple[int, int]) -> Tensor:
    """phi: DCT, the (0, 0) coefficient set to zero, inverse DCT."""
    x_BDHW = x_BND.transpose(1, 2).unflatten(2, grid)
    rows, columns = dct_matrix(grid[0], x_BND), dct_matrix(grid[1], x_BND)
    frequencies = rows @ x_BDHW @ columns.T
    mask = torch.ones(grid, dtype=x_BND.dtype, device=x_BND.device)
    mask[0, 0] = 0
    return (rows.T @ (frequencies * mask) @ columns).flatten(2).transpose(1, 2)


def dct_matrix(size: int, like: Tensor) -> Tensor:
    """The orthonormal DCT-II of a number of points."""
    n = torch.arange(size, dtype=torch.float64)
    matrix = math.sqrt(2 / size) * torch.cos(math.pi / size * (n[None] + 0.5) * n[:, None])
    matrix[0] /= math.sqrt(2)
    return matrix.to(like)
