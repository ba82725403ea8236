"""Where to cut each timm family.

A new family is one more entry of ``FAMILIES``: its timm class and a function from a model to its later part.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from timm.models.beit import Beit
from timm.models.convnext import ConvNeXt
from timm.models.eva import Eva
from timm.models.hiera import Hiera, Unroll
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from feature_store.errors import InputError
from feature_store.format.manifest import SplitInfo
from feature_store.teacher.taps import input_size, measure

Layout = Literal["tokens", "NHWC", "NCHW"]


@dataclass(frozen=True)
class PositionalInputs:
    """Position inputs that blocks of some families take beside tokens; equal for all images, so made once.

    Attributes:
        attribute: The model's attribute that makes it.
        keyword: The blocks' argument, and the tensor's name in a bundle.
        value: RoPE or relative position bias; with ``per_block`` a first axis for all blocks of the model.
        per_block: Each block has its own.
    """

    attribute: str
    keyword: str
    value: Tensor
    per_block: bool = False

    def of_last(self, depth: int) -> Tensor:
        """Inputs of the last blocks, copied."""
        return (self.value[-depth:] if self.per_block else self.value).clone()


class _ReadyMade(nn.Module):
    """Replaces the part of a model that would compute a table again for every batch."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value, persistent=False)

    def forward(self) -> Tensor:
        """BEiT's interface of the relative position bias."""
        return self.get_buffer("value")

    def get_embed(self, shape: Any = None) -> Tensor:
        """Eva's interface of RoPE."""
        return self.get_buffer("value")


@dataclass(frozen=True)
class Cut:
    """A model's later part.

    Attributes:
        info: Where it begins and what it needs.
        at: Index in timm's ``feature_info`` of its input: the stage-3 output.
        kept: Value of the model's attribute of that name in the early part.
        blocks: The later blocks, from the first on.
        norm: The model's own last step of ``forward_features``; does nothing in models that pool before their norm.
        beside: Inputs of the blocks beside tokens.
        layout: timm's own layout of the blocks' input: tokens [B, P + N, D], or a grid.
        to_grid: From the early part's output to that layout, where timm's own has another order of tokens.
    """

    info: SplitInfo
    at: int
    kept: dict[str, nn.Module]
    blocks: Sequence[nn.Module]
    norm: nn.Module
    beside: PositionalInputs | None = None
    layout: Layout = "tokens"
    to_grid: nn.Module | None = None


@dataclass(frozen=True)
class Family:
    """Split of the models of one timm class.

    Attributes:
        model: The class, subclasses included.
        cut: From a model and a depth (None: the default) to its later part.
        can_drop_prefix: Whether its blocks also run on grid tokens alone: nothing they take beside tokens is laid out
            for prefix tokens.
    """

    model: type[nn.Module]
    cut: Callable[[Any, int | None], Cut]
    can_drop_prefix: bool = False


def cut_model(model: nn.Module, depth: int | None, *, drop_prefix: bool = False) -> Cut:
    """The later part of a model of any known family.

    Raises:
        InputError: An unknown family, a depth it cannot have, or no prefix tokens that could be dropped.
    """
    family = find_family(model)
    if family is None:
        raise InputError(
            f"cannot split a {type(model).__name__}: expected one of timm's {_names(FAMILIES)}; choose a teacher such "
            "as swin_*, vit_*, deit_*, beit_*, beitv2_*, eva_*, eva02_*, vit_*_dinov2, vit_*_dinov3, convnext* or "
            "hiera_*"
        )
    cut = family.cut(model, depth)
    return _without_prefix(cut, family) if drop_prefix else cut


def find_family(model: nn.Module) -> Family | None:
    """The family of a model; None if it cannot be cut."""
    return next((family for family in FAMILIES if isinstance(model, family.model)), None)


def _names(families: Iterable[Family]) -> str:
    return ", ".join(family.model.__name__ for family in families)


def _without_prefix(cut: Cut, family: Family) -> Cut:
    if not cut.info.prefix_tokens:
        raise InputError(
            f"the later blocks of this {cut.info.family} teacher take no prefix tokens that could be dropped; "
            "leave out drop_prefix"
        )
    if not family.can_drop_prefix:
        able = _names(each for each in FAMILIES if each.can_drop_prefix)
        raise InputError(
            f"the later blocks of a {family.model.__name__} cannot run without its prefix tokens: their positions are "
            f"laid out for all tokens; drop_prefix is for timm's {able}"
        )
    return replace(cut, info=replace(cut.info, prefix="dropped"))


def _cut_swin(model: Any, depth: int | None) -> Cut:
    """P = ``norm(layers[3](x))``: timm keeps patch merging at the start of a stage."""
    stages: list[Any] = [*model.layers.children()]
    last = stages[-1]
    return _last_stage(
        model,
        depth,
        "swin",
        (last.dim, *_hw(stages[-2].output_resolution)),
        (model.num_features, *_hw(last.output_resolution)),
        at=len(stages) - 2,
        number=len(last.blocks),
        kept={"layers": nn.Sequential(*stages[:-1])},
        blocks=[last],
        norm=model.norm,
        layout="NHWC",
    )


def _cut_convnext(model: Any, depth: int | None) -> Cut:
    """P = ``norm_pre(stages[3](x))``: timm keeps downsampling at the start of a stage."""
    stages: list[Any] = [*model.stages.children()]
    shapes = measure(model, input_size(model))
    return _last_stage(
        model,
        depth,
        "convnext",
        shapes.blocks[-2],
        shapes.final,
        at=len(stages) - 2,
        number=len(stages[-1].blocks),
        kept={"stages": nn.Sequential(*stages[:-1]), "norm_pre": nn.Identity()},
        blocks=[stages[-1]],
        norm=model.norm_pre,
        layout="NCHW",
    )


