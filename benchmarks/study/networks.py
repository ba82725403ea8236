"""Networks of the study that timm lacks: a hybrid teacher for 32 px."""

from functools import partial
from typing import Any

from timm.layers.hybrid_embed import HybridEmbed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

default_cfgs = generate_default_cfgs(
    {
        "study_hybrid_32.untrained": {
            "num_classes": 100,
            "input_size": (3, 32, 32),
            "pool_size": None,
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "fixed_input_size": True,
            "mean": (0.5071, 0.4865, 0.4409),  # of CIFAR-100's training images
            "std": (0.2673, 0.2564, 0.2762),
            "first_conv": "patch_embed.backbone.0.0",
            "classifier": "head",
        }
    }
)


@register_model
def study_hybrid_32(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A ViT on the 4 x 4 map of a convolutional stem: 32 px, width 96, three blocks, mean of all tokens.

    A stem of 3x3 convolutions learns CIFAR-100 in fewer images than one linear map per patch.

    Args:
        pretrained: No weights are published; a checkpoint is given by path.
        **kwargs: Fields of timm's VisionTransformer; ``stem``: channels of the stem's three convolutions.
    """
    stem = kwargs.pop("stem", (32, 64, 128))
    arguments = {
        "img_size": 32,
        "patch_size": 1,
        "embed_dim": 96,
        "depth": 3,
        "num_heads": 3,
        "class_token": False,
        "global_pool": "avg",
        "fc_norm": False,
        "embed_layer": partial(HybridEmbed, backbone=_stem(*stem)),
        **kwargs,
    }
    return build_model_with_cfg(VisionTransformer, "study_hybrid_32", pretrained, **arguments)


def _stem(first: int, second: int, third: int) -> nn.Sequential:
    """Images of 32 px to a map of 4 x 4."""
    return nn.Sequential(
        _conv(3, first, stride=2), _conv(first, second), nn.MaxPool2d(2), _conv(second, third), nn.MaxPool2d(2)
    )


def _conv(channels: int, out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True))
