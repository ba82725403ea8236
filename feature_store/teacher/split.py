"""Split of a timm teacher at the stage-3 output.

Shape legend: B batch, H W grid, N = H*W grid tokens, P prefix (class and register) tokens, D channels.
"""

import copy

import torch
from torch import Tensor, nn

from feature_store.errors import InputError
from feature_store.teacher.families import Cut, cut_model

_AFTER_BLOCKS = ("norm", "attn_pool", "fc_norm", "head", "head_dist")
"""Attributes of modules that follow the blocks, in any family."""


class EarlyStages(nn.Module):
    """The teacher up to the stage-3 output, weights shared with the model it was cut from.

    Its output has timm's own layout: [B, H, W, D] for Swin, [B, P + N, D] for all others.
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
    (the released code's drop path stays active in training; this one's does not).
    """

    def __init__(self, cut: Cut) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*cut.blocks)
        self.norm = cut.norm
        self.info = cut.info
        self._beside = cut.beside and (cut.beside.keyword, cut.beside.per_block)
        if cut.beside is not None:
            self.register_buffer(cut.beside.keyword, cut.beside.of_last(cut.info.depth))
        self.requires_grad_(False).train(False)

    def train(self, mode: bool = True) -> "LaterBlocks":
        """Stay in eval mode: a trainer's call has no effect."""
        return super().train(False)

    def forward(self, x: Tensor, prefix_BPD: Tensor | None = None) -> Tensor:
        """Final feature map of a stage-3 output.

        Args:
            x: Grid tokens [B, N, D]; or timm's own layout, i.e. what EarlyStages returns ([B, H, W, D] for
                Swin, [B, P + N, D] for all others).
            prefix_BPD: The teacher's own prefix tokens at the split, needed when x holds grid tokens only,
                the teacher has any, and the split does not drop them.

        Returns:
            The same layout as x: grid tokens for grid tokens (F^t), timm's layout for timm's layout, then
            bitwise equal to the model's ``forward_features``.

        Raises:
            InputError: x or the prefix tokens do not have the split's shape.
        """
        if self.info.family == "swin":
            return self._forward_grid(x)
        return self._forward_tokens(x, prefix_BPD)

    def _forward_grid(self, x: Tensor) -> Tensor:
        if x.ndim == 4:
            return self._run(x)
        self._require_tokens(x, self.grid_tokens)
        return self._run(x.unflatten(1, self.info.input_grid)).flatten(1, 2)

    def _forward_tokens(self, x: Tensor, prefix_BPD: Tensor | None) -> Tensor:
        prefix = self.info.prefix_tokens
        if prefix_BPD is None:
            alone = self.info.drops_prefix and x.shape[1] == self.grid_tokens
            self._require_tokens(x, self.grid_tokens + (0 if alone else prefix))
            return self._run(x)
        if self.info.drops_prefix:
            raise InputError("these later blocks run on grid tokens alone (prefix: dropped); leave out prefix_BPD")
        self._require_tokens(x, self.grid_tokens)
        if prefix_BPD.shape != (x.shape[0], prefix, x.shape[2]):
            raise InputError(
                f"prefix tokens have shape {tuple(prefix_BPD.shape)}, expected {(x.shape[0], prefix, x.shape[2])}"
            )
        return self._run(torch.cat([prefix_BPD.to(x.dtype), x], dim=1))[:, prefix:]

    def _run(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            x = block(x, **self._arguments(index))
        return self.norm(x)

    def _arguments(self, index: int) -> dict[str, Tensor]:
        if self._beside is None:
            return {}
        keyword, per_block = self._beside
        value = self.get_buffer(keyword)
        return {keyword: value[index] if per_block else value}

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


def split_teacher(
    model: nn.Module, depth: int | None = None, *, drop_prefix: bool = False
) -> tuple[EarlyStages, LaterBlocks]:
    """Cut a timm model at its stage-3 output.

    Args:
        model: A timm model of one of ``feature_store.teacher.families.FAMILIES``, with its weights loaded: tables of
            positions are made from them. Its later part is frozen by the cut.
        depth: Number of blocks in the later part; default the last quarter. Swin is always cut before the patch
            merging of its last stage: P = ``norm(layers[3](x))``.
        drop_prefix: Students run the later blocks of a VisionTransformer on grid tokens alone, as the released EVA
            configs do; default with the teacher's own prefix tokens.

    Returns:
        Early stages and later blocks; ``later(early(x))`` is bitwise ``model.forward_features(x)`` in eval mode.

    Raises:
        InputError: Not a family that can be cut, an impossible depth, or no prefix tokens that could be dropped.
    """
    cut = cut_model(model, depth, drop_prefix=drop_prefix)
    return EarlyStages(_trunk(model, cut)), LaterBlocks(cut)


def _trunk(model: nn.Module, cut: Cut) -> nn.Module:
    """A shallow copy of the model that shares its weights but has nothing of the later part or after."""
    trunk = copy.copy(model)
    trunk._modules = dict(model._modules)
    for name, module in {**dict.fromkeys(_AFTER_BLOCKS, nn.Identity()), **cut.kept}.items():
        if trunk._modules.get(name) is not None:
            setattr(trunk, name, module)
    return trunk
