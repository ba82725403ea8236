"""Split of a timm teacher at the stage-3 output.

Shape legend: B batch, H W grid, N = H*W grid tokens, P prefix (class and register) tokens, D channels.
"""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from feature_store.errors import InputError
from feature_store.format.manifest import SplitInfo
from feature_store.teacher.families import FAMILIES, Cut, cut_model
from feature_store.teacher.taps import OutputShapes, block_index, final_map, grid_tokens, measure, tap_shapes

_AFTER_BLOCKS = ("norm", "attn_pool", "fc_norm", "head", "head_dist")
"""Attributes of modules that follow the blocks, in any family."""


class EarlyStages(nn.Module):
    """The teacher up to the stage-3 output, weights shared with the model it was cut from.

    Its output has the family's layout: [B, H, W, D] for Swin and Hiera, [B, D, H, W] for ConvNeXt, [B, P + N, D] for
    all others.
    """

    def __init__(self, trunk: nn.Module, to_grid: nn.Module | None = None) -> None:
        super().__init__()
        self.trunk, self.to_grid = trunk, to_grid

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Stage-3 output of normalised images."""
        x = self.trunk.forward_features(images_BCHW)  # pyright: ignore[reportCallIssue]
        return x if self.to_grid is None else self.to_grid(x)


class LaterBlocks(nn.Module):
    """P of the paper: the frozen teacher between the stage-3 output and the final feature map F^t, norm included.

    Gradients flow through it to its input; its own weights never learn and it never leaves eval mode
    (the released code's drop path stays active in training; this one's does not).
    """

    def __init__(self, cut: Cut) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*cut.blocks)
        self.norm = cut.norm
        self.info, self._layout = cut.info, cut.layout
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
            x: Grid tokens [B, N, D]; or what EarlyStages returns ([B, H, W, D] for Swin and Hiera, [B, D, H, W] for
                ConvNeXt, [B, P + N, D] for all others).
            prefix_BPD: The teacher's own prefix tokens at the split, needed when x holds grid tokens only,
                the teacher has any, and the split does not drop them.

        Returns:
            Grid tokens for grid tokens (F^t); for what EarlyStages returns, bitwise what the model's
            ``forward_features`` gives.

        Raises:
            InputError: x or the prefix tokens do not have the split's shape.
        """
        if self._layout == "tokens":
            return self._forward_tokens(x, prefix_BPD)
        return self._forward_grid(x)

    def _forward_grid(self, x: Tensor) -> Tensor:
        if x.ndim == 4:
            return self._run(x)
        self._require_tokens(x, self.grid_tokens)
        if self._layout == "NCHW":
            x_BDHW = x.transpose(1, 2).unflatten(2, self.info.input_grid)  # channels-last in memory, as in the teacher
            return self._run(x_BDHW).flatten(2).transpose(1, 2)
        y = self._run(x.unflatten(1, self.info.input_grid))
        return y.flatten(1, 2) if y.ndim == 4 else y

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
        depth: Number of blocks in the later part; default the last quarter. Swin, ConvNeXt and Hiera are always cut
            before their last stage, which begins with its downsampling: for Swin P = ``norm(layers[3](x))``.
        drop_prefix: Students run the later blocks of a VisionTransformer on grid tokens alone, as the released EVA
            configs do; default with the teacher's own prefix tokens.

    Returns:
        Early stages and later blocks; ``later(early(x))`` is bitwise ``model.forward_features(x)`` in eval mode.

    Raises:
        InputError: Not a family that can be cut, an impossible depth, or no prefix tokens that could be dropped.
    """
    cut = cut_model(model, depth, drop_prefix=drop_prefix)
    trunk = _with_modules(model, {**dict.fromkeys(_AFTER_BLOCKS, nn.Identity()), **cut.kept})
    return EarlyStages(trunk, cut.to_grid), LaterBlocks(cut)


def no_later_blocks(name: str) -> InputError:
    """The refusal of the later blocks of a teacher that has none."""
    return InputError(
        f"teacher {name} has no later blocks to run students' features through (TPP): only timm's "
        f"{', '.join(family.model.__name__ for family in FAMILIES)} have; take a method that reads taps alone, such as "
        "fd, or scalekd, whose TPP is then off"
    )


class WholeTeacher(nn.Module):
    """All of a teacher's outputs in one pass, with the weights and position tables of the model it is made of.

    Attributes:
        later_blocks: P; None for a teacher that is not of a known family.
        split: Where it is cut.
        shapes: Shapes of all its taps.
    """

    def __init__(self, model: nn.Module, cut: Cut | None, size: tuple[int, int]) -> None:
        """Measure the taps of a model.

        Args:
            model: A model with timm's ``forward_intermediates``, in eval mode.
            cut: Its later part; None without one.
            size: Height and width of its images.

        Raises:
            InputError: It gives no intermediate maps of images of this size.
        """
        super().__init__()
        shapes = measure(model, size)
        beside = None if cut is None else cut.beside
        tables = {} if cut is None or beside is None else {beside.attribute: cut.kept[beside.attribute]}
        self.model = _with_modules(model, tables)
        self.later_blocks = None if cut is None else LaterBlocks(cut)
        self.split = _without_later_blocks(model, shapes) if cut is None else cut.info
        self.shapes = tap_shapes(self.split, shapes.blocks)
        self._at = None if cut is None else cut.at
        self.train(False)

    def forward(self, images_BCHW: Tensor, taps: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Final features as ``forward_features`` gives them, and taps [B, N, C] in float32.

        Args:
            images_BCHW: Normalised images.
            taps: Names of the taps that are wanted.
        """
        last = len(self.shapes.blocks) - 1
        wanted = {"stage3": self._at, "stage3_prefix": self._at, "stage4": last}
        index = {tap: wanted[tap] if tap in wanted else block_index(tap) for tap in taps}
        indices = sorted({last, *(each for each in index.values() if each is not None)})
        prefix = {"return_prefix_tokens": True} if "stage3_prefix" in taps else {}
        features, outputs = self.model.forward_intermediates(images_BCHW, indices=indices, **prefix)  # pyright: ignore[reportCallIssue]
        found = dict(zip(indices, outputs, strict=True))
        maps = {at: output[0] if prefix else output for at, output in found.items()}
        given: dict[str, Tensor] = {}
        for tap in taps:
            if tap == "stage3_prefix":
                given[tap] = found[self._at][1].float()
            elif tap == "stage4":
                given[tap] = grid_tokens(final_map(self.model, features, maps[last]))
            else:
                given[tap] = grid_tokens(maps[index[tap]])
        return features, given


def _without_later_blocks(model: nn.Module, shapes: OutputShapes) -> SplitInfo:
    channels, height, width = shapes.final
    grid = height, width
    name = type(model).__name__
    return SplitInfo(name, 0, channels, grid, channels, grid, shapes.prefix_tokens, "none")


def _with_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> nn.Module:
    """A shallow copy of a model that shares its weights, with other modules in place of those it has."""
    copied = copy.copy(model)
    copied._modules = dict(model._modules)
    for name, module in modules.items():
        if copied._modules.get(name) is not None:
            setattr(copied, name, module)
    return copied
