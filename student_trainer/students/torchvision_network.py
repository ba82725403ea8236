"""Networks of torchvision with timm's interface.

Stages are found by a forward pass.

Shape legend: B batch, C channels, H W grid, K classes.
"""

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from feature_store.errors import InputError, one_line
from feature_store.teacher.weights import read_weights

TORCHVISION = "torchvision:"
"""Prefix of the names of torchvision's networks."""


class TorchvisionNetwork(nn.Module):
    """A classifier of torchvision with what students need of a timm model.

    Stages are the last of its parts with a map of each reduction: its children, or the children of those that are a
    sequence of parts, but for pooling before the classifier.

    Attributes:
        net: torchvision's network.
        feature_info: Channels, reduction and module name of each stage, as of a timm model.
    """

    net: Any  # nn.Module's typing would make a Tensor of what it calls

    def __init__(self, net: nn.Module, input_size: tuple[int, int]) -> None:
        """Find the stages.

        Args:
            net: The network.
            input_size: Height and width of the images that stages are found with, in pixels.
        """
        super().__init__()
        self.net, self._channels_last = net, set[int]()
        self.feature_info: list[dict[str, Any]] = []
        for name, map_BCHW, channels_last in _last_of_each_reduction(net, input_size):
            if channels_last:
                self._channels_last.add(len(self.feature_info))
            reduction = _reduction(input_size, map_BCHW.shape[2:])
            self.feature_info.append({"num_chs": map_BCHW.shape[1], "reduction": reduction, "module": name})

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits [B, K]; in training without those of auxiliary classifiers."""
        output = self.net(images_BCHW)
        return output if isinstance(output, Tensor) else output.logits

    def forward_intermediates(self, images_BCHW: Tensor, indices: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """Logits, and the maps [B, C, H, W] of stages by rising index."""
        seen: dict[int, Tensor] = {}
        modules = {index: self.net.get_submodule(self.feature_info[index]["module"]) for index in indices}
        handles = [
            module.register_forward_hook(lambda _module, _inputs, output, index=index: seen.update({index: output}))
            for index, module in modules.items()
        ]
        try:
            logits = self(images_BCHW)
        finally:
            for handle in handles:
                handle.remove()
        maps = [seen[index].permute(0, 3, 1, 2) if index in self._channels_last else seen[index] for index in indices]
        return logits, maps

    def forward_head(self, logits: Tensor) -> Tensor:
        """The same: forward_intermediates runs the whole network."""
        return logits

    def weights(self) -> dict[str, Tensor]:
        """The network's state dict, by torchvision's names."""
        return self.net.state_dict()

    def backbone_weights(self) -> dict[str, Tensor]:
        """Those without the parts that follow the last stage: pooling, classifiers."""
        names = [name for name, _ in self.net.named_children()]
        last = names.index(self.feature_info[-1]["module"].partition(".")[0])
        return {key: leaf for key, leaf in self.net.state_dict().items() if key.partition(".")[0] in names[: last + 1]}


def build_torchvision(
    name: str, kwargs: Mapping[str, Any], input_size: tuple[int, int], *, pretrained: bool = False
) -> TorchvisionNetwork:
    """A classifier of torchvision by name, untrained or from a file.

    Args:
        name: ``torchvision:`` and torchvision's name.
        kwargs: Arguments of ``torchvision.models.get_model``; ``checkpoint_path`` is a file of its weights.
        input_size: Height and width of the images, in pixels.
        pretrained: Refused: torchvision's own weights are of 1000 classes.

    Raises:
        InputError: Unknown name, or impossible arguments.
    """
    network, kwargs = name.removeprefix(TORCHVISION), dict(kwargs)
    known = torchvision.models.list_models(module=torchvision.models)
    if network not in known:
        close = difflib.get_close_matches(network, known, n=3)
        hint = f"did you mean {', '.join(close)}?" if close else f"expected one of {', '.join(known)}"
        raise InputError(f"torchvision {torchvision.__version__} knows no classifier {network!r}; {hint}")
    if pretrained:
        raise InputError(
            f"pretrained is for timm's networks; for {name} download its weights and give the file as checkpoint_path"
        )
    checkpoint = kwargs.pop("checkpoint_path", None)
    try:
        net = torchvision.models.get_model(network, weights=None, **kwargs)
        if checkpoint:
            net.load_state_dict(read_weights(Path(checkpoint)))
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise InputError(f"torchvision cannot build {network!r} with {kwargs}: {one_line(error)}") from error
    return TorchvisionNetwork(net, input_size)


@torch.no_grad()
def _last_of_each_reduction(net: nn.Module, size: tuple[int, int]) -> list[tuple[str, Tensor, bool]]:
    """Name and map [1, C, H, W] of the last part of each reduction, finest first; whether it has channels last."""
    found: dict[int, tuple[str, Tensor, bool]] = {}

    def keep(name: str, output: Any) -> None:
        if not isinstance(output, Tensor) or output.ndim != 4:
            return
        for last, map_BCHW in ((False, output), (True, output.permute(0, 3, 1, 2))):
            if (reduction := _reduction(size, map_BCHW.shape[2:])) is not None:
                found[reduction] = name, map_BCHW, last
                return

    handles = [
        part.register_forward_hook(lambda _module, _inputs, output, name=name: keep(name, output))
        for name, part in _parts(net)
    ]
    was_training = net.training
    net.eval()
    try:
        net(torch.zeros(1, 3, *size, device=next(net.parameters()).device))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise InputError(
            f"{type(net).__name__} cannot take {size[0]} x {size[1]} images: {one_line(error)}; choose another student"
        ) from error
    finally:
        net.train(was_training)
        for handle in handles:
            handle.remove()
    return [found[reduction] for reduction in sorted(found)]


def _parts(net: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in net.named_children():
        inner = [(f"{name}.{key}", part) for key, part in child.named_children()]
        for found in inner if isinstance(child, (nn.Sequential, nn.ModuleList)) and inner else [(name, child)]:
            if not isinstance(found[1], nn.AdaptiveAvgPool2d):
                yield found


def _reduction(size: tuple[int, int], grid: Sequence[int]) -> int | None:
    """Power of two by which a grid is smaller than the image; None if its sides are not in the image's proportion."""
    sides = {max(0, round(math.log2(image / side))) for image, side in zip(size, grid, strict=True)}
    return 2 ** sides.pop() if len(sides) == 1 else None
