"""The student: any timm model, giving the maps of its last two stages beside its logits in one forward pass.

Shape legend: B batch, C channels, H W grid, N = H*W grid tokens, P prefix (class and register) tokens, K classes.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from feature_store.errors import InputError
from feature_store.teacher.model import build_model
from student_trainer import mixers  # noqa: F401 - timm then knows them by name

_START = ("pretrained", "pretrained_cfg_overlay", "checkpoint_path")  # where timm takes the first weights from


class StudentOutput(NamedTuple):
    """What one forward pass gives.

    Attributes:
        maps: F^s of stages 3 and 4, each [B, C, H, W].
        logits: [B, K], bitwise those of the timm model itself.
    """

    maps: tuple[Tensor, Tensor]
    logits: Tensor


class Student(nn.Module):
    """A timm model with its stages 3 and 4 found, their widths and grids measured by a dry forward pass.

    Networks whose resolution falls (CNN, Swin, ConvNeXt...) give the maps of their last two stages, at
    reductions 16 and 32. Networks of one resolution (plain ViT, Mixer) give the output of the block at three
    quarters of the depth and that of the last block after the final norm, without prefix tokens.

    Attributes:
        name: timm model name.
        model: The timm model, the only thing that has weights.
        model_kwargs: Every argument that builds the same architecture again, untrained, with ``timm.create_model``.
        num_classes: K.
        input_size: Height and width it is trained at, in pixels.
        dims: Channels of the two maps.
        grids: (H, W) of the two maps.
    """

    def __init__(
        self,
        name: str,
        num_classes: int,
        input_size: tuple[int, int],
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Build the student.

        Args:
            name: timm model name.
            num_classes: K.
            input_size: Height and width of the training views, in pixels.
            model_kwargs: Extra arguments of ``timm.create_model``; ``pretrained`` starts from timm's own weights,
                ``checkpoint_path`` from a file's.

        Raises:
            InputError: Unknown name, impossible arguments, or a model without two stages to distil into.
        """
        super().__init__()
        self.name, self.num_classes, self.input_size = name, num_classes, input_size
        kwargs = {**_size_kwargs(name, input_size), **(model_kwargs or {}), "num_classes": num_classes}
        start = {key: kwargs.pop(key) for key in _START if key in kwargs}
        pretrained = start.pop("pretrained", False)
        self.model_kwargs = kwargs
        self.model = build_model(name, {**kwargs, **start}, pretrained=pretrained)
        self._plain, self._stages = _find_stages(self.model, name)
        maps = self._dry_forward()
        self.dims = maps[0].shape[1], maps[1].shape[1]
        self.grids = _grid(maps[0]), _grid(maps[1])

    def forward(self, images_BCHW: Tensor) -> StudentOutput:
        """Maps and logits of normalised images."""
        features, (stage3, stage4) = self.model.forward_intermediates(images_BCHW, indices=self._stages)  # pyright: ignore[reportCallIssue]
        if self._plain:
            stage4 = self._as_grid(features, like=stage3)
        return StudentOutput((stage3, stage4), self.model.forward_head(features))  # pyright: ignore[reportCallIssue]

    def no_weight_decay(self) -> set[str]:
        """Names of parameters the architecture wants free of weight decay (position embeddings...)."""
        names = getattr(self.model, "no_weight_decay", set)()
        return {f"model.{name}" for name in names}

    def _as_grid(self, features: Tensor, like: Tensor) -> Tensor:
        """Final features, tokens [B, P + N, C] or already a map, as a map of the same grid as ``like``."""
        if features.ndim == 4:
            return features
        tokens_BNC = features[:, getattr(self.model, "num_prefix_tokens", 0) :]
        return tokens_BNC.transpose(1, 2).unflatten(2, like.shape[2:])

    @torch.no_grad()
    def _dry_forward(self) -> tuple[Tensor, Tensor]:
        """Maps of a blank image, in eval mode: neither batch statistics nor random state are touched."""
        was_training = self.training
        self.eval()
        try:
            return self(torch.zeros(1, 3, *self.input_size)).maps
        except (RuntimeError, AssertionError, ValueError, TypeError) as error:
            raise InputError(
                f"student {self.name!r} cannot take {self.input_size[0]} x {self.input_size[1]} views: {error}; "
                "choose another student or set its sizes with --student-kwargs"
            ) from error
        finally:
            self.train(was_training)


def _size_kwargs(name: str, input_size: tuple[int, int]) -> dict[str, Any]:
    """``img_size`` for architectures that are built for one input size."""
    config = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    return {"img_size": tuple(input_size)} if config is not None and config.fixed_input_size else {}


def _find_stages(model: nn.Module, name: str) -> tuple[bool, list[int]]:
    """Whether the network keeps one resolution, and the indices of stages 3 and 4 for forward_intermediates."""
    info: Sequence[Mapping[str, Any]] = list(getattr(model, "feature_info", []))
    if not hasattr(model, "forward_intermediates") or not hasattr(model, "forward_head") or len(info) < 2:
        raise InputError(
            f"student {name!r} ({type(model).__name__}) does not give intermediate maps; expected a timm model with "
            "feature_info, forward_intermediates and forward_head, such as resnet50, swin_tiny_patch4_window7_224 "
            "or vit_small_patch16_224"
        )
    depth = len(info)
    if len({stage["reduction"] for stage in info}) == 1:
        return True, [max(3 * depth // 4, 1) - 1, depth - 1]
    return False, [depth - 2, depth - 1]


def _grid(map_BCHW: Tensor) -> tuple[int, int]:
    return map_BCHW.shape[2], map_BCHW.shape[3]
