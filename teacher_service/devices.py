"""The device a teacher runs on, by name."""

import torch

from feature_store.errors import ResourceError


def find_device(name: str) -> torch.device:
    """A torch device that works; ``auto`` takes a GPU if there is one.

    Raises:
        ResourceError: It cannot be used on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ResourceError(f"--device {name} cannot be used: {reason}; try cpu, cuda or auto") from error
    return device
