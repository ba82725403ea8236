"""COCO-format instance data for torchvision's Mask R-CNN, scored by pycocotools."""

import contextlib
import io
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as TF

from feature_store.errors import InputError
from feature_store.views import decode_image

Target = dict[str, Tensor]


def require_pycocotools() -> None:
    """Refuse to continue without pycocotools.

    Raises:
        InputError: It is not installed.
    """
    if find_spec("pycocotools") is None:
        raise InputError("the detection recipe needs pycocotools; install with `pip install 'scalekd-cache[coco]'`")


class CocoInstances(Dataset[tuple[Tensor, Target]]):
    """Images with their boxes, masks and classes; crowds and empty boxes are left out.

    Attributes:
        coco: pycocotools' index of the annotations.
        category_ids: The data set's category per class; class 0 is the background.
    """

    def __init__(self, images: Path, annotations: Path, *, train: bool) -> None:
        """Index the annotations.

        Args:
            images: Folder of the images.
            annotations: COCO instances file.
            train: Leave out images without objects, and mirror at random.

        Raises:
            InputError: The file is missing, or nothing is left.
        """
        require_pycocotools()
        from pycocotools.coco import COCO

        if not annotations.is_file():
            raise InputError(f"annotations {annotations} do not exist; give a COCO instances file")
        with contextlib.redirect_stdout(io.StringIO()):
            self.coco: Any = COCO(str(annotations))  # its type stubs know neither record lists nor bytes
        self._images, self._train = images, train
        self.category_ids = (0, *sorted(self.coco.getCatIds()))
        self._class_of = {category: index for index, category in enumerate(self.category_ids) if index}
        self.image_ids = [i for i in sorted(self.coco.getImgIds()) if not train or self._objects(i)]
        if not self.image_ids:
            raise InputError(f"{annotations} describes no image with objects to train on")

    @property
    def num_classes(self) -> int:
        """Classes with the background."""
        return len(self.category_ids)

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        """An image [3, H, W] in 0..1 and its ``boxes`` (corners), ``labels``, ``masks`` and ``image_id``."""
        image_id = self.image_ids[index]
        image = self._image(image_id)
        target = self._target(image_id, image.shape[-2:])
        if self._train and torch.rand(()) < 0.5:
            return _mirrored(image, target)
        return image, target

    def _image(self, image_id: int) -> Tensor:
        path = self._images / self.coco.loadImgs(image_id)[0]["file_name"]
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InputError(f"image {path} cannot be read: {error}; check the images folder") from error
        return torch.from_numpy(np.array(decode_image(data))).permute(2, 0, 1).float() / 255

    def _objects(self, image_id: int) -> list[dict[str, Any]]:
        found = self.coco.loadAnns(self.coco.getAnnIds(imgIds=image_id, iscrowd=False))
        return [one for one in found if one["bbox"][2] > 0 and one["bbox"][3] > 0]

    def _target(self, image_id: int, size: torch.Size) -> Target:
        objects = self._objects(image_id)
        boxes = torch.tensor([one["bbox"] for one in objects], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]  # corner and extent to two corners
        masks = [torch.from_numpy(self.coco.annToMask(one)) for one in objects]
        return {
            "boxes": boxes,
            "labels": torch.tensor([self._class_of[one["category_id"]] for one in objects], dtype=torch.int64),
            "masks": torch.stack(masks) if masks else torch.zeros(0, *size, dtype=torch.uint8),
            "image_id": torch.tensor(image_id),
        }


def _mirrored(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    width = image.shape[-1]
    boxes = target["boxes"].clone()
    boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
    return TF.horizontal_flip(image), {**target, "boxes": boxes, "masks": target["masks"].flip(-1)}


def average_precision(dataset: CocoInstances, detections: list[tuple[int, Target]]) -> dict[str, float]:
    """Box and mask AP in percent, averaged over IoU 0.50..0.95 as COCO does.

    Args:
        dataset: The validation data.
        detections: (image id, Mask R-CNN's output on the CPU) per image.
    """
    records = [record for image_id, found in detections for record in _records(dataset, image_id, found)]
    if not records:
        return {"box_ap": 0.0, "mask_ap": 0.0}
    from pycocotools.cocoeval import COCOeval

    scores: dict[str, float] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        found = dataset.coco.loadRes(records)
        kinds: tuple[tuple[str, Any], ...] = (("box_ap", "bbox"), ("mask_ap", "segm"))
        for name, kind in kinds:
            evaluation = COCOeval(dataset.coco, found, kind)
            evaluation.params.imgIds = [image_id for image_id, _ in detections]
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            scores[name] = 100 * float(evaluation.stats[0])
    return scores


def _records(dataset: CocoInstances, image_id: int, found: Target) -> list[dict[str, Any]]:
    """Detections in COCO's result format."""
    from pycocotools.mask import encode

    records = []
    for box, label, score, mask in zip(found["boxes"], found["labels"], found["scores"], found["masks"], strict=True):
        x, y, right, bottom = box.tolist()
        rle: Any = encode(np.asfortranarray((mask[0] > 0.5).numpy().astype(np.uint8)))
        records.append({
            "image_id": image_id,
            "category_id": dataset.category_ids[int(label)],
            "bbox": [x, y, right - x, bottom - y],
            "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
            "score": float(score),
        })  # fmt: skip
    return records
