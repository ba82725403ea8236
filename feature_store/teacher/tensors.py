"""numpy arrays as torch tensors, for those who asked for torch."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def as_tensors(arrays: Mapping[str, np.ndarray], device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """The same arrays as tensors on a device; on the CPU they share the arrays' memory."""
    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
