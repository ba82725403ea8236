"""Where to cut each timm family.

A new family of token or NHWC models is one more entry of ``FAMILIES``; NCHW models need code in split and model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from feature_store.errors import InputError
from feature_store.format.manifest import SplitInfo


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
        kept: Value of the model's attribute of that name in the early part.
        blocks: The later blocks, from the first on.
        norm: The model's own last step of ``forward_features``; does nothing in models that pool before their norm.
        beside: Inputs of the blocks beside tokens.
    """

    info: SplitInfo
    kept: dict[str, nn.Module]
    blocks: Sequence[nn.Module]
    norm: nn.Module
    beside: PositionalInputs | None = None


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
    for family in FAMILIES:
        if isinstance(model, family.model):
            cut = family.cut(model, depth)
            return _without_prefix(cut, family) if drop_prefix else cut
    known = ", ".join(family.model.__name__ for family in FAMILIES)
    raise InputError(
        f"cannot split a {type(model).__name__}: expected one of timm's {known}; "
        "choose a teacher such as swin_*, vit_*, deit_*, beit_*, beitv2_*, eva_*, eva02_*, vit_*_dinov2 or vit_*_dinov3"
    )


def _without_prefix(cut: Cut, family: Family) -> Cut:
    if not cut.info.prefix_tokens:
        raise InputError(
            f"the later blocks of this {cut.info.family} teacher take no prefix tokens that could be dropped; "
            "leave out drop_prefix"
        )
    if not family.can_drop_prefix:
        able = ", ".join(family.model.__name__ for family in FAMILIES if family.can_drop_prefix)
        raise InputError(
            f"the later blocks of a {family.model.__name__} cannot run without its prefix tokens: their positions are "
            f"laid out for all tokens; drop_prefix is for timm's {able}"
        )
    return replace(cut, info=replace(cut.info, prefix="dropped"))


def _cut_swin(model: Any, depth: int | None) -> Cut:
    """P = ``norm(layers[3](x))``: timm keeps patch merging at the start of a stage."""
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
    return Cut(info, {"layers": nn.Sequential(*stages[:-1])}, [last], model.norm)


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
        return Cut(info, kept, blocks[-depth:], model.norm, beside)

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
)
