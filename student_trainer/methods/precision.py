"""The dtype that losses are summed in."""

from functools import reduce

import torch
from torch import Tensor


def at_least_float32(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in their common dtype, float32 or wider.

    Sums over a whole feature map lose their small differences in float16 and bfloat16.
    """
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)
    return tuple(tensor.to(dtype) for tensor in tensors)
