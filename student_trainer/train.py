"""The training loop: source and tars -> student -> the method's loss -> step."""

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from timm.optim import create_optimizer_v2  # pyright: ignore[reportPrivateImportUsage]
from timm.scheduler.scheduler import Scheduler
from timm.scheduler.scheduler_factory import create_scheduler_v2
from torch import Tensor
from torch.optim import Optimizer

from feature_store.errors import InputError, UserError
from student_trainer.assemble import Parts, Trainee, assemble
from student_trainer.checkpoint import Checkpoint, Progress, one_line, rng_state, save_checkpoint, set_rng_state
from student_trainer.config import OptimConfig, TrainConfig
from student_trainer.data import Batch, BatchLoader, open_tars
from student_trainer.evaluate import Evaluator
from student_trainer.metrics import Means, MetricsLog, Pace, read_metrics
from student_trainer.progress import RunProgress
from student_trainer.runs import RunFolder
from student_trainer.tasks import TASK_LOSSES
from student_trainer.trained import describe_student

T = TypeVar("T")


@dataclass(frozen=True)
class TrainResult:
    """What a run gave.

    Attributes:
        run: Its folder.
        best_top1: Best validation accuracy, in percent; None without validation.
        last_top1: Accuracy of the last validation, in percent; None without validation.
        steps: Optimizer steps done in all.
        seconds_per_step: Median over this process's steps, waiting for data included; None if it made none.
        teacher_seconds: Time spent in a live teacher, in all; 0 with a store.
        history: The epoch lines of metrics.jsonl.
    """

    run: Path
    best_top1: float | None
    last_top1: float | None
    steps: int
    seconds_per_step: float | None
    teacher_seconds: float
    history: tuple[dict[str, Any], ...]


def train(config: TrainConfig) -> TrainResult:
    """Train a student, or go on with a run that stopped.

    Raises:
        UserError: Things that do not fit together, data other than the store was made from, a loss that is not
            finite; the message says what to do.
    """
    val_tars = open_tars(config.val_tars, config.scratch) if config.val_tars else []
    parts = assemble(config, val_tars)
    trainer = Trainer(config, parts)
    folder = RunFolder.open(config, parts.inputs, parts.resolved())
    checkpoint = folder.rewind()
    if checkpoint is not None:
        trainer.restore(checkpoint)
    with MetricsLog(folder.metrics) as log:
        trainer.run(folder, log)
    return trainer.result(folder)


