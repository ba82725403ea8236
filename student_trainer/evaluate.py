"""Evaluation of a student: accuracy, throughput, FLOPs."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import Sampler
from torch.utils.flop_counter import FlopCounterMode

from feature_store.errors import FailedError, InputError
from feature_store.format.addressing import RowId
from feature_store.inputs.base import SampleSource, source_notes
from feature_store.inputs.options import SourceOptions
from feature_store.tools.options import check_fields, require
from feature_store.views import view_policy
from student_trainer.data.batch import Batch, ViewDataset
from student_trainer.data.loader import BatchLoader, worker_failures_told
from student_trainer.data.replayed import DrawnViews
from student_trainer.engine.distributed import ALONE, Group
from student_trainer.inputs import class_names, open_labelled, require_all_classes, source_options
from student_trainer.plan import find_device
from student_trainer.students.load import load_student
from student_trainer.students.preprocessing import Preprocessing


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of a student on one set of images.

    Attributes:
        top1: Percent of samples whose best class is the label.
        top5: Percent whose label is among the five best classes (or all, if there are fewer).
        samples: Samples evaluated.
        unreadable: ``tar/key: reason`` of samples that could not be read; they are not in the percentages.
        per_class: Top-1 of each class, in percent of its samples; None for a class without any.
        class_samples: Samples of each class.
    """

    top1: float
    top5: float
    samples: int
    unreadable: tuple[str, ...]
    per_class: tuple[float | None, ...] = ()
    class_samples: tuple[int, ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """Accuracy and cost of a student.

    Attributes:
        accuracy: Its accuracy.
        images_per_second: Over the whole evaluation, reading and decoding included.
        forward_images_per_second: Of the forward pass alone: full batches of blank images on the device, median of
            several passes.
        flops: Floating-point operations of one image's forward pass; a multiply-add counts as two.
        parameters: Weights of the student.
        notes: Notes about the images for the user.
    """

    accuracy: Accuracy
    images_per_second: float
    forward_images_per_second: float
    flops: int
    parameters: int
    notes: tuple[str, ...] = ()


class Evaluator:
    """Evaluates models on one set of images, repeatedly with the same workers."""

    def __init__(
        self,
        tars: Sequence[SampleSource],
        preprocessing: Preprocessing,
        num_classes: int,
        *,
        batch_size: int = 256,
        workers: int = 0,
        start_method: str = "forkserver",
        device: torch.device,
        group: Group = ALONE,
    ) -> None:
        """Set up the workers.

        Args:
            tars: Images to evaluate on; every sample needs a label.
            preprocessing: Preprocessing of the model's images.
            num_classes: K; a label that reaches this is refused.
            batch_size: Samples per forward pass.
            workers: Processes that decode images; 0 decodes in this process.
            start_method: Their start method.
            device: Where models run.
            group: Processes that share the samples.
        """
        policy = view_policy(
            "center",
            preprocessing.input_size,
            crop_pct=preprocessing.crop_pct,
            interpolation=preprocessing.interpolation,
        )
        dataset = ViewDataset(tars, DrawnViews(policy), num_classes=num_classes)
        batches = _InOrder([len(tar) for tar in tars], batch_size, group)
        self._loader = BatchLoader(
            dataset, batches, workers=workers, start_method=start_method, pin=device.type == "cuda"
        )
        self._tars, self._group = tars, group
        self._normalise, self._device, self._num_classes = preprocessing.normaliser(device), device, num_classes

    def __call__(self, model: nn.Module) -> Accuracy:
        """Accuracy of a timm model, see ``unless_stopped``."""
        accuracy = self.unless_stopped(model, lambda: False)
        assert accuracy is not None  # nothing stops it
        return accuracy

    def unless_stopped(self, model: nn.Module, stop: Callable[[], bool]) -> Accuracy | None:
        """Accuracy of a timm model, in eval mode; its mode is restored.

        Every process of the group calls this and gets the same.

        Args:
            model: The model, with the same weights on every process.
            stop: Asked before every batch; True ends the evaluation on all processes.

        Returns:
            The accuracy; None if a process was told to stop.

        Raises:
            InputError: No sample could be read.
            FailedError: Logits are NaN or infinite, or none of them tells any class from another.
        """
        shares = self._group.gather(self._group.all_or_raise(lambda: self._count(model, stop)))
        if any(share is None for share in shares):
            return None
        return self._group.all_or_raise(lambda: _accuracy([share for share in shares if share is not None]))

    @torch.no_grad()
    def _count(self, model: nn.Module, stop: Callable[[], bool]) -> "_Counts | None":
        """Counts on this process's share of the samples; None if it was told to stop."""
        was_training = model.training
        model.eval()
        counts = _Counts(torch.zeros(self._num_classes, 3, dtype=torch.int64), [], self._num_classes == 1)
        try:
            with worker_failures_told():
                for batch in self._loader:
                    if stop():
                        return None
                    counts.unreadable.extend(batch.unreadable)
                    if len(batch.labels):
                        logits = model(self._normalise(batch.pixels))
                        self._require_finite(logits, batch)
                        counts.tells_apart = counts.tells_apart or bool((logits != logits[:, :1]).any())
                        counts.hits.index_add_(0, batch.labels, _hits(logits, batch.labels.to(self._device)).cpu())
        finally:
            model.train(was_training)
        return counts

    def close(self) -> None:
        """End the processes that make batches."""
        self._loader.close()

    def _require_finite(self, logits_BK: Tensor, batch: Batch) -> None:
        bad = (~logits_BK.isfinite().all(dim=1)).nonzero().flatten().tolist()
        if bad:
            row = batch.row_ids()[bad[0]]
            tar = self._tars[row.unit]
            raise FailedError(
                f"the student's logits are NaN or infinite for {len(bad)} of {len(logits_BK)} images of a batch, first "
                f"{tar.name}/{tar.keys[row.position]}: an accuracy would mean nothing; use an earlier checkpoint, or "
                "train with a lower --optim.lr"
            )


@dataclass
class _Counts:
    """Counts of an evaluation: per class samples, top-1 and top-5 hits; whether logits ever differ by class."""

    hits: Tensor  # [K, 3]
    unreadable: list[str]
    tells_apart: bool


def _accuracy(shares: Sequence[_Counts]) -> Accuracy:
    """Accuracy from the counts of all processes.

    Raises:
        InputError: No sample could be read.
        FailedError: No logits tell any class from another.
    """
    hits_KT = torch.stack([share.hits for share in shares]).sum(dim=0)
    unreadable = tuple(sorted(line for share in shares for line in share.unreadable))
    samples, top1, top5 = hits_KT.sum(0).tolist()
    if not samples:
        raise InputError(f"none of {len(unreadable)} validation images can be read, first: {unreadable[0]}")
    if not any(share.tells_apart for share in shares):
        raise FailedError(
            f"the student gives all {len(hits_KT)} classes the same logit, for each of {samples} images: an "
            "accuracy would mean nothing; look at its training loss, or use another checkpoint"
        )
    return Accuracy(
        top1=100 * top1 / samples,
        top5=100 * top5 / samples,
        samples=samples,
        unreadable=unreadable,
        per_class=tuple(100 * right / count if count else None for count, right, _ in hits_KT.tolist()),
        class_samples=tuple(hits_KT[:, 0].tolist()),
    )


def _hits(logits_BK: Tensor, labels_B: Tensor) -> Tensor:
    """Per sample: one, whether its label is the best class, and whether among the five best; int64 [B, 3]."""
    best = logits_BK.topk(min(5, logits_BK.shape[1])).indices == labels_B[:, None]
    return torch.stack([torch.ones_like(labels_B), best[:, 0].long(), best.any(dim=1).long()], dim=1)


class _InOrder(Sampler[list[RowId]]):
    """A process's share of all rows of all units, view 0, in batches; the last may be smaller."""

    def __init__(self, samples: Sequence[int], batch_size: int, group: Group) -> None:
        rows = [RowId(unit, position, 0) for unit, count in enumerate(samples) for position in range(count)]
        self._rows, self._batch_size = rows[group.rank :: group.size], batch_size

    def __iter__(self) -> Iterator[list[RowId]]:
        for start in range(0, len(self._rows), self._batch_size):
            yield self._rows[start : start + self._batch_size]


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(SourceOptions):
    """Accuracy of a trained student.

    Attributes:
        run: Folder of the training run; its best.safetensors is used, or last.pt if nothing was validated.
        checkpoint: One file instead of a run: best.safetensors, or a checkpoint.
        tars: Images to evaluate on: tars (paths, brace patterns, URLs), a class-per-folder tree, or parquet files.
        crop_pct: Part of the shorter side the centre crop keeps; default as in training.
        batch_size: Samples per forward pass.
        workers: Processes that decode images; 0 decodes in this process.
        device: Where the student runs, e.g. cuda:1; auto takes a GPU if there is one.
    """

    tars: tuple[str, ...]
    run: Path | None = None
    checkpoint: Path | None = None
    crop_pct: float | None = None
    batch_size: int = 256
    workers: int = 4
    device: str = "auto"

    def __post_init__(self) -> None:
        """Refuse values no evaluation could use.

        Raises:
            InputError: Names the option, the value and what is accepted.
        """
        check_fields(self)
        super().__post_init__()
        require(self.labels == "required", "--labels", self.labels, "required: accuracy is counted on labelled samples")
        if (self.run is None) == (self.checkpoint is None):
            raise InputError("give either --run or --checkpoint")
        require(self.batch_size >= 1, "--batch-size", self.batch_size, "at least 1")
        require(self.workers >= 0, "--workers", self.workers, "0 or more")
        require(self.crop_pct is None or 0 < self.crop_pct <= 1, "--crop-pct", self.crop_pct, "above 0, at most 1")


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Accuracy of a run's student on a set of images, and its cost.

    Raises:
        InputError: No checkpoint, no readable sample, or a label out of range.
        FailedError: The student's weights or logits are not finite, or its logits all equal.
    """
    source = config.run or config.checkpoint
    assert source is not None  # EvaluateConfig saw to it
    trained = load_student(source)
    device = find_device(config.device)
    preprocessing = trained.preprocessing
    if config.crop_pct is not None:
        preprocessing = replace(preprocessing, crop_pct=config.crop_pct)
    options = source_options(config)
    classes = class_names(options, trained.classes, f"the training of {source}")
    tars, unknown = open_labelled(config.tars, options, classes)
    require_all_classes(unknown, trained.num_classes, "--tars")
    evaluator = Evaluator(
        tars,
        preprocessing,
        trained.num_classes,
        batch_size=config.batch_size,
        workers=config.workers,
        device=device,
    )
    model = trained.student.model.to(device)
    begun = time.perf_counter()
    accuracy = evaluator(model)
    seconds = time.perf_counter() - begun
    images = min(config.batch_size, accuracy.samples)
    images_BCHW = torch.zeros(images, 3, *preprocessing.input_size, device=device)
    return Evaluation(
        accuracy=accuracy,
        images_per_second=accuracy.samples / seconds,
        forward_images_per_second=forward_speed(model, images_BCHW),
        flops=count_flops(model, images_BCHW[:1]),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        notes=tuple(source_notes(tars)),
    )


@torch.no_grad()
def count_flops(model: nn.Module, images_BCHW: Tensor) -> int:
    """Floating-point operations of one forward pass in eval mode, multiply-adds as two; element-wise ones left out.

    Attention is run as plain matrix products: torch's counter does not know the fused kernel of CPUs.
    """
    was_training = model.training
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.eval()(images_BCHW)
    model.train(was_training)
    return counter.get_total_flops()


@torch.no_grad()
def forward_speed(model: nn.Module, images_BCHW: Tensor, passes: int = 5) -> float:
    """Images per second of the forward pass in eval mode: median of several passes, after one to warm up."""
    was_training = model.training
    model.eval()
    seconds = [_timed_pass(model, images_BCHW) for _ in range(1 + passes)]
    model.train(was_training)
    return len(images_BCHW) / median(seconds[1:])


def _timed_pass(model: nn.Module, images_BCHW: Tensor) -> float:
    begun = time.perf_counter()
    model(images_BCHW)
    if images_BCHW.is_cuda:
        torch.cuda.synchronize(images_BCHW.device)
    return time.perf_counter() - begun
