"""Names of student networks: timm's, torchvision's, those that both lack."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.mlp_mixer import MlpMixer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from feature_store.teacher.model import build_model
from student_trainer.students.torchvision_network import TORCHVISION, build_torchvision

TORCHVISION_RESNETS = (
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d",
    "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2",
)  # fmt: skip
"""Backbones of torchvision's detectors that timm has under the same name, with the same layers and names of weights."""

_SHARED = {
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "pool_size": None,
    "crop_pct": 0.875,
    "interpolation": "bicubic",
    "fixed_input_size": True,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "classifier": "head",
}

default_cfgs = generate_default_cfgs(
    {
        "mixer_b14_224.untrained": {**_SHARED, "first_conv": "stem.proj"},
        "vit_base_patch14_two_norms_224.untrained": {**_SHARED, "first_conv": "patch_embed.proj"},
    }
)


def timm_name(name: str) -> str:
    """The name of a student's network: timm's where timm has torchvision's network with the same weights."""
    network = name.removeprefix(TORCHVISION)
    return network if network in TORCHVISION_RESNETS else name


def build_network(
    name: str, kwargs: Mapping[str, Any], input_size: tuple[int, int], *, pretrained: bool = False
) -> nn.Module:
    """A student's network by name: timm's, or one of torchvision's classifiers.

    Args:
        name: timm model name, or ``torchvision:NAME``.
        kwargs: Arguments of ``timm.create_model``, or of ``torchvision.models.get_model``.
        input_size: Height and width of the images, in pixels.
        pretrained: Start from timm's own weights.

    Raises:
        InputError: Unknown name or impossible arguments.
        ResourceError: The pretrained weights could not be fetched.
    """
    if name.startswith(TORCHVISION):
        return build_torchvision(name, kwargs, input_size, pretrained=pretrained)
    return build_model(name, kwargs, pretrained=pretrained)


class TwoNormViT(VisionTransformer):
    """A ViT whose tokens are normed, averaged and normed again before the classifier; timm's has either norm."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{**kwargs, "class_token": False, "global_pool": "avg", "fc_norm": False})
        self.fc_norm = nn.LayerNorm(self.num_features, eps=1e-6)


@register_model
def mixer_b14_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Mixer-B/14 at 224 pixels: 16 x 16 patches, the grid of an L/14 teacher; LayerNorm eps 1e-5 as released."""
    norm = partial(nn.LayerNorm, eps=1e-5)
    arguments = {"patch_size": 14, "num_blocks": 12, "embed_dim": 768, "norm_layer": norm, **kwargs}
    return build_model_with_cfg(MlpMixer, "mixer_b14_224", pretrained, **arguments)


@register_model
def vit_base_patch14_two_norms_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ViT-B/14 without class token, a second norm after the mean over its tokens."""
    arguments = {"patch_size": 14, "embed_dim": 768, "depth": 12, "num_heads": 12, **kwargs}
    return build_model_with_cfg(TwoNormViT, "vit_base_patch14_two_norms_224", pretrained, **arguments)
