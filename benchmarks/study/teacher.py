"""Training of the study's teachers, resumable epoch by epoch.

Shape legend: B batch, H W pixels, C colours.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.data.config import resolve_model_data_config
from timm.optim import param_groups_weight_decay  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn

from benchmarks.study import networks  # noqa: F401 - registers the network with timm
from feature_store.backends.files import replacing, write_text
from feature_store.errors import InputError
from feature_store.inputs.tar import open_tars
from feature_store.teacher.model import build_model, normalise
from feature_store.views import decode_image

PADDING = 4  # pixels a training image is shifted by, at most
CLIP_GRAD = 5.0


@dataclass(frozen=True)
class TeacherRecipe:
    """A teacher and its training.

    Attributes:
        name: timm name.
        model_kwargs: Extra arguments of ``timm.create_model``.
        images: Number of training images, in the order of the tars; None: all.
        epochs: Passes over them, each image shifted and mirrored at random.
        batch_size: Images per step.
        lr: Peak learning rate of AdamW, one cycle.
        weight_decay: Of AdamW.
        label_smoothing: Of its cross entropy.
    """

    name: str = "study_hybrid_32"
    model_kwargs: dict[str, Any] | None = None
    images: int | None = None
    epochs: int = 10
    batch_size: int = 128
    lr: float = 2e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.1


def train_teacher(
    recipe: TeacherRecipe, tars: Sequence[str], val_tars: Sequence[str], folder: Path, device: str = "cpu"
) -> dict[str, Any]:
    """Train, or continue after the last whole epoch; a finished one is only reported.

    Args:
        recipe: The teacher and its training.
        tars: Training images.
        val_tars: Test images, looked at once, after the last epoch.
        folder: Gets ``teacher.safetensors``, ``teacher.json`` (the report) and ``state.pt`` while training.
        device: Where it is trained, e.g. cuda; images lie there as a whole.

    Returns:
        The report: recipe, top-1 in percent, seconds of wall and CPU, number of weights.

    Raises:
        InputError: The folder holds a teacher of another recipe.
    """
    report = folder / "teacher.json"
    if report.exists():
        said = json.loads(report.read_text())
        if said["recipe"] != (asked := json.loads(json.dumps(asdict(recipe)))):
            raise InputError(f"{folder} holds a teacher of {said['recipe']}, expected {asked}; remove it to train anew")
        return said
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = build_model(recipe.name, recipe.model_kwargs).to(device)
    model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    images, labels = (part[: recipe.images].to(device) for part in _load(tars))
    fit = _Fit(model, recipe, images, labels, folder / "state.pt")
    while fit.epoch < recipe.epochs:
        fit.one_epoch()
    model.eval()
    top1 = _top1(model, *(part.to(device) for part in _load(val_tars)))
    save_file(
        {name: value.cpu().contiguous() for name, value in model.state_dict().items()}, folder / "teacher.safetensors"
    )
    said = {
        "recipe": asdict(recipe),
        "top1": top1,
        "wall_seconds": fit.wall_seconds,
        "cpu_seconds": fit.cpu_seconds,
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_images": len(images),
        "epoch_losses": fit.losses,
    }
    write_text(report, json.dumps(said, indent=1))
    fit.state_file.unlink()
    return said


class _Fit:
    """The state of a training: model, optimizer, schedule, epochs done."""

    def __init__(
        self, model: nn.Module, recipe: TeacherRecipe, images_BHWC: Tensor, labels_B: Tensor, state: Path
    ) -> None:
        self.model, self.recipe, self.state_file = model, recipe, state
        self._images, self._labels = images_BHWC, labels_B
        self._batches = len(images_BHWC) // recipe.batch_size
        self.epoch, self.wall_seconds, self.cpu_seconds = 0, 0.0, 0.0
        self.losses: list[float] = []
        self._optimizer = torch.optim.AdamW(param_groups_weight_decay(model, recipe.weight_decay), lr=recipe.lr)
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(
            self._optimizer, recipe.lr, total_steps=recipe.epochs * self._batches + 1, pct_start=0.2, div_factor=10
        )
        self._mean, self._std = _pixel_scale(model, images_BHWC.device)
        if state.exists():
            self._load_state()

    def one_epoch(self) -> None:
        """A pass over the images, then the state is saved."""
        wall, cpu = time.perf_counter(), time.process_time()
        generator = torch.Generator().manual_seed(self.epoch)
        order = torch.randperm(len(self._images), generator=generator)
        self.model.train()
        losses = [
            self._step(order[start : start + self.recipe.batch_size], generator)
            for start in range(0, self._batches * self.recipe.batch_size, self.recipe.batch_size)
        ]
        self.epoch += 1
        self.wall_seconds += time.perf_counter() - wall
        self.cpu_seconds += time.process_time() - cpu
        self.losses.append(float(np.mean(losses)))
        self._save_state()
        print(
            f"teacher: epoch {self.epoch} of {self.recipe.epochs}, loss {self.losses[-1]:.3f}, "
            f"{self.wall_seconds:.0f} s, {self.cpu_seconds:.0f} CPU seconds",
            flush=True,
        )

    def _step(self, chosen: Tensor, generator: torch.Generator) -> float:
        pixels = _shift_and_mirror(self._images[chosen.to(self._images.device)], generator)
        images = normalise(pixels, self._mean, self._std).contiguous(memory_format=torch.channels_last)
        loss = F.cross_entropy(
            self.model(images),
            self._labels[chosen.to(self._labels.device)],
            label_smoothing=self.recipe.label_smoothing,
        )
        self._optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_GRAD)
        self._optimizer.step()
        self._schedule.step()
        return loss.item()

    def _save_state(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "counters": (self.epoch, self.wall_seconds, self.cpu_seconds, self.losses),
        }
        with replacing(self.state_file) as partial:
            torch.save(state, partial)

    def _load_state(self) -> None:
        state = torch.load(self.state_file, map_location="cpu", weights_only=True)
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self.epoch, self.wall_seconds, self.cpu_seconds, self.losses = state["counters"]


def _load(tars: Sequence[str]) -> tuple[Tensor, Tensor]:
    """All images [B, H, W, C] and labels [B] of some tars."""
    samples = [tar.read(position) for tar in open_tars(tars) for position in range(len(tar))]
    pixels = np.stack([np.asarray(decode_image(sample.image)) for sample in samples])
    return torch.from_numpy(pixels), torch.tensor([sample.label for sample in samples])


def _shift_and_mirror(images_BHWC: Tensor, generator: torch.Generator) -> Tensor:
    """Each image shifted by up to PADDING pixels, half of them mirrored; the draws are the same on every device."""
    count, height, width, _ = images_BHWC.shape
    padded = F.pad(images_BHWC, (0, 0, PADDING, PADDING, PADDING, PADDING))
    top, left = (torch.randint(2 * PADDING + 1, (count, 1), generator=generator) for _ in "hw")
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    columns = left + torch.where(mirrored, torch.arange(width).flip(0), torch.arange(width))
    rows = top + torch.arange(height)
    places = (torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None])
    return padded[tuple(place.to(padded.device) for place in places)]


def _pixel_scale(model: nn.Module, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per colour on the 0..255 scale."""
    data = resolve_model_data_config(model)
    mean, std = (torch.tensor(data[name], device=device) * 255 for name in ("mean", "std"))
    return mean, std


@torch.no_grad()
def _top1(model: nn.Module, images_BHWC: Tensor, labels_B: Tensor) -> float:
    """Accuracy in percent."""
    mean, std = _pixel_scale(model, images_BHWC.device)
    right = 0
    for images, labels in zip(images_BHWC.split(500), labels_B.split(500), strict=True):
        right += int((model(normalise(images, mean, std)).argmax(1) == labels).sum())
    return 100 * right / len(labels_B)
