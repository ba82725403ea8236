"""Mask R-CNN over an exported backbone, fine-tuned on COCO-format data."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from torchvision.models.detection import MaskRCNN

from examples.coco import CocoInstances, Target, average_precision, require_pycocotools
from feature_store.errors import InputError, MismatchError, UserError
from feature_store.tools.command_line import run
from feature_store.tools.options import check_fields, require
from feature_store.tools.terminal import say, say_json
from student_trainer.plan import find_device
from student_trainer.students.backbone import Backbone, fpn_backbone, load_backbone


@dataclass(frozen=True, kw_only=True)
class DetectionConfig:
    """Fine-tuning Mask R-CNN: the 1x schedule of detection papers, on one GPU.

    Attributes:
        backbone: Folder written by student-trainer export --backbone.
        images: Folder of training images.
        annotations: COCO instances file of them.
        out: Where model.pt goes, after every epoch.
        val_images: Folder of validation images.
        val_annotations: COCO instances file of them.
        epochs: Passes over the images; the rate falls tenfold after two thirds and eleven twelfths of them.
        batch_size: Images per step.
        opt: sgd for ResNets (momentum 0.9, weight decay 1e-4), adamw for transformers (weight decay 0.05).
        lr: Rate; default by optimizer (0.02 or 1e-4 for 16 images, in proportion to the batch).
        warmup: Steps over which the rate rises from a thousandth.
        trainable_layers: Last stages of a ResNet that learn; other networks learn as a whole.
        min_size: Shorter side images are resized to, in pixels.
        max_size: Longest side they may have then.
        workers: Processes that decode images.
        device: Where to train.
        seed: Seed of heads and order.
    """

    backbone: Path
    images: Path
    annotations: Path
    out: Path
    val_images: Path | None = None
    val_annotations: Path | None = None
    epochs: int = 12
    batch_size: int = 16
    opt: Literal["sgd", "adamw"] = "sgd"
    lr: float | None = None
    warmup: int = 500
    trainable_layers: int = 3
    min_size: int = 800
    max_size: int = 1333
    workers: int = 4
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values no run could use.

        Raises:
            InputError: Names the option, the value and what is accepted.
        """
        check_fields(self)
        for name in ("epochs", "batch_size", "min_size", "max_size"):
            require(getattr(self, name) >= 1, f"--{name.replace('_', '-')}", getattr(self, name), "at least 1")
        require(0 <= self.trainable_layers <= 5, "--trainable-layers", self.trainable_layers, "0 to 5")
        require(self.warmup >= 0, "--warmup", self.warmup, "0 or more")
        require(self.lr is None or self.lr > 0, "--lr", self.lr, "above 0")
        if (self.val_images is None) != (self.val_annotations is None):
            raise InputError("give --val-images and --val-annotations together")

    def rate(self) -> float:
        """Peak learning rate."""
        return self.lr or {"sgd": 0.02, "adamw": 1e-4}[self.opt] * self.batch_size / 16


def mask_rcnn(backbone: Backbone, num_classes: int, config: DetectionConfig) -> MaskRCNN:
    """Torchvision's Mask R-CNN with FPN over an exported backbone; num_classes counts the background."""
    return MaskRCNN(
        fpn_backbone(backbone, config.trainable_layers),
        num_classes,
        image_mean=list(backbone.mean),
        image_std=list(backbone.std),
        min_size=config.min_size,
        max_size=config.max_size,
    )


