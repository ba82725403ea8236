"""The student: a network with maps of two stages.

Shape legend: B batch, C channels, H W grid, N = H*W grid tokens, P prefix (class and register) tokens, K classes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from timm.models.mlp_mixer import MlpMixer
from torch import Tensor, nn

from feature_store.errors import InputError
from feature_store.teacher.taps import final_map
from student_trainer.methods.base import StudentOutput
from student_trainer.students.networks import build_network, timm_name

_START = ("pretrained", "pretrained_cfg_overlay", "checkpoint_path")  # where timm takes the first weights from


class Student(nn.Module):
    """A timm model, or one of torchvision's classifiers, with its stages 3 and 4 found.

    Their widths and grids are measured by a dry forward pass.

    Taps of the released code, see docs/training.md: networks whose resolution falls (CNN, Swin, ConvNeXt...) give their
    last maps at reductions 16 and 32. Plain ViTs give the block at three quarters of the depth and the last one,
    without prefix tokens; Mixers the third block from the end and the last one. Where stage 4 is the network's last
    stage, F4 is its final feature map, after its own last norm if it has one over the map; in Mixers it is the last
    block's output before that norm.

    Attributes:
        name: timm model name, or ``torchvision:NAME``.
        stages: Indices of stages 3 and 4 in timm's ``feature_info``, as they were asked for; None: found as above.
        model: The network, the only thing that has weights.
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
        stages: tuple[int, int] | None = None,
    ) -> None:
        """Build the student.

        Args:
            name: timm model name, or ``torchvision:`` and the name of one of its classifiers.
            num_classes: K.
            input_size: Height and width of the training views, in pixels.
            model_kwargs: Extra arguments of ``timm.create_model`` or ``torchvision.models.get_model``; ``pretrained``
                starts from timm's own weights, ``checkpoint_path`` from a file's.
            stages: Indices of stages 3 and 4 in timm's ``feature_info``; default found by reduction or depth.

        Raises:
            InputError: Unknown name, impossible arguments, or a model without the two stages to distil into.
        """
        super().__init__()
        name = timm_name(name)
        self.name, self.num_classes, self.input_size, self.stages = name, num_classes, input_size, stages
        kwargs = {**_size_kwargs(name, input_size), **(model_kwargs or {}), "num_classes": num_classes}
        start = {key: kwargs.pop(key) for key in _START if key in kwargs}
        pretrained = start.pop("pretrained", False)
        self.model_kwargs = kwargs
        self.model = build_network(name, {**kwargs, **start}, input_size, pretrained=pretrained)
        depth, self._taps = _find_stages(self.model, name, stages)
        self._ends_in_final_map = self._taps[1] == depth - 1 and not isinstance(self.model, MlpMixer)
        maps = self._dry_forward()
        self.dims = maps[0].shape[1], maps[1].shape[1]
        self.grids = _grid(maps[0]), _grid(maps[1])

    def forward(self, images_BCHW: Tensor) -> StudentOutput:
        """Maps and logits of normalised images."""
        features, (stage3, stage4) = self.model.forward_intermediates(images_BCHW, indices=self._taps)  # pyright: ignore[reportCallIssue]
        if self._ends_in_final_map:
            stage4 = final_map(self.model, features, stage4)
        return StudentOutput((stage3, stage4), self.model.forward_head(features))  # pyright: ignore[reportCallIssue]

    def no_weight_decay(self) -> set[str]:
        """Names of parameters the architecture wants free of weight decay (position embeddings...)."""
        names = getattr(self.model, "no_weight_decay", set)()
        return {f"model.{name}" for name in names}

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


def _find_stages(model: nn.Module, name: str, asked: tuple[int, int] | None) -> tuple[int, list[int]]:
    """Number of stages or blocks that forward_intermediates knows, and the indices of stages 3 and 4 among them."""
    info: Sequence[Mapping[str, Any]] = list(getattr(model, "feature_info", []))
    if not hasattr(model, "forward_intermediates") or not hasattr(model, "forward_head") or len(info) < 2:
        raise InputError(
            f"student {name!r} ({type(model).__name__}) does not give intermediate maps; expected a timm model with "
            "feature_info, forward_intermediates and forward_head, such as resnet50, swin_tiny_patch4_window7_224 "
            "or vit_small_patch16_224"
        )
    depth, reductions = len(info), [stage["reduction"] for stage in info]
    if asked is not None:
        if not 0 <= asked[0] < asked[1] < depth:
            raise InputError(
                f"--student-stages is {asked[0]} {asked[1]}, expected two rising indices from 0 to {depth - 1}: "
                f"student {name!r} has {depth} stages, of reductions {_listed(reductions)}"
            )
        return depth, list(asked)
    if len(set(reductions)) == 1:
        third = max(depth - 3, 0) if isinstance(model, MlpMixer) else max(3 * depth // 4, 1) - 1
        return depth, [third, depth - 1]
    found = {reduction: index for index, reduction in enumerate(reductions)}  # the last one of each
    if not (16 in found and found[16] < found.get(32, -1)):
        raise InputError(
            f"student {name!r} has stages of reductions {_listed(reductions)}, expected 16 and then 32 among them; "
            f"choose another student, or two of its stages 0 to {depth - 1} with --student-stages, "
            f"e.g. {depth - 2} {depth - 1}"
        )
    return depth, [found[16], found[32]]


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))


def _grid(map_BCHW: Tensor) -> tuple[int, int]:
    return map_BCHW.shape[2], map_BCHW.shape[3]
