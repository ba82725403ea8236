"""Top-1 and top-5 accuracy of a student on a tar set."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler

from feature_store.errors import InputError
from feature_store.sample import RowId
from feature_store.tars import Tar
from feature_store.views import view_policy
from student_trainer.assemble import find_device
from student_trainer.config import require
from student_trainer.data import BatchLoader, ViewDataset, open_tars
from student_trainer.replay import DrawnViews
from student_trainer.trained import Preprocessing, load_student


@dataclass(frozen=True)
class Accuracy:
    """What an evaluation found.

    Attributes:
        top1: Percent of samples whose best class is the label.
        top5: Percent whose label is among the five best classes (or all, if there are fewer).
        samples: Samples evaluated.
        unreadable: ``tar/key: reason`` of samples that could not be read; they are not in the percentages.
    """

    top1: float
    top5: float
    samples: int
    unreadable: tuple[str, ...]


class Evaluator:
    """Evaluates models on one tar set, again and again with the same workers."""

    def __init__(
        self,
        tars: Sequence[Tar],
        preprocessing: Preprocessing,
        num_classes: int,
        *,
        batch_size: int = 256,
        workers: int = 0,
        start_method: str = "forkserver",
        device: torch.device,
    ) -> None:
        policy = view_policy(
            "center",
            preprocessing.input_size,
            crop_pct=preprocessing.crop_pct,
            interpolation=preprocessing.interpolation,
        )
        dataset = ViewDataset(tars, DrawnViews(policy), num_classes=num_classes)
        batches = _InOrder([len(tar) for tar in tars], batch_size)
        self._loader = BatchLoader(
            dataset, batches, workers=workers, start_method=start_method, pin=device.type == "cuda"
        )
        self._normalise, self._device = preprocessing.normaliser(device), device

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> Accuracy:
        """Accuracy of a timm model, in eval mode; its mode is restored.

        Raises:
            InputError: No sample could be read.
        """
        was_training = model.training
        model.eval()
        hits, samples, unreadable = torch.zeros(2, dtype=torch.int64), 0, []
        for batch in self._loader:
            unreadable += batch.unreadable
            if len(batch.labels):
                logits = model(self._normalise(batch.pixels))
                hits += _hits(logits, batch.labels.to(self._device)).cpu()
                samples += len(batch.labels)
        model.train(was_training)
        if not samples:
            raise InputError(f"none of {len(unreadable)} validation images can be read, first: {unreadable[0]}")
        top1, top5 = (100 * hits / samples).tolist()
        return Accuracy(top1, top5, samples, tuple(unreadable))


def _hits(logits_BK: Tensor, labels_B: Tensor) -> Tensor:
    """Samples whose label is the best class, and those with it among the five best: int64 [2]."""
    best = logits_BK.topk(min(5, logits_BK.shape[1])).indices == labels_B[:, None]
    return torch.stack([best[:, :1].sum(), best.sum()])


class _InOrder(Sampler[list[RowId]]):
    """All rows of all units in order, view 0, in batches; the last may be smaller."""

    def __init__(self, samples: Sequence[int], batch_size: int) -> None:
        self._rows = [RowId(unit, position, 0) for unit, count in enumerate(samples) for position in range(count)]
        self._batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self._rows) // self._batch_size)

    def __iter__(self) -> Iterator[list[RowId]]:
        for start in range(0, len(self._rows), self._batch_size):
            yield self._rows[start : start + self._batch_size]


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Accuracy of a trained student.

    Attributes:
        run: Folder of the training run; its best.pt is used, or last.pt if nothing was validated.
        checkpoint: One checkpoint file instead of a run.
        tars: Tars to evaluate on: paths, brace patterns, URLs.
        crop_pct: Part of the shorter side the centre crop keeps; default as in training.
        batch_size: Samples per forward pass.
        workers: Processes that decode images; 0 decodes in this process.
        device: Where the student runs, e.g. cuda:1; auto takes a GPU if there is one.
        scratch: Where compressed and remote tars are unpacked; default the system's temporary folder.
    """

    tars: tuple[str, ...]
    run: Path | None = None
    checkpoint: Path | None = None
    crop_pct: float | None = None
    batch_size: int = 256
    workers: int = 4
    device: str = "auto"
    scratch: Path | None = None

    def __post_init__(self) -> None:
        """Refuse values no evaluation could use.

        Raises:
            InputError: Names the option, the value and what is accepted.
        """
        if (self.run is None) == (self.checkpoint is None):
            raise InputError("give either --run or --checkpoint")
        require(self.batch_size >= 1, "--batch-size", self.batch_size, "at least 1")
        require(self.workers >= 0, "--workers", self.workers, "0 or more")
        require(self.crop_pct is None or 0 < self.crop_pct <= 1, "--crop-pct", self.crop_pct, "above 0, at most 1")


def evaluate(config: EvaluateConfig) -> Accuracy:
    """Accuracy of a run's student on a tar set.

    Raises:
        InputError: No checkpoint, no readable sample, or a label out of range.
    """
    source = config.run or config.checkpoint
    assert source is not None  # EvaluateConfig saw to it
    trained = load_student(source)
    device = find_device(config.device)
    preprocessing = trained.preprocessing
    if config.crop_pct is not None:
        preprocessing = replace(preprocessing, crop_pct=config.crop_pct)
    evaluator = Evaluator(
        open_tars(config.tars, config.scratch),
        preprocessing,
        trained.num_classes,
        batch_size=config.batch_size,
        workers=config.workers,
        device=device,
    )
    return evaluator(trained.student.model.to(device))