class Trainer:
    """A run in memory: parts, optimizer, and how far it is."""

    def __init__(self, config: TrainConfig, parts: Parts) -> None:
        self.config, self.parts, self.progress, self.pace = config, parts, Progress(), Pace()
        self.student, self.loss = parts.trainee.student, parts.trainee.loss
        self.optimizer = make_optimizer(config.optim, parts.trainee)
        self.scheduler = make_scheduler(config, self.optimizer, parts.batches.per_epoch)
        self._normalise = parts.preprocessing.normaliser(parts.device)
        workers = {"workers": config.workers, "start_method": config.start_method}
        self._loader = BatchLoader(parts.dataset, parts.batches, pin=parts.device.type == "cuda", **workers)
        self._evaluate = (
            Evaluator(parts.val_tars, parts.preprocessing, self.student.num_classes,
                      batch_size=config.batch_size, device=parts.device, **workers)
            if parts.val_tars else None
        )  # fmt: skip

    def run(self, folder: RunFolder, log: MetricsLog) -> None:
        """All epochs that are left."""
        config, batches = self.config, self.parts.batches
        log.write("start", self.progress.step, **self.parts.summary())
        total = config.epochs * batches.per_epoch
        with RunProgress(enabled=config.progress, total=total, done=self.progress.step) as bar:
            bar.note(f"{config.run}: {self.parts.sentence()}")
            while self.progress.epoch < config.epochs:
                means = self._epoch(folder, log, bar)
                self._end_epoch(means, folder, log, bar)

    def _epoch(self, folder: RunFolder, log: MetricsLog, bar: RunProgress) -> Means:
        """What is left of the epoch in progress."""
        means = Means(self.progress.means)
        self.parts.batches.start(self.progress.epoch, self.progress.batch)
        self.parts.trainee.train()
        for batch, waited in _timed(self._loader):
            begun, lr = time.perf_counter(), self.optimizer.param_groups[0]["lr"]
            terms = self.step(batch)
            means.add(terms)
            self._advance(means)
            self.pace.add(len(batch.labels), waited, time.perf_counter() - begun)
            self._report(batch, terms, lr, log, bar)
            if self._saves_now():
                save_checkpoint(folder.last, self.checkpoint())
        return means

    def _report(self, batch: Batch, terms: dict[str, float], lr: float, log: MetricsLog, bar: RunProgress) -> None:
        epoch, step = self.progress.epoch, self.progress.step
        bar.step(epoch, self.config.epochs, terms["total"])
        if batch.unreadable:
            log.write("unreadable", step, epoch=epoch, samples=batch.unreadable)
            bar.note(f"left out, unreadable: {'; '.join(batch.unreadable)}")
        if step % self.config.log_every == 0:
            log.write("step", step, epoch=epoch, lr=lr, **terms, **self.pace.since_last())

    def _saves_now(self) -> bool:
        """Whether a checkpoint is due inside the epoch; its end has its own."""
        every = self.config.checkpoint_every
        return every > 0 and self.progress.step % every == 0 and self.progress.batch < self.parts.batches.per_epoch

    def step(self, batch: Batch) -> dict[str, float]:
        """One optimizer step: forward, loss, backward, update. Returns every loss term.

        Raises:
            InputError: None of the batch's images can be read.
            UserError: The loss is not finite; nothing was updated.
        """
        if not len(batch.labels):
            raise InputError(f"no image of a batch can be read: {'; '.join(batch.unreadable[:3])}; mend the tars")
        terms = self.losses(batch)
        values = dict(zip(terms, torch.stack([term.detach().float() for term in terms.values()]).tolist(), strict=True))
        self._require_finite(values, batch)
        self.optimizer.zero_grad(set_to_none=True)
        terms["total"].backward()
        if self.config.optim.clip_grad is not None:
            torch.nn.utils.clip_grad_norm_(self.parts.trainee.parameters(), self.config.optim.clip_grad)
        self.optimizer.step()
        self.scheduler.step_update(self.progress.step + 1)
        return values

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Every term of the method's loss for a batch, ``total`` being their sum."""
        config, device = self.config, self.parts.device
        taps, teacher_logits = self._teacher_features(batch)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.amp == "bfloat16"):
            output = self.student(self._normalise(batch.pixels))
            task = TASK_LOSSES[config.task](output.logits, batch.labels.to(device), config.label_smoothing)
            return self.loss(
                output.maps, output.logits, taps.get("stage4"), teacher_logits, task, taps.get("stage3_prefix")
            )

    def _teacher_features(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor | None]:
        """Taps and logits on the device in float32: from the batch, or from the live teacher."""
        device, live = self.parts.device, self.parts.live
        taps, logits = batch.taps, batch.logits
        if live is not None:
            features = live.read(batch.row_ids(), self.parts.taps, pixels=batch.pixels.numpy())
            taps = {name: torch.from_numpy(tap) for name, tap in features.taps.items()}
            logits = None if features.logits is None else torch.from_numpy(features.logits)
        moved = {name: tap.to(device, non_blocking=True).float() for name, tap in taps.items()}
        return moved, None if logits is None else logits.to(device, non_blocking=True).float()

    def _require_finite(self, values: dict[str, float], batch: Batch) -> None:
        if all(map(math.isfinite, values.values())):
            return
        terms = ", ".join(f"{name} {value:g}" for name, value in values.items())
        rows = ", ".join(f"unit {row.unit} position {row.position} view {row.view}" for row in batch.row_ids()[:4])
        raise UserError(
            f"the loss is not finite at step {self.progress.step} (epoch {self.progress.epoch}): {terms}; first rows "
            f"of the batch: {rows}; lower --optim.lr, set --optim.clip-grad, or use --amp off"
        )

    def _advance(self, means: Means) -> None:
        live = self.parts.live
        self.progress = replace(
            self.progress,
            batch=self.progress.batch + 1,
            step=self.progress.step + 1,
            means=means.state_dict(),
            teacher_seconds=0.0 if live is None else live.seconds,
        )

    def _end_epoch(self, means: Means, folder: RunFolder, log: MetricsLog, bar: RunProgress) -> None:
        """Validate, log, and save: best first, so that a crash between the two repeats the epoch's end."""
        epoch, values = self.progress.epoch, dict[str, Any](means.means())
        best, improved = self.progress.best_top1, False
        if self._evaluate is not None and self._validates(epoch):
            accuracy = self._evaluate(self.student.model)
            values |= {"top1": accuracy.top1, "top5": accuracy.top5, "val_samples": accuracy.samples}
            values |= {"val_unreadable": list(accuracy.unreadable)}
            improved = best is None or accuracy.top1 > best
            best = accuracy.top1 if improved else best
        log.write("epoch", self.progress.step, epoch=epoch, **values, teacher_seconds=self.progress.teacher_seconds,
                  seconds_per_step=self.pace.median())  # fmt: skip
        bar.note(_epoch_line(epoch, self.config.epochs, values))
        self.progress = replace(self.progress, epoch=epoch + 1, batch=0, means=None, best_top1=best)
        if improved:
            save_checkpoint(folder.best, self.checkpoint())
        save_checkpoint(folder.last, self.checkpoint())

    def _validates(self, epoch: int) -> bool:
        return (epoch + 1) % self.config.val_every == 0 or epoch + 1 == self.config.epochs

    def checkpoint(self) -> Checkpoint:
        """The run as it is now."""
        return Checkpoint(
            student=describe_student(self.student, self.parts.preprocessing),
            weights=self.student.model.state_dict(),
            loss=self.loss.state_dict(),
            optimizer=self.optimizer.state_dict(),
            progress=self.progress,
            rng=rng_state(),
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to a checkpoint of the same config.

        Raises:
            InputError: Its tensors do not fit, after a change of timm or of this package.
        """
        try:
            self.student.model.load_state_dict(checkpoint.weights)
            self.loss.load_state_dict(checkpoint.loss)
            self.optimizer.load_state_dict(checkpoint.optimizer)
        except (RuntimeError, ValueError) as error:
            raise InputError(
                f"the checkpoint does not fit the run: {one_line(error)}; resume with the versions in its config.json"
            ) from error
        self.progress = checkpoint.progress
        if self.parts.live is not None:
            self.parts.live.seconds = checkpoint.progress.teacher_seconds
        set_rng_state(checkpoint.rng)

    def result(self, folder: RunFolder) -> TrainResult:
        """What the run gave so far."""
        history = tuple(line for line in read_metrics(folder.metrics) if line["kind"] == "epoch")
        validated = [line["top1"] for line in history if "top1" in line]
        return TrainResult(
            run=folder.path,
            best_top1=self.progress.best_top1,
            last_top1=validated[-1] if validated else None,
            steps=self.progress.step,
            seconds_per_step=self.pace.median(),
            teacher_seconds=self.progress.teacher_seconds,
            history=history,
        )


def make_optimizer(config: OptimConfig, trainee: Trainee) -> Optimizer:
    """A timm optimizer over student and projectors.

    Raises:
        InputError: timm knows no such optimizer.
    """
    try:
        return create_optimizer_v2(
            trainee.parameters() if config.decay_all else trainee,  # timm spares some only of a module
            opt=config.opt,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
        )
    except (ValueError, TypeError, AssertionError) as error:
        raise InputError(
            f"--optim.opt {config.opt!r} cannot be used: {error}; see timm.optim.list_optimizers()"
        ) from error


def make_scheduler(config: TrainConfig, optimizer: Optimizer, steps_per_epoch: int) -> Scheduler:
    """The learning rate as a function of the step."""
    optim = config.optim
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=optim.sched,
        num_epochs=config.epochs,
        decay_epochs=optim.decay_epochs,
        decay_rate=optim.decay_rate,
        min_lr=optim.min_lr,
        warmup_lr=optim.warmup_lr,
        warmup_epochs=optim.warmup_epochs,  # pyright: ignore[reportArgumentType] - parts of an epoch are fine
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )
    assert scheduler is not None  # only for sched "none"
    return scheduler


def _timed(items: Iterable[T]) -> Iterator[tuple[T, float]]:
    """Each item, with the seconds waited for it."""
    iterator = iter(items)
    while True:
        begun = time.perf_counter()
        try:
            item = next(iterator)
        except StopIteration:
            return
        yield item, time.perf_counter() - begun


def _epoch_line(epoch: int, epochs: int, values: dict[str, Any]) -> str:
    accuracy = f", top-1 {values['top1']:.2f} %" if "top1" in values else ""
    unreadable = f", {len(values['val_unreadable'])} unreadable" if values.get("val_unreadable") else ""
    return f"epoch {epoch + 1}/{epochs}: loss {values['total']:.4f}{accuracy}{unreadable}"