class _Unrolled(nn.Module):
    """A grid as tokens in the order of Hiera's last stage, whose first block pools groups of neighbours in it."""

    def __init__(self, grid: tuple[int, int], stride: tuple[int, int]) -> None:
        super().__init__()
        self.unroll = Unroll(grid, (1, 1), [stride])

    def forward(self, x_BHWC: Tensor) -> Tensor:
        return self.unroll(x_BHWC.flatten(1, 2))


class _Rerolled(nn.Module):
    """Tokens in the order of a Hiera block as a grid."""

    def __init__(self, reroll: nn.Module, block: int) -> None:
        super().__init__()
        self.reroll, self.block = reroll, block

    def forward(self, x_BNC: Tensor) -> Tensor:
        return self.reroll(x_BNC, self.block)


def _cut_hiera(model: Any, depth: int | None) -> Cut:
    """P = blocks of stage 4, the first of which pools."""
    blocks, start = [*model.blocks.children()], model.stage_ends[-2] + 1
    if model.q_pool != len(model.stage_ends) - 1:
        raise InputError(
            f"cannot split a Hiera with q_pool {model.q_pool}: its tokens are not in order after the last block; leave "
            "out q_pool"
        )
    grid, final = (_hw(model.reroll.schedule[block][1]) for block in (start - 1, len(blocks) - 1))
    return _last_stage(
        model,
        depth,
        "hiera",
        (model.feature_info[-2]["num_chs"], *grid),
        (model.num_features, *final),
        at=len(model.stage_ends) - 2,
        number=len(blocks) - start,
        kept={"blocks": nn.ModuleList(blocks[:start])},
        blocks=[_Unrolled(grid, _hw(model.q_stride)), *blocks[start:]],
        norm=nn.Identity(),
        layout="NHWC",
        to_grid=_Rerolled(model.reroll, start - 1),
    )


def _last_stage(
    model: Any,
    depth: int | None,
    family: str,
    taken: tuple[int, int, int],
    final: tuple[int, int, int],
    *,
    at: int,
    number: int,
    **parts: Any,
) -> Cut:
    """The cut of a family whose resolution falls: its last stage of all its blocks, from and to maps (C, H, W)."""
    if depth is not None and depth != number:
        raise InputError(
            f"depth {depth} is not possible for {type(model).__name__}: its later blocks are stage 4 ({number} blocks)"
        )
    (input_dim, *input_grid), (output_dim, *output_grid) = taken, final
    info = SplitInfo(
        family=family,
        depth=number,
        input_dim=input_dim,
        input_grid=_hw(input_grid),
        output_dim=output_dim,
        output_grid=_hw(output_grid),
        prefix_tokens=0,
        prefix="none",
    )
    return Cut(info, at, **parts)


def _tokens(name: str, make_beside: Callable[[Any], PositionalInputs | None]) -> Callable[[Any, int | None], Cut]:
    """The cut of a family whose blocks all have tokens of one width: its last quarter, or as many blocks as asked."""

    def cut(model: Any, depth: int | None) -> Cut:
        blocks: list[Any] = [*model.blocks.children()]
        depth = max(1, len(blocks) // 4) if depth is None else depth
        if not 1 <= depth < len(blocks):
            raise InputError(
                f"depth {depth} is not possible: the teacher has {len(blocks)} blocks, expected 1..{len(blocks) - 1}"
            )
        grid = _hw(model.patch_embed.grid_size)
        info = SplitInfo(
            family=name,
            depth=depth,
            input_dim=model.embed_dim,
            input_grid=grid,
            output_dim=model.embed_dim,
            output_grid=grid,
            prefix_tokens=model.num_prefix_tokens,
            prefix="cached" if model.num_prefix_tokens else "none",
        )
        beside = make_beside(model)
        kept: dict[str, nn.Module] = {"blocks": nn.Sequential(*blocks[:-depth])}
        if beside is not None:
            kept[beside.attribute] = _ReadyMade(beside.value)
        return Cut(info, len(blocks) - depth - 1, kept, blocks[-depth:], model.norm, beside)

    return cut


def _nothing(model: Any) -> None:
    return None


@torch.no_grad()
def _shared_position_bias(model: Any) -> PositionalInputs | None:
    """BEiT's relative position bias where all blocks share one; a bias per block is in the blocks already."""
    if model.rel_pos_bias is None:
        return None
    return PositionalInputs("rel_pos_bias", "shared_rel_pos_bias", model.rel_pos_bias())


@torch.no_grad()
def _rotary_embedding(model: Any) -> PositionalInputs | None:
    """RoPE on the teacher's grid, as a table: sines and cosines differ in the last bit from machine to machine."""
    if model.rope is None:
        return None
    rope = model.rope.eval()  # in training mode some kinds shift the grid by chance
    embedding = rope.get_embed(shape=list(model.patch_embed.grid_size))
    return PositionalInputs("rope", "rope", embedding, per_block=model.rope_mixed)


def _hw(size: Any) -> tuple[int, int]:
    height, width = size
    return int(height), int(width)


FAMILIES = (
    Family(SwinTransformer, _cut_swin),
    Family(VisionTransformer, _tokens("vit", _nothing), can_drop_prefix=True),
    Family(Beit, _tokens("beit", _shared_position_bias)),
    Family(Eva, _tokens("eva", _rotary_embedding)),
    Family(ConvNeXt, _cut_convnext),
    Family(Hiera, _cut_hiera),
)
