"""Every family of teachers by the timm names users give, made small enough for tests."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from feature_store.teacher.model import build_model
from feature_store.teacher.taps import input_size

_SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}


@dataclass(frozen=True)
class TinyTeacher:
    """A timm name, arguments that make it small, and its number of prefix tokens."""

    name: str
    kwargs: dict[str, Any]
    prefix: int


def _small(name: str, prefix: int, **kwargs: Any) -> TinyTeacher:
    return TinyTeacher(name, {**_SMALL, **kwargs}, prefix)


TEACHERS = {
    "swin": TinyTeacher(
        "swin_large_patch4_window7_224",
        {
            "img_size": 32, "patch_size": 2, "window_size": 2, "depths": (1, 1, 2, 2), "embed_dim": 24,
            "num_heads": (1, 2, 4, 8), "num_classes": 5,
        },
        0,
    ),
    "vit": _small("vit_large_patch14_224", 1),
    "clip": _small("vit_large_patch14_clip_224", 1),
    "beit": _small("beit_large_patch16_224", 1),
    "beit_shared_bias": _small(
        "beit_large_patch16_224", 1, use_rel_pos_bias=False, use_shared_rel_pos_bias=True, global_pool="token"
    ),
    "beit_both_biases": _small("beit_large_patch16_224", 1, use_shared_rel_pos_bias=True),
    "beitv2": _small("beitv2_large_patch16_224", 1),
    "beitv2_oblong": _small("beitv2_large_patch16_224", 1, img_size=(32, 48)),
    "eva": _small("eva_large_patch14_196", 1),
    "eva02": _small("eva02_large_patch14_224", 1, ref_feat_shape=(2, 2)),
    "eva02_clip": _small("eva02_large_patch14_clip_224", 1),
    "dinov2": _small("vit_large_patch14_dinov2", 1, num_classes=0),
    "dinov2_registers": _small("vit_large_patch14_reg4_dinov2", 5, num_classes=0),
    "dinov3": _small("vit_large_patch16_dinov3", 5),
    "dinov3_oblong": _small("vit_large_patch16_dinov3", 5, img_size=(32, 48)),
    "dinov3_7b": _small("vit_7b_patch16_dinov3", 5, num_classes=0),
    "rope_mixed": _small("vit_large_patch16_rope_mixed_224", 1),
    "rope_axial": _small("vit_large_patch16_rope_ape_224", 1),
    "convnext": TinyTeacher(
        "convnext_large",
        {
            "depths": (1, 1, 2, 2), "dims": (8, 16, 24, 32), "num_classes": 5,
            "pretrained_cfg_overlay": {"input_size": (3, 64, 96)},
        },
        0,
    ),
    "convnextv2": TinyTeacher(
        "convnextv2_base.fcmae",
        {
            "depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32), "num_classes": 0,
            "pretrained_cfg_overlay": {"input_size": (3, 64, 64)},
        },
        0,
    ),
    "hiera": TinyTeacher(
        "hiera_large_224",
        {"img_size": 64, "embed_dim": 8, "num_heads": 1, "stages": (1, 1, 2, 2), "num_classes": 5},
        0,
    ),
    "hiera_oblong": TinyTeacher(
        "hiera_small_abswin_256",
        {"img_size": (64, 96), "embed_dim": 8, "num_heads": 1, "stages": (1, 1, 2, 2), "num_classes": 5},
        0,
    ),
}  # fmt: skip


def tiny_model(name: str, seed: int = 0) -> nn.Module:
    """A model of the table in eval mode. Every parameter is random: timm starts biases and layer scales at nothing."""
    model = build_model(TEACHERS[name].name, TEACHERS[name].kwargs).eval()
    randomise(model, seed)
    return model


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> None:
    """Give every parameter a value of its own, near enough to usual ones."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)


def tiny_images(name: str, count: int = 2) -> torch.Tensor:
    """Normalised images [B, 3, H, W] for a model of the table."""
    height, width = input_size(build_model(TEACHERS[name].name, TEACHERS[name].kwargs))
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))
