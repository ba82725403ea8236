"""Cut a frozen timm teacher in two: everything up to the stage-3 output, and the later blocks with the final norm.

Shape legend: B batch, H W grid, N = H*W grid tokens, P prefix (class and register) tokens, D channels.
"""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from feature_store.errors import InputError
from feature_store.manifest import SplitInfo


class EarlyStages(nn.Module):
    """The teacher up to the stage-3 output, weights shared with the model it was cut from.

    Its output has timm's own layout: [B, H, W, D] for Swin, [B, P + N, D] for plain ViT.
    """

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Stage-3 output of normalised images."""
        return self.trunk.forward_features(images_BCHW)  # pyright: ignore[reportCallIssue]


class LaterBlocks(nn.Module):
    """P of the paper: the frozen teacher between the stage-3 output and the final feature map F^t, norm included.

    Gradients flow through it to its input; its own weights never learn and it never leaves eval mode
    (the released code's drop path stays active in training; ours does not).
    """

    def __init__(self, blocks: Iterable[nn.Module], norm: nn.Module, info: SplitInfo) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.norm = norm
        self.info = info
        self.requires_grad_(False).train(False)

    def train(self, mode: bool = True) -> "LaterBlocks":
        """Stay in eval mode whatever the trainer sets."""
        return super().train(False)

    def forward(self, x: Tensor, prefix_BPD: Tensor | None = None) -> Tensor:
        """Final feature map of a stage-3 output.

        Args:
            x: Grid tokens [B, N, D]; or timm's own layout, i.e. what EarlyStages returns ([B, H, W, D] for
                Swin, [B, P + N, D] for ViT).
            prefix_BPD: The teacher's own prefix tokens at the split, needed when x holds grid tokens only
                and the teacher has any.

        Returns:
            The same layout as x: grid tokens for grid tokens (F^t), timm's layout for timm's layout, then
            bitwise equal to the model's ``forward_features``.

        Raises:
            InputError: x or the prefix tokens do not have the split's shape.
        """
        if self.info.family == "swin":
            return self._forward_swin(x)
        return self._forward_vit(x, prefix_BPD)

    def _forward_swin(self, x: Tensor) -> Tensor:
        if x.ndim == 4:
            return self.norm(self.blocks(x))
        self._require_tokens(x, self.grid_tokens)
        return self.norm(self.blocks(x.unflatten(1, self.info.input_grid))).flatten(1, 2)

    def _forward_vit(self, x: Tensor, prefix_BPD: Tensor | None) -> Tensor:
        prefix = self.info.prefix_tokens
        if prefix_BPD is None:
            self._require_tokens(x, self.grid_tokens + prefix)
            return self.norm(self.blocks(x))
        self._require_tokens(x, self.grid_tokens)
        if prefix_BPD.shape != (x.shape[0], prefix, x.shape[2]):
            raise InputError(
                f"prefix tokens have shape {tuple(prefix_BPD.shape)}, expected {(x.shape[0], prefix, x.shape[2])}"
            )
        return self.norm(self.blocks(torch.cat([prefix_BPD.to(x.dtype), x], dim=1)))[:, prefix:]

    @property
    def grid_tokens(self) -> int:
        """Number of grid tokens N the blocks take."""
        height, width = self.info.input_grid
        return height * width

    def _require_tokens(self, x: Tensor, tokens: int) -> None:
        if x.ndim != 3 or x.shape[1] != tokens or x.shape[2] != self.info.input_dim:
            raise InputError(
                f"the later blocks take [B, {tokens}, {self.info.input_dim}], got {tuple(x.shape)}; "
                "grid tokens of a teacher with prefix tokens need prefix_BPD"
            )


def split_teacher(model: nn.Module, depth: int | None = None) -> tuple[EarlyStages, LaterBlocks]:
    """Cut a timm model at its stage-3 output.

    Args:
        model: A timm ``SwinTransformer`` or plain ``VisionTransformer``. Its later part is frozen by the cut.
        depth: Number of blocks in the later part of a plain ViT; default the last quarter. Swin is always cut
            before the patch merging of its last stage: P = ``norm(layers[3](x))``.

    Returns:
        Early stages and later blocks; ``later(early(x))`` is bitwise ``model.forward_features(x)`` in eval mode.

    Raises:
        InputError: Not a family that can be cut, or an impossible depth.
    """
    if isinstance(model, SwinTransformer):
        return _split_swin(model, depth)
    if isinstance(model, VisionTransformer):
        return _split_vit(model, depth)
    raise InputError(
        f"cannot split a {type(model).__name__}: expected a timm SwinTransformer or VisionTransformer; "
        "choose a swin_* or vit_*/deit_* teacher"
    )


def _split_swin(model: SwinTransformer, depth: int | None) -> tuple[EarlyStages, LaterBlocks]:
    stages: list[Any] = [*model.layers.children()]
    last = stages[-1]
    if depth is not None and depth != len(last.blocks):
        raise InputError(
            f"depth {depth} is not possible for Swin: its later blocks are stage 4 ({len(last.blocks)} blocks)"
        )
    info = SplitInfo(
        family="swin",
        depth=len(last.blocks),
        input_dim=last.dim,
        input_grid=_hw(stages[-2].output_resolution),
        output_dim=model.num_features,
        output_grid=_hw(last.output_resolution),
        prefix_tokens=0,
        prefix="none",
    )
    trunk = _without(model, layers=nn.Sequential(*stages[:-1]))
    return EarlyStages(trunk), LaterBlocks([last], model.norm, info)


def _split_vit(model: VisionTransformer, depth: int | None) -> tuple[EarlyStages, LaterBlocks]:
    blocks: list[Any] = [*model.blocks.children()]
    depth = max(1, len(blocks) // 4) if depth is None else depth
    if not 1 <= depth < len(blocks):
        raise InputError(
            f"depth {depth} is not possible: the teacher has {len(blocks)} blocks, expected 1..{len(blocks) - 1}"
        )
    grid = _hw(model.patch_embed.grid_size)
    info = SplitInfo(
        family="vit",
        depth=depth,
        input_dim=model.embed_dim,
        input_grid=grid,
        output_dim=model.embed_dim,
        output_grid=grid,
        prefix_tokens=model.num_prefix_tokens,
        prefix="cached" if model.num_prefix_tokens else "none",
    )
    trunk = _without(model, blocks=nn.Sequential(*blocks[:-depth]))
    return EarlyStages(trunk), LaterBlocks(blocks[-depth:], model.norm, info)


def _hw(size: Any) -> tuple[int, int]:
    height, width = size
    return int(height), int(width)


def _without(model: nn.Module, **replaced: nn.Module) -> nn.Module:
    """A shallow copy of the model that shares its weights but has neither its later blocks, norm nor head."""
    trunk = copy.copy(model)
    trunk._modules = dict(model._modules)
    for name, module in {
        "norm": nn.Identity(),
        "fc_norm": nn.Identity(),
        "head": nn.Identity(),
        **replaced,
    }.items():
        if name in trunk._modules:
            setattr(trunk, name, module)
    return trunk
