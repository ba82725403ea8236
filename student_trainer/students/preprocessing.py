"""Preprocessing of a student's images: size, crop, normalisation."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from feature_store.teacher.model import normalise


@dataclass(frozen=True)
class Preprocessing:
    """Preprocessing of a student's images; kept in checkpoints and exports.

    Attributes:
        input_size: Height and width, in pixels.
        mean: Normalisation mean per RGB channel on the 0..1 scale.
        std: Normalisation standard deviation per RGB channel on the 0..1 scale.
        interpolation: ``bilinear`` or ``bicubic``.
        crop_pct: Part of the shorter side that the centre crop keeps.
    """

    input_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float

    def normaliser(self, device: torch.device) -> "Normaliser":
        """uint8 pixels to images, on a device."""
        return Normaliser(self.mean, self.std, device)


class Normaliser:
    """uint8 pixels [B, H, W, 3] to normalised float32 images [B, 3, H, W], on a device."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        self._device = device
        self._mean = torch.tensor(mean, device=device) * 255.0
        self._std = torch.tensor(std, device=device) * 255.0

    def __call__(self, pixels_BHWC: Tensor) -> Tensor:
        """Images on the device."""
        return normalise(pixels_BHWC.to(self._device, non_blocking=True), self._mean, self._std)
