"""Numerics of a run on a GPU: repeatable algorithms, TF32."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def numerics(*, deterministic: bool, tf32: bool) -> Iterator[None]:
    """Set repeatable algorithms, and TF32 matrix products, within the context, where requested.

    A CPU repeats to the bit anyway, and has no TF32. Otherwise cuDNN tries its convolutions and takes the fastest.
    """
    before, benchmark = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    precision = torch.get_float32_matmul_precision()
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS refuses to be deterministic without
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not deterministic
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.backends.cudnn.benchmark = benchmark
        torch.set_float32_matmul_precision(precision)
