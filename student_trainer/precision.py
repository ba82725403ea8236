"""How exact numbers are: the dtype losses are summed in, and whether a run repeats to the bit on a GPU."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce

import torch
from torch import Tensor


def at_least_float32(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in their common dtype, float32 or wider.

    Sums over a whole feature map lose their small differences in float16 and bfloat16.
    """
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)
    return tuple(tensor.to(dtype) for tensor in tensors)


@contextmanager
def repeatable(*, enabled: bool) -> Iterator[None]:
    """Within: torch takes only algorithms that repeat to the bit; on a CPU it does anyway."""
    before, benchmark = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    if enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS refuses to be deterministic without
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.backends.cudnn.benchmark = benchmark
