"""Trains the demo's teacher: the one thing a user with a pretrained teacher does not do.

Shape legend: B batch, H W pixels, C colours.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn

from demo.digits import Digits
from demo.settings import CLASSES, SIDE, VIEW_POLICY, Settings
from feature_store.inputs.tar import Tar
from feature_store.teacher.model import build_model
from feature_store.views import ViewPolicy, apply_view, decode_image, draw_view, view_policy
from student_trainer.evaluate import Evaluator
from student_trainer.students.load import Preprocessing

CROP_PCT = 1.0  # a digit fills its scan: nothing is cut off in testing

_WARMUP = 0.1  # part of the steps
_CLIP_GRAD = 5.0


@dataclass(frozen=True)
class TeacherReport:
    """Result and cost of the teacher's training.

    Attributes:
        checkpoint: Its weights, a safetensors file.
        top1: Test accuracy, in percent.
        seconds: Wall time of its training.
        parameters: Number of its weights.
    """

    checkpoint: Path
    top1: float
    seconds: float
    parameters: int


def train_teacher(digits: Digits, settings: Settings, checkpoint: Path) -> TeacherReport:
    """Train on all labels, save the weights, and test."""
    begun = time.perf_counter()
    torch.manual_seed(settings.seed)
    model = build_model(settings.teacher.name, settings.teacher.model_kwargs)
    preprocessing = _preprocessing(model)
    _fit(model, preprocessing, _Views(digits.train_tars, _policy(settings), settings), settings)
    seconds = time.perf_counter() - begun
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, checkpoint)
    test = Evaluator([Tar.open(tar) for tar in digits.test_tars], preprocessing, CLASSES, device=torch.device("cpu"))
    return TeacherReport(checkpoint, test(model).top1, seconds, sum(p.numel() for p in model.parameters()))


def _policy(settings: Settings) -> ViewPolicy:
    return view_policy(VIEW_POLICY, SIDE, **settings.view_options)


def _preprocessing(model: nn.Module) -> Preprocessing:
    """Timm's normalisation of this model, which is what the cache job and the students use too."""
    data = resolve_model_data_config(model)
    return Preprocessing((SIDE, SIDE), data["mean"], data["std"], "bilinear", CROP_PCT)


def _fit(model: nn.Module, preprocessing: Preprocessing, views: "_Views", settings: Settings) -> None:
    teacher = settings.teacher
    optimizer = torch.optim.AdamW(model.parameters(), lr=teacher.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, teacher.lr, total_steps=teacher.epochs * views.batches_per_epoch, pct_start=_WARMUP
    )
    normalise = preprocessing.normaliser(torch.device("cpu"))
    model.train()
    for epoch in range(teacher.epochs):
        for pixels_BHWC, labels_B in views.epoch(epoch):
            loss = F.cross_entropy(model(normalise(pixels_BHWC)), labels_B, label_smoothing=teacher.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), _CLIP_GRAD)
            optimizer.step()
            schedule.step()


class _Views:
    """Training images in memory, and a new view of each in every epoch."""

    def __init__(self, tars: Sequence[str], policy: ViewPolicy, settings: Settings) -> None:
        opened = [Tar.open(tar) for tar in tars]
        samples = [tar.read(position) for tar in opened for position in range(len(tar))]
        self._keys = [sample.key for sample in samples]
        self._images: list[Image.Image] = [decode_image(sample.image) for sample in samples]
        self._labels = torch.tensor([sample.label for sample in samples])
        self._policy, self._seed, self._batch_size = policy, settings.seed, settings.teacher.batch_size

    @property
    def batches_per_epoch(self) -> int:
        return len(self._keys) // self._batch_size

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Shuffled batches of uint8 pixels [B, H, W, C] and labels [B]; an incomplete last one is left out."""
        order = torch.randperm(len(self._keys))
        for batch in range(self.batches_per_epoch):
            chosen = order[batch * self._batch_size : (batch + 1) * self._batch_size]
            pixels = np.stack([self._view(i, epoch) for i in chosen.tolist()])
            yield torch.from_numpy(pixels), self._labels[chosen]

    def _view(self, index: int, epoch: int) -> np.ndarray:
        image = self._images[index]
        params = draw_view(self._policy, self._seed, self._keys[index], epoch, image.size)
        return apply_view(image, params, self._policy.size)
