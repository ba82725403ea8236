"""Backbones from exports, for detection, segmentation.

Shape legend: B batch, C channels, H W pixels.
"""

import inspect
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.layers.norm import LayerNorm2d
from timm.layers.norm_act import freeze_batch_norm_2d
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN, resnet_fpn_backbone
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from feature_store.errors import InputError, MismatchError
from feature_store.teacher.model import build_model
from student_trainer.students.networks import TORCHVISION_RESNETS
from student_trainer.students.torchvision_network import TORCHVISION, build_torchvision

REDUCTIONS = (4, 8, 16, 32)  # of the maps detection and segmentation heads expect
_STAGE_SIZE = (256, 256)  # of the images that a network's stages are found with
_SAME_WEIGHTS = {"global_pool", "drop_rate", "drop_path_rate"}  # arguments that leave a ResNet's stages as they are


@dataclass(frozen=True)
class Backbone:
    """An exported backbone.

    Attributes:
        name: timm architecture, or ``torchvision:NAME``.
        model_kwargs: Extra arguments of the library's function that builds it.
        mean: Normalisation mean per RGB channel on the 0..1 scale.
        std: Normalisation standard deviation per RGB channel on the 0..1 scale.
        weights: Its state dict, without a classifier.
    """

    name: str
    model_kwargs: dict[str, Any]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    weights: dict[str, Tensor]


def load_backbone(export: Path) -> Backbone:
    """Read the folder that ``student-trainer export --backbone`` wrote.

    Raises:
        InputError: config.json or backbone.safetensors is missing or damaged.
    """
    try:
        config = json.loads((export / "config.json").read_text())
        weights = load_file(export / "backbone.safetensors")
        return Backbone(
            name=config["architecture"],
            model_kwargs={
                k: v for k, v in config.get("model_args", {}).items() if k not in ("num_classes", "in_chans")
            },
            mean=tuple(config["pretrained_cfg"]["mean"]),
            std=tuple(config["pretrained_cfg"]["std"]),
            weights=weights,
        )
    except Exception as error:  # a damaged file makes safetensors raise its own kind
        raise InputError(
            f"{export} holds no exported backbone ({' '.join(str(error).split())}); "
            "write one with `student-trainer export --run RUN --out FOLDER --backbone`"
        ) from error


def fpn_backbone(backbone: Backbone, trainable_layers: int = 3) -> nn.Module:
    """A feature pyramid network over the backbone, for torchvision's detectors.

    Plain ResNets become torchvision's own with frozen BatchNorm, as its COCO recipes have it; other networks of
    torchvision a TorchvisionPyramid, all others a TimmPyramid.

    Args:
        backbone: The exported backbone.
        trainable_layers: Last stages of a ResNet that learn, 0..5; other networks learn as a whole.
    """
    if backbone.name not in TORCHVISION_RESNETS or backbone.model_kwargs.keys() - _SAME_WEIGHTS:
        return PyramidWithFPN(pyramid(backbone))
    with_fpn = resnet_fpn_backbone(backbone_name=backbone.name, weights=None, trainable_layers=trainable_layers)
    load_torchvision_resnet(with_fpn, backbone.weights)
    return with_fpn


def pyramid(backbone: Backbone) -> "TimmPyramid | TorchvisionPyramid":
    """The backbone as maps at reductions 4, 8, 16 and 32.

    Raises:
        InputError: A network that gives no such maps, or takes one image size only.
        MismatchError: Weights of another architecture.
    """
    return TorchvisionPyramid(backbone) if backbone.name.startswith(TORCHVISION) else TimmPyramid(backbone)


def load_torchvision_resnet(with_fpn: BackboneWithFPN, weights: Mapping[str, Tensor]) -> None:
    """Load a timm ResNet's weights into the body of torchvision's FPN backbone; their names are the same.

    Raises:
        MismatchError: Another architecture: leaves missing, left over or of another shape.
    """
    own = with_fpn.body.state_dict()
    # FrozenBatchNorm2d does not count batches; everything else must agree
    theirs = {name: leaf for name, leaf in weights.items() if name in own or not name.endswith("num_batches_tracked")}
    _require_same_leaves(own, theirs, "torchvision's ResNet")
    with_fpn.body.load_state_dict(theirs)


class TorchvisionPyramid(nn.Module):
    """A network of torchvision as maps at reductions 4, 8, 16 and 32, for images of any size.

    BatchNorm is frozen, and networks without get a LayerNorm per map, as in TimmPyramid.

    Attributes:
        net: The network up to its last stage.
        channels: Channels of the four maps.
    """

    def __init__(self, backbone: Backbone) -> None:
        """Build the network and load the weights.

        Raises:
            InputError: A network without these reductions, such as ViT.
            MismatchError: Weights of another architecture.
        """
        super().__init__()
        network = build_torchvision(backbone.name, backbone.model_kwargs, _STAGE_SIZE)
        own = network.backbone_weights()
        _require_same_leaves(own, backbone.weights, backbone.name)
        network.net.load_state_dict(backbone.weights, strict=False)  # the rest has no influence on the maps
        self._indices = _four_stages(network.feature_info)
        self.channels: list[int] = [network.feature_info[index]["num_chs"] for index in self._indices]
        self.net, self.norms = _frozen_and_normed(network, self.channels)

    def forward(self, images_BCHW: Tensor) -> "OrderedDict[str, Tensor]":
        """Maps ``0`` (finest) to ``3`` [B, C, H / r, W / r] of normalised images whose sides are multiples of 32."""
        _, maps = self.net.forward_intermediates(images_BCHW, self._indices)  # pyright: ignore[reportCallIssue]
        normed = [norm(map_BCHW) for norm, map_BCHW in zip(self.norms, maps, strict=True)]
        return OrderedDict((str(i), map_BCHW) for i, map_BCHW in enumerate(normed))


