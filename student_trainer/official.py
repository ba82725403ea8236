"""Loads weights of the released code."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from feature_store.errors import InputError
from feature_store.teacher.weights import read_weights
from student_trainer.methods.cap import CrossAttentionProjector

State = Mapping[str, Any] | Path  # tensors by name, such a mapping under the key "state_dict", or a file of either

_PROJECTOR = {  # our module -> the released one
    "position": "pos_embed",
    "query": "query.weight",
    "query_proj.0": "proj_pos.0",
    "key_proj": "proj_student",
    "to_q": "pos_attention.q",
    "to_k": "pos_attention.k",
    "to_v": "pos_attention.v",
    "to_out": "pos_attention.proj",
    "norm": "norm",
    "mlp.0": "ffn.layers.0.0",
    "mlp.2": "ffn.layers.1",
}
_SWIN = (  # pattern in the released name -> timm's name
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^stages\.(\d+)\.downsample\.", lambda match: f"layers.{int(match[1]) + 1}.downsample."),
    (r"^stages\.", "layers."),
    (r"\.attn\.w_msa\.", ".attn."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
    (r"^norm3\.", "norm."),
)
_VIT = (
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^layers\.(\d+)\.ln([12])\.", r"blocks.\1.norm\2."),
    (r"^layers\.", "blocks."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
    (r"^ln1\.", "norm."),
    (r"^ln2\.", "fc_norm."),  # after pooling: EVA
    (r"^head\.(layers\.head|fc)\.", "head."),
)
_Rules = tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]


def projector_names(projector: CrossAttentionProjector) -> dict[str, str]:
    """This project's name for each entry of a released projector's state dict (parameters and BatchNorm buffers)."""
    return {_official_projector_name(ours): ours for ours in projector.state_dict()}


def load_projector(projector: CrossAttentionProjector, official_state: State, prefix: str | None = None) -> None:
    """Load a released projector.

    A learned query is left out if the projector has none: the released code keeps one in its stage-4
    projectors but never reads it while queries come from outside.

    Args:
        projector: Ours, built with the same dimensions.
        official_state: State dict of the released projector, or a checkpoint that holds one.
        prefix: Prefix of the projector's names, e.g. ``distill_losses.loss_fmd_s3.projector_0.``;
            None finds it, if there is one projector only.

    Raises:
        InputError: A leaf is missing, left over or of another shape; or more than one projector fits.
    """
    state = _unnested(official_state)
    prefix = _projector_prefix(state) if prefix is None else prefix
    state = {name.removeprefix(prefix): leaf for name, leaf in state.items() if name.startswith(prefix)}
    if projector.query is None:
        state.pop("query.weight", None)
    names = projector_names(projector)
    _load(projector, {name: (names.get(name, name), _conv_as_linear(leaf)) for name, leaf in state.items()})


def load_swin(timm_model: nn.Module, official_state: State) -> None:
    """Load a released Swin into timm's, patch merging permuted to timm's channel order.

    Args:
        timm_model: A timm ``SwinTransformer`` of the same architecture.
        official_state: State dict of the backbone, of a classifier (``backbone.*``, ``head.*``), of a whole
            distiller (its ``teacher.*`` is used), or a checkpoint that holds one. A classifier the timm
            model does not have (``num_classes=0``) is left out.

    Raises:
        InputError: Not a timm Swin, or a leaf is missing, left over or of another shape.
    """
    if not isinstance(timm_model, SwinTransformer):
        raise InputError(f"load_swin fills a timm SwinTransformer, got a {type(timm_model).__name__}")
    _load_backbone(timm_model, official_state, _SWIN, _merging_to_timm)


def load_vit(timm_model: nn.Module, official_state: State) -> None:
    """Load a released ViT or BEiT into timm's ``VisionTransformer`` or ``Beit``.

    The released models normalise with eps 1e-6, as timm's do by default.

    Args:
        timm_model: The timm model of the same architecture, with its final norm before pooling
            (``global_pool="token"``), or after it as EVA's (``fc_norm``).
        official_state: As for load_swin.

    Raises:
        InputError: A leaf is missing, left over or of another shape.
    """
    _load_backbone(timm_model, official_state, _VIT, lambda _, leaf: leaf)


def _load_backbone(
    model: nn.Module, official_state: State, rules: _Rules, convert: Callable[[str, Tensor], Tensor]
) -> None:
    state = _backbone(_unnested(official_state))
    has_head = any(name.startswith("head.") for name in model.state_dict())
    renamed = {
        name: (_rename(name, rules), convert(name, leaf))
        for name, leaf in state.items()
        if not name.endswith("relative_position_index") and (has_head or not name.startswith("head."))
    }
    _load(model, renamed)


def _load(module: nn.Module, renamed: Mapping[str, tuple[str, Tensor]]) -> None:
    """Strict load of ``released name -> (our name, tensor)``."""
    own = module.state_dict()
    for official, (ours, leaf) in renamed.items():
        if ours not in own:
            raise InputError(
                f"{official} of the released weights has no place in this {type(module).__name__} ({ours}); "
                "build it with the released architecture"
            )
        if leaf.shape != own[ours].shape:
            raise InputError(
                f"{official} of the released weights has shape {tuple(leaf.shape)}, "
                f"{ours} of this {type(module).__name__} has {tuple(own[ours].shape)}; "
                "build it with the released dimensions"
            )
    missing = sorted(own.keys() - {ours for ours, _ in renamed.values()})
    if missing:
        raise InputError(f"the released weights have nothing for {', '.join(missing)} of this {type(module).__name__}")
    module.load_state_dict(dict(renamed.values()))


def _official_projector_name(ours: str) -> str:
    module = next(name for name in _PROJECTOR if ours == name or ours.startswith(f"{name}."))
    return _PROJECTOR[module] + ours.removeprefix(module)


def _projector_prefix(state: Mapping[str, Tensor]) -> str:
    marker = "pos_attention.q.weight"  # no other part of the released code has it
    prefixes = sorted(name.removesuffix(marker) for name in state if name.endswith(marker))
    if len(prefixes) != 1:
        found = ", ".join(map(repr, prefixes)) or "none"
        raise InputError(f"expected one released projector, found {found}; pass the prefix of the one to load")
    return prefixes[0]


def _conv_as_linear(leaf: Tensor) -> Tensor:
    """A 1x1 convolution's weight as the linear map it is."""
    return leaf.flatten(1) if leaf.ndim == 4 and leaf.shape[2:] == (1, 1) else leaf


def _merging_to_timm(name: str, leaf: Tensor) -> Tensor:
    """Patch merging's last axis: released order (channel, row, column) -> timm's (column, row, channel)."""
    if ".downsample." not in name or leaf.shape[-1] % 4:
        return leaf
    return leaf.unflatten(-1, (-1, 2, 2)).transpose(-3, -1).flatten(-3)


def _rename(name: str, rules: _Rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _unnested(state: State) -> dict[str, Tensor]:
    """The tensors by name, out of a checkpoint's ``state_dict`` and without DataParallel's ``module.``."""
    state = read_weights(state) if isinstance(state, Path) else state
    while isinstance(inner := state.get("state_dict"), Mapping):
        state = inner
    return {name.removeprefix("module."): torch.as_tensor(leaf) for name, leaf in state.items()}


def _backbone(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The teacher's part of a distiller's weights, without the prefixes of the released classes."""
    if any(name.startswith("teacher.") for name in state):
        state = {name.removeprefix("teacher."): leaf for name, leaf in state.items() if name.startswith("teacher.")}
    return {name.removeprefix("backbone."): leaf for name, leaf in state.items()}
