"""UperNet over an exported backbone, fine-tuned on ADE20K-format data.

Shape legend: B batch, C channels, H W pixels, K classes.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from feature_store.errors import InputError, UserError
from feature_store.tools.command_line import run
from feature_store.tools.options import check_fields, require
from feature_store.tools.terminal import say, say_json
from feature_store.views import decode_image
from student_trainer.plan import find_device
from student_trainer.students.backbone import Backbone, load_backbone, pyramid

IGNORED = 255  # label of pixels without a class
_MULTIPLE = 32  # of both sides of an image


@dataclass(frozen=True, kw_only=True)
class SegmentationConfig:
    """Fine-tuning an UperNet on one GPU.

    Attributes:
        backbone: Folder written by student-trainer export --backbone.
        data: Folder with images/training, annotations/training and, for validation, the same under validation;
            annotations are PNGs of class numbers from 1, 0 for none.
        out: Where model.pt goes, at the end.
        num_classes: Classes without the background.
        steps: Optimizer steps.
        batch_size: Images per step.
        opt: sgd for ResNets (momentum 0.9, weight decay 5e-4), adamw for transformers (weight decay 0.01).
        lr: Rate; default 0.01 or 6e-5, falling to 0 with (1 - step / steps) ** 0.9 (sgd) or linearly (adamw).
        warmup: Steps over which the rate rises from 0.
        crop: Side of training crops, and shorter side of validation images, in pixels.
        channels: Width of the head.
        validate: Compute mIoU on the validation images at the end. Off: leave it out.
        workers: Processes that decode images.
        device: Where to train.
        seed: Seed of the head, order and crops.
    """

    backbone: Path
    data: Path
    out: Path
    num_classes: int = 150
    steps: int = 160_000
    batch_size: int = 16
    opt: Literal["sgd", "adamw"] = "adamw"
    lr: float | None = None
    warmup: int = 1500
    crop: int = 512
    channels: int = 512
    validate: bool = True
    workers: int = 4
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values no run could use.

        Raises:
            InputError: Names the option, the value and what is accepted.
        """
        check_fields(self)
        for name in ("num_classes", "steps", "batch_size", "channels"):
            require(getattr(self, name) >= 1, f"--{name.replace('_', '-')}", getattr(self, name), "at least 1")
        require(self.crop >= 1 and self.crop % _MULTIPLE == 0, "--crop", self.crop, f"a multiple of {_MULTIPLE}")
        require(self.warmup >= 0, "--warmup", self.warmup, "0 or more")
        require(self.lr is None or self.lr > 0, "--lr", self.lr, "above 0")

    def rate(self, step: int) -> float:
        """Learning rate at a step."""
        peak = self.lr or {"sgd": 0.01, "adamw": 6e-5}[self.opt]
        warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        return peak * warm * (1 - step / self.steps) ** (0.9 if self.opt == "sgd" else 1.0)


