"""Taps of a teacher: what timm's ``forward_intermediates`` gives, as tokens.

Shape legend: B batch, H W grid, N = H*W grid tokens, P prefix (class and register) tokens, C channels.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn

from feature_store.errors import InputError, Remedy, one_line
from feature_store.format.manifest import SplitInfo

BLOCK = "block"
"""Prefix of the taps that are named by block; the number counts timm's ``feature_info``."""

Size = tuple[int, int]


class NeedsValuesError(InputError):
    """A model on the meta device computes with values, which are not there; it has to be built with weights."""


@dataclass(frozen=True)
class OutputShapes:
    """Shapes of a model's outputs for one image.

    Attributes:
        final: (C, H, W) of the final feature map.
        prefix_tokens: P of the final features.
        blocks: (C, H, W) of each block or stage in timm's ``feature_info``.
    """

    final: tuple[int, int, int]
    prefix_tokens: int
    blocks: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class TapShapes:
    """(N, C) of the taps of a teacher.

    Attributes:
        standard: Of the taps given unless others are asked for: the final map and what the later blocks take.
        blocks: Of each block or stage.
    """

    standard: dict[str, tuple[int, int]]
    blocks: tuple[tuple[int, int], ...]

    def of(self, tap: str) -> tuple[int, int]:
        """(N, C) of a tap by name.

        Raises:
            InputError: The teacher has no such tap.
        """
        if tap in self.standard:
            return self.standard[tap]
        index = block_index(tap)
        if index is None or index >= len(self.blocks):
            raise InputError(
                f"the teacher has no tap {tap!r}; it has {', '.join(self.standard)} and {BLOCK}0 to "
                f"{BLOCK}{len(self.blocks) - 1}"
            )
        return self.blocks[index]


def block_index(tap: str) -> int | None:
    """Index in timm's ``feature_info`` of a tap named by block; None for other taps."""
    number = tap.removeprefix(BLOCK)
    return int(number) if number != tap and number.isdecimal() and number == str(int(number)) else None


def tap_shapes(split: SplitInfo, blocks: Sequence[tuple[int, int, int]] = ()) -> TapShapes:
    """Shapes of every tap of a teacher with this split and blocks (C, H, W)."""
    grid3, grid4 = (height * width for height, width in (split.input_grid, split.output_grid))
    standard = {"stage4": (grid4, split.output_dim)}
    if split.has_later_blocks:
        standard["stage3"] = (grid3, split.input_dim)
    if split.prefix == "cached":
        standard["stage3_prefix"] = (split.prefix_tokens, split.input_dim)
    return TapShapes(standard, tuple((height * width, channels) for channels, height, width in blocks))


def input_size(model: nn.Module) -> Size:
    """Height and width of the images a timm model takes, in pixels."""
    size = getattr(model.patch_embed, "img_size", None) if hasattr(model, "patch_embed") else None
    height, width = size or resolve_model_data_config(model)["input_size"][1:]
    return int(height), int(width)


def final_map(model: nn.Module, features: Any, last_BCHW: Tensor) -> Tensor:
    """Final features, tokens [B, P + N, C] or a map, as a map [B, C, H, W].

    Args:
        model: Gives the layout of its maps, ``output_fmt``.
        features: Result of ``forward_features``.
        last_BCHW: The last block's or stage's own output: the result where features are neither tokens nor a map of
            its grid.
    """
    H, W = last_BCHW.shape[2:]
    ndim = features.ndim if isinstance(features, Tensor) else 0
    if ndim == 3 and features.shape[1] >= H * W:
        return features[:, -H * W :].transpose(1, 2).unflatten(2, (H, W))
    if ndim == 4:
        map_BCHW = features.permute(0, 3, 1, 2) if getattr(model, "output_fmt", "") == "NHWC" else features
        return map_BCHW if map_BCHW.shape[2:] == (H, W) else last_BCHW
    return last_BCHW


def grid_tokens(map_BCHW: Tensor) -> Tensor:
    """A map as tokens [B, N, C], float32."""
    return map_BCHW.flatten(2).transpose(1, 2).float().contiguous()


@torch.no_grad()
def measure(model: nn.Module, size: Size) -> OutputShapes:
    """Shapes of a model's outputs, from a forward pass on the meta device; weights are neither read nor copied.

    Models that cannot run there (some read values) run on one blank image where they are.

    Args:
        model: A model in eval mode with timm's ``forward_intermediates``.
        size: Height and width of its images.

    Raises:
        InputError: It gives no intermediate maps, or cannot take images of this size.
        NeedsValuesError: It is on the meta device, and cannot run there.
    """
    if not callable(getattr(model, "forward_intermediates", None)):
        raise InputError(
            f"teacher {type(model).__name__} has no forward_intermediates, which gives the maps to store; choose "
            "another model",
            remedy=Remedy.LIST_TEACHERS,
        )
    one = next(model.parameters(), torch.empty(0))
    image_BCHW = torch.zeros(1, 3, *size, dtype=one.dtype, device=one.device)
    try:
        try:
            features, maps = _on_meta(model).forward_intermediates(image_BCHW.to("meta"))  # pyright: ignore[reportCallIssue]
        except Exception:
            if one.is_meta:
                raise
            features, maps = model.forward_intermediates(image_BCHW)  # pyright: ignore[reportCallIssue]
        final = final_map(model, features, maps[-1])
    except Exception as error:  # whatever a model of any library raises
        reason = one_line(error)
        kind = NeedsValuesError if one.is_meta and "meta" in reason else InputError
        raise kind(
            f"teacher {type(model).__name__} gives no intermediate maps of {size[0]} x {size[1]} images: {reason}; "
            "choose another model or size",
            remedy=Remedy.LIST_TEACHERS,
        ) from error
    prefix = features.shape[1] - final[0, 0].numel() if final is not maps[-1] and features.ndim == 3 else 0
    return OutputShapes(_shape(final), prefix, tuple(map(_shape, maps)))


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy of a model on the meta device: what a forward pass leaves behind in it never reaches the model."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): _meta(tensor) for tensor in tensors})


def _meta(tensor: Tensor) -> Tensor:
    shadow = torch.empty_like(tensor, device="meta")
    return nn.Parameter(shadow, requires_grad=False) if isinstance(tensor, nn.Parameter) else shadow


def _shape(map_BCHW: Tensor) -> tuple[int, int, int]:
    _, channels, height, width = map_BCHW.shape
    return int(channels), int(height), int(width)