class TimmPyramid(nn.Module):
    """A timm network as maps at reductions 4, 8, 16 and 32, for images of any size.

    BatchNorm is frozen (batches are small in detection and segmentation). Networks without BatchNorm get a LayerNorm
    per map, as detection code has it for Swin. Networks of one resolution (plain ViT) give four evenly spaced blocks,
    resized to the four reductions. Swin always shifts its windows, also in the last stage, which a 224-pixel
    classifier of 7 x 7 does not: images are larger here.

    Attributes:
        net: timm's feature extractor.
        channels: Channels of the four maps.
    """

    net: Any  # timm's FeatureGetterNet, which nn.Module's typing would make a Tensor of

    def __init__(self, backbone: Backbone) -> None:
        """Build the network and load the weights.

        Raises:
            InputError: An architecture that takes one image size only, such as Mixer.
            MismatchError: Weights of another architecture.
        """
        super().__init__()
        with torch.device("meta"):
            probe = build_model(backbone.name, {**backbone.model_kwargs, "num_classes": 0})
        indices = _four_stages(list(probe.feature_info))  # pyright: ignore[reportArgumentType, reportCallIssue]
        any_size = _any_size_kwargs(probe, backbone.name)
        self.net = timm.create_model(
            backbone.name, features_only=True, feature_cls="getter", out_indices=indices,
            **{**backbone.model_kwargs, **any_size},
        )  # fmt: skip
        own = self.net.model.state_dict()
        kept = {name: leaf for name, leaf in backbone.weights.items() if name in own or name not in probe.state_dict()}
        _require_same_leaves(own, kept, f"timm's {backbone.name}")  # what was pruned (the final norm) is not kept
        self.net.model.load_state_dict(kept)
        self.channels: list[int] = self.net.feature_info.channels()
        self._reductions: list[int] = self.net.feature_info.reduction()
        self.net, self.norms = _frozen_and_normed(self.net, self.channels)

    def forward(self, images_BCHW: Tensor) -> "OrderedDict[str, Tensor]":
        """Maps ``0`` (finest) to ``3`` [B, C, H / r, W / r] of normalised images whose sides are multiples of 32."""
        maps = [norm(map_BCHW) for norm, map_BCHW in zip(self.norms, self.net(images_BCHW), strict=True)]
        return OrderedDict(
            (str(i), map_BCHW if have == want else _resize(map_BCHW, have / want))
            for i, (map_BCHW, have, want) in enumerate(zip(maps, self._reductions, REDUCTIONS, strict=True))
        )


class PyramidWithFPN(nn.Module):
    """A pyramid under torchvision's feature pyramid network.

    Attributes:
        body: The pyramid.
        fpn: The feature pyramid network, with a pooled fifth level.
        out_channels: Channels of every level; torchvision's detectors read it.
    """

    def __init__(self, body: TimmPyramid | TorchvisionPyramid, out_channels: int = 256) -> None:
        super().__init__()
        self.body, self.out_channels = body, out_channels
        self.fpn = FeaturePyramidNetwork(body.channels, out_channels, extra_blocks=LastLevelMaxPool())

    def forward(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """Levels by name."""
        return self.fpn(self.body(images_BCHW))


def _frozen_and_normed(net: nn.Module, channels: Sequence[int]) -> tuple[nn.Module, nn.ModuleList]:
    """A network with frozen BatchNorm, and a norm for each of its maps where it has no BatchNorm."""
    has_batch_norm = any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    norms = [nn.Identity() if has_batch_norm else LayerNorm2d(width) for width in channels]
    return freeze_batch_norm_2d(net) if has_batch_norm else net, nn.ModuleList(norms)


def _four_stages(info: list[dict[str, Any]]) -> tuple[int, ...]:
    """Indices of the four maps: those at reductions 4..32, or evenly spaced blocks of a network of one resolution."""
    reductions = [stage["reduction"] for stage in info]
    if len(set(reductions)) == 1 and len(info) >= len(REDUCTIONS):
        return tuple((i + 1) * len(info) // 4 - 1 for i in range(4))
    if not set(REDUCTIONS) <= set(reductions):
        raise InputError(f"the backbone gives maps at reductions {reductions}, expected 4, 8, 16 and 32 among them")
    return tuple(reductions.index(reduction) for reduction in REDUCTIONS)


def _any_size_kwargs(model: nn.Module, name: str) -> dict[str, Any]:
    """Arguments that make an architecture take images of any size."""
    known = inspect.signature(type(model).__init__).parameters
    if "strict_img_size" in known:
        shifts = {"always_partition": True} if "always_partition" in known else {}
        return {"strict_img_size": False, **shifts}
    if "dynamic_img_size" in known:
        return {"dynamic_img_size": True}
    if timm.get_pretrained_cfg(name).fixed_input_size:  # pyright: ignore[reportOptionalMemberAccess]
        raise InputError(f"{name} takes images of one size only; choose a CNN, Swin or ViT student for this task")
    return {}


def _require_same_leaves(own: Mapping[str, Tensor], theirs: Mapping[str, Tensor], where: str) -> None:
    ours, got = ({name: tuple(leaf.shape) for name, leaf in state.items()} for state in (own, theirs))
    for name in sorted(ours.keys() | got.keys()):
        if ours.get(name) != got.get(name):
            raise MismatchError(
                f"shape of {name}",
                where=where,
                expected=ours.get(name),
                got=got.get(name),
                remedy="use the folder of one export, config.json and backbone.safetensors together",
            )


def _resize(map_BCHW: Tensor, factor: float) -> Tensor:
    return F.interpolate(map_BCHW, scale_factor=factor, mode="bilinear", align_corners=False)