class UperNet(nn.Module):
    """Unified perceptual parsing's head (Xiao et al. 2018) over a pyramid: pooling pyramid, FPN, fusion.

    Attributes:
        backbone: The pyramid.
    """

    _mean: Tensor
    _std: Tensor

    def __init__(self, backbone: Backbone, num_classes: int, channels: int = 512) -> None:
        super().__init__()
        self.backbone = pyramid(backbone)
        *finer, coarsest = self.backbone.channels
        self._pools = (1, 2, 3, 6)  # bins per side
        self.pooled = nn.ModuleList(_conv(coarsest, channels, 1, norm=False) for _ in self._pools)
        self.pooling_out = _conv(coarsest + len(self._pools) * channels, channels, 3)
        self.lateral = nn.ModuleList(_conv(width, channels, 1) for width in finer)
        self.smooth = nn.ModuleList(_conv(channels, channels, 3) for _ in finer)
        self.fuse = _conv(4 * channels, channels, 3)
        self.classify = nn.Conv2d(channels, num_classes, 1)
        self.register_buffer("_mean", torch.tensor(backbone.mean)[:, None, None], persistent=False)
        self.register_buffer("_std", torch.tensor(backbone.std)[:, None, None], persistent=False)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Class scores [B, K, H, W] of images in 0..1; sides are padded to multiples of 32 and cut back."""
        height, width = images_BCHW.shape[-2:]
        images = F.pad((images_BCHW - self._mean) / self._std, (0, -width % _MULTIPLE, 0, -height % _MULTIPLE))
        scores = self.classify(self.fuse(self._pyramid(images)))
        return F.interpolate(scores, images.shape[-2:], mode="bilinear", align_corners=False)[..., :height, :width]

    def _pyramid(self, images_BCHW: Tensor) -> Tensor:
        """All four levels at the finest one's size, concatenated."""
        *finer, coarsest = self.backbone(images_BCHW).values()
        levels = [self._pool(coarsest)]
        for lateral, map_BCHW in zip(reversed(self.lateral), reversed(finer), strict=True):
            levels.insert(0, lateral(map_BCHW) + _like(levels[0], map_BCHW))
        smoothed = [conv(level) for conv, level in zip(self.smooth, levels[:-1], strict=True)] + levels[-1:]
        return torch.cat([_like(level, smoothed[0]) for level in smoothed], dim=1)

    def _pool(self, map_BCHW: Tensor) -> Tensor:
        pooled = [
            _like(conv(F.adaptive_avg_pool2d(map_BCHW, bins)), map_BCHW)
            for bins, conv in zip(self._pools, self.pooled, strict=True)
        ]
        return self.pooling_out(torch.cat([map_BCHW, *pooled], dim=1))


def _conv(inputs: int, outputs: int, side: int, *, norm: bool = True) -> nn.Sequential:
    """Convolution, norm and ReLU; no norm where a map may be one pixel of one image."""
    middle = [nn.BatchNorm2d(outputs)] if norm else []
    return nn.Sequential(nn.Conv2d(inputs, outputs, side, padding=side // 2, bias=not norm), *middle, nn.ReLU())


def _like(map_BCHW: Tensor, other: Tensor) -> Tensor:
    return F.interpolate(map_BCHW, other.shape[-2:], mode="bilinear", align_corners=False)


class SceneParsing(Dataset[tuple[Tensor, Tensor]]):
    """Images [3, H, W] in 0..1 and their labels [H, W] from 0, IGNORED where there is none."""

    def __init__(self, data: Path, split: Literal["training", "validation"], num_classes: int, crop: int) -> None:
        """List the images.

        Args:
            data: Folder with ``images`` and ``annotations``.
            split: Training images are scaled by 0.5..2, cropped and mirrored at random; validation ones resized.
            num_classes: Classes; a larger label is refused when it is read.
            crop: Side of crops, or shorter side in validation.

        Raises:
            InputError: No images there.
        """
        self._labels, self._num_classes = data / "annotations" / split, num_classes
        self._images = sorted((data / "images" / split).glob("*.[jp][pn]g"))
        if not self._images:
            raise InputError(f"{data / 'images' / split} holds no .jpg or .png; give the folder of ADE20K's release")
        self._transform = _augment(crop) if split == "training" else v2.Resize(crop)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        path = self._images[index]
        image = torch.from_numpy(np.array(decode_image(path.read_bytes()))).permute(2, 0, 1)
        pixels, labels = self._transform(tv_tensors.Image(image), tv_tensors.Mask(self._read_labels(path)))
        return pixels.as_subclass(Tensor).float() / 255, labels.as_subclass(Tensor)[0]

    def _read_labels(self, image: Path) -> Tensor:
        path = self._labels / f"{image.stem}.png"
        if not path.is_file():
            raise InputError(f"annotation {path} of {image.name} is missing")
        with Image.open(path) as file:
            labels = torch.from_numpy(np.array(file)).long()
        if labels.ndim != 2 or labels.max() > self._num_classes:
            raise InputError(
                f"{path} has shape {tuple(labels.shape)} and labels up to {labels.max()}, "
                f"expected one channel and at most --num-classes {self._num_classes}"
            )
        return torch.where(labels == 0, IGNORED, labels - 1)[None]


def _augment(crop: int) -> v2.Transform:
    blank: dict[type | str, Any] = {tv_tensors.Image: 0, tv_tensors.Mask: IGNORED}
    return v2.Compose([
        v2.ScaleJitter((crop, crop), (0.5, 2.0)),
        v2.RandomCrop(crop, pad_if_needed=True, fill=blank),
        v2.RandomHorizontalFlip(),
    ])  # fmt: skip


def train_segmenter(config: SegmentationConfig) -> dict[str, float]:
    """Fine-tune, and give ``loss`` (mean of the last 50 steps) and, if validated, ``miou`` in percent.

    Raises:
        UserError: Data or backbone that cannot be used, or a loss that is not finite.
    """
    device = find_device(config.device)
    backbone = load_backbone(config.backbone)
    data = SceneParsing(config.data, "training", config.num_classes, config.crop)
    validation = None
    if config.validate:
        validation = SceneParsing(config.data, "validation", config.num_classes, config.crop)
    torch.manual_seed(config.seed)
    model = UperNet(backbone, config.num_classes, config.channels).to(device)
    optimizer = make_optimizer(config, model)
    loader = DataLoader(
        data, config.batch_size, shuffle=True, drop_last=len(data) >= config.batch_size, num_workers=config.workers
    )
    losses: list[float] = []
    while len(losses) < config.steps:
        for images, labels in loader:
            for group in optimizer.param_groups:
                group["lr"] = config.rate(len(losses))
            losses.append(train_step(model, optimizer, images.to(device), labels.to(device)))
            if len(losses) % 50 == 0:
                say(f"step {len(losses)}/{config.steps}: loss {sum(losses[-50:]) / 50:.4f}")
            if len(losses) == config.steps:
                break
    config.out.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), config.out / "model.pt")
    last = losses[-50:]
    result = {"loss": sum(last) / len(last)}
    if validation is not None:
        result["miou"] = mean_iou(model, validation, config.num_classes, device)
    return result


