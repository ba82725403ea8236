"""Mixer-B with patches of 14 pixels, which timm lacks: importing this module makes timm know ``mixer_b14_224``."""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.mlp_mixer import MlpMixer
from torch import nn

default_cfgs = generate_default_cfgs(
    {
        "mixer_b14_224.untrained": {
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": None,
            "crop_pct": 0.875,
            "interpolation": "bicubic",
            "fixed_input_size": True,
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "first_conv": "stem.proj",
            "classifier": "head",
        }
    }
)


@register_model
def mixer_b14_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Mixer-B/14 at 224 pixels: 16 x 16 patches, the grid of an L/14 teacher."""
    arguments = {"patch_size": 14, "num_blocks": 12, "embed_dim": 768, **kwargs}
    return build_model_with_cfg(MlpMixer, "mixer_b14_224", pretrained, **arguments)