def train_detector(config: DetectionConfig) -> dict[str, float]:
    """Fine-tune, and give ``loss`` (mean of the last epoch) and, with validation data, ``box_ap`` and ``mask_ap``.

    Raises:
        UserError: Data or backbone that cannot be used, or a loss that is not finite.
    """
    require_pycocotools()
    device = find_device(config.device)
    backbone = load_backbone(config.backbone)
    data = CocoInstances(config.images, config.annotations, train=True)
    validation = _validation_data(config, data)
    torch.manual_seed(config.seed)
    model = mask_rcnn(backbone, data.num_classes, config).to(device)
    optimizer = make_optimizer(config, model)
    loader = DataLoader(
        data, config.batch_size, shuffle=True, drop_last=len(data) >= config.batch_size,
        num_workers=config.workers, collate_fn=_as_lists,
    )  # fmt: skip
    config.out.mkdir(parents=True, exist_ok=True)
    step, losses = 0, []
    for epoch in range(config.epochs):
        losses = []
        for images, targets in loader:
            _set_rate(optimizer, config, epoch, step)
            losses.append(train_step(model, optimizer, images, targets, device))
            step += 1
        torch.save(model.state_dict(), config.out / "model.pt")
        say(f"epoch {epoch + 1}/{config.epochs}: loss {sum(losses) / len(losses):.4f}")
    result = {"loss": sum(losses) / len(losses)}
    if validation is not None:
        result |= evaluate_detector(model, validation, device)
    return result


def _validation_data(config: DetectionConfig, data: CocoInstances) -> CocoInstances | None:
    """The validation images, if there are any.

    Raises:
        MismatchError: Their classes are not those trained on.
    """
    if config.val_images is None or config.val_annotations is None:
        return None
    validation = CocoInstances(config.val_images, config.val_annotations, train=False)
    if validation.category_ids != data.category_ids:
        raise MismatchError(
            "category ids",
            where=str(config.annotations),
            expected=data.category_ids[1:],
            got=validation.category_ids[1:],
            remedy=f"list the same categories in {config.val_annotations}",
        )
    return validation


def make_optimizer(config: DetectionConfig, model: MaskRCNN) -> Optimizer:
    """SGD or AdamW over what learns."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if config.opt == "sgd":
        return torch.optim.SGD(learning, config.rate(), momentum=0.9, weight_decay=1e-4)
    return torch.optim.AdamW(learning, config.rate(), weight_decay=0.05)


def train_step(
    model: MaskRCNN, optimizer: Optimizer, images: Sequence[Tensor], targets: Sequence[Target], device: torch.device
) -> float:
    """One optimizer step; returns the sum of Mask R-CNN's losses.

    Raises:
        UserError: The loss is not finite; nothing was updated.
    """
    model.train()
    moved = [{name: value.to(device) for name, value in target.items()} for target in targets]
    loss = torch.stack(list(model([image.to(device) for image in images], moved).values())).sum()
    if not math.isfinite(loss.item()):
        raise UserError(f"the detection loss is {loss.item()}; lower --lr or raise --warmup")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@torch.no_grad()
def evaluate_detector(model: MaskRCNN, data: CocoInstances, device: torch.device) -> dict[str, float]:
    """Box and mask AP in percent."""
    model.eval()
    detections = []
    for image, target in (data[i] for i in range(len(data))):
        (found,) = model([image.to(device)])
        detections.append((int(target["image_id"]), {name: value.cpu() for name, value in found.items()}))
    return average_precision(data, detections)


def _set_rate(optimizer: Optimizer, config: DetectionConfig, epoch: int, step: int) -> None:
    falls = sum(epoch >= config.epochs * part for part in (2 / 3, 11 / 12))
    warm = min(1.0, 1e-3 + step / config.warmup) if config.warmup else 1.0
    for group in optimizer.param_groups:
        group["lr"] = config.rate() * warm * 0.1**falls


def _as_lists(samples: list[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)


app = tyro.extras.SubcommandApp()


@app.command
def detection(config: Annotated[DetectionConfig, tyro.conf.arg(name="")]) -> None:
    """Fine-tune Mask R-CNN on COCO-format data; prints box and mask AP as JSON if there is validation data.

    Args:
        config: The run.
    """
    say_json(train_detector(config), indent=2)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run(app, "examples", ["detection", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
