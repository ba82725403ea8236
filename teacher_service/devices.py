"""Devices by name."""

import torch

from feature_store.errors import ResourceError
from feature_store.tools.options import environment_number


def find_device(name: str) -> torch.device:
    """A torch device that works; ``auto`` is a GPU if there is one, under torchrun each process's own.

    Raises:
        ResourceError: It cannot be used on this machine.
    """
    if name == "auto":
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return torch.device("cuda", environment_number("LOCAL_RANK", 0) % gpus) if gpus else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ResourceError(f"--device {name} cannot be used: {reason}; try cpu, cuda or auto") from error
    return device
