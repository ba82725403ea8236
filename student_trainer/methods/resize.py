"""Feature maps brought to another grid."""

import torch.nn.functional as F
from torch import Tensor

from student_trainer.methods.base import Grid
from student_trainer.methods.precision import at_least_float32


def resized(map_BCHW: Tensor, grid: Grid) -> Tensor:
    """A map on another grid: bilinear and antialiased; unchanged where the grid is the same already."""
    if map_BCHW.shape[2:] == tuple(grid):
        return map_BCHW
    (map_BCHW,) = at_least_float32(map_BCHW)  # antialiasing on CPUs is not implemented for bfloat16
    return F.interpolate(map_BCHW, size=grid, mode="bilinear", antialias=True)