def make_optimizer(config: SegmentationConfig, model: UperNet) -> Optimizer:
    """SGD or AdamW over what learns."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if config.opt == "sgd":
        return torch.optim.SGD(learning, config.rate(0), momentum=0.9, weight_decay=5e-4)
    return torch.optim.AdamW(learning, config.rate(0), weight_decay=0.01)


def train_step(model: UperNet, optimizer: Optimizer, images_BCHW: Tensor, labels_BHW: Tensor) -> float:
    """One optimizer step on the pixel-wise cross entropy; returns it.

    Raises:
        UserError: The loss is not finite; nothing was updated.
    """
    model.train()
    labelled = (labels_BHW != IGNORED).sum().clamp(min=1)  # a crop may have no labelled pixel at all
    loss = F.cross_entropy(model(images_BCHW), labels_BHW, ignore_index=IGNORED, reduction="sum") / labelled
    if not math.isfinite(loss.item()):
        raise UserError(f"the segmentation loss is {loss.item()}; lower --lr or raise --warmup")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@torch.no_grad()
def mean_iou(model: UperNet, data: SceneParsing, num_classes: int, device: torch.device) -> float:
    """Intersection over union in percent, mean over the classes that occur or are predicted."""
    model.eval()
    confusion_KK = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    for image, labels in (data[i] for i in range(len(data))):
        predicted = model(image[None].to(device)).argmax(1)[0].cpu()
        seen = labels != IGNORED
        pairs = labels[seen] * num_classes + predicted[seen]
        confusion_KK += torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)
    both = confusion_KK.diagonal()
    either = confusion_KK.sum(0) + confusion_KK.sum(1) - both
    return 100 * (both[either > 0] / either[either > 0]).mean().item()


app = tyro.extras.SubcommandApp()


@app.command
def segmentation(config: Annotated[SegmentationConfig, tyro.conf.arg(name="")]) -> None:
    """Fine-tune an UperNet on ADE20K-format data; prints mIoU as JSON if there is validation data.

    Args:
        config: The run.
    """
    say_json(train_segmenter(config), indent=2)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run(app, "examples", ["segmentation", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
