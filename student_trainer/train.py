"""The training loop: source and tars -> student -> the method's loss -> step."""

import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from feature_store.errors import InputError, ResourceError, UserError, one_line
from feature_store.inputs.tar import Tar, open_tars
from feature_store.tools.terminal import say
from student_trainer.config import TrainConfig
from student_trainer.data.batch import Batch
from student_trainer.data.labels import require_labels
from student_trainer.data.loader import BatchLoader, worker_failures_told
from student_trainer.engine.checkpoint import Checkpoint, Progress, rng_state, save_checkpoint, set_rng_state
from student_trainer.engine.determinism import repeatable
from student_trainer.engine.distributed import Group, data_parallel, gradients_shared, is_main_process, joined
from student_trainer.engine.loggers import TrackedLog, open_log, require_trackers
from student_trainer.engine.metrics import Means, MetricsLog, Pace, peak_memory, read_metrics
from student_trainer.engine.optimizer import Updates
from student_trainer.engine.progress import RunProgress
from student_trainer.engine.run_folder import RunFolder, reserved
from student_trainer.engine.stopping import Stop, Stopped, stop_on_signals
from student_trainer.evaluate import Accuracy, Evaluator
from student_trainer.plan import Parts, assemble
from student_trainer.reports.run import write_run_report
from student_trainer.students.load import describe_student
from student_trainer.trainee import ForwardPass

T = TypeVar("T")
AMP_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


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

    Under torchrun every process calls this with the same config. The main one writes and validates; the run's folder
    must be one that all of them see.

    Raises:
        UserError: Things that do not fit together, data other than the store was made from, a loss that is not
            finite; the message says what to do.
    """
    with stop_on_signals() as stop, ExitStack() as held:
        try:
            group = held.enter_context(joined(config.device))
            held.enter_context(repeatable(enabled=config.deterministic))
            with _machine_failures_told(stop):
                return _train(config, group, stop, held)
        except Stopped as stopped:
            if is_main_process():
                say(f"student-trainer: {stopped}", error=True)
            raise


def _train(config: TrainConfig, group: Group, stop: Stop, held: ExitStack) -> TrainResult:
    group.from_main(lambda: held.enter_context(reserved(config.run)))
    trainer = group.together(lambda: _prepare(config, group, stop))
    folder = group.from_main(lambda: RunFolder.open(config, trainer.parts.inputs, trainer.parts.resolved()))
    checkpoint = group.together(folder.saved)
    group.from_main(lambda: folder.rewind(checkpoint))
    if checkpoint is not None:
        group.together(lambda: trainer.restore(checkpoint))
    with closing(trainer), _log(config, folder, trainer) as log:
        trainer.run(folder, log)
    group.from_main(lambda: folder.finish(trainer.progress))
    stop.note = "stopped after the last step; --resume writes the report"
    if config.report:
        group.from_main(lambda: write_run_report(folder.path))
    return group.from_main(lambda: trainer.result(folder))


def _prepare(config: TrainConfig, group: Group, stop: Stop) -> "Trainer":
    require_trackers(config)
    val_tars = open_tars(config.val_tars, config) if config.val_tars else []
    parts = assemble(config, val_tars, group)
    if group.is_main:
        num_classes = parts.trainee.student.num_classes
        require_labels(val_tars, num_classes, "--val-tars")
        if not config.has_store:  # whose labels are checked already
            tars = [tar for tar in parts.dataset.tars if isinstance(tar, Tar)]
            require_labels(tars, num_classes, "--tars", parts.batches.units)
    return Trainer(config, parts, stop)


@contextmanager
def _machine_failures_told(stop: Stop) -> Iterator[None]:
    """Within: what torch raises when memory runs out, or another process ends, becomes a user's error."""
    try:
        with worker_failures_told():
            yield
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"the GPU's memory is full: {one_line(error)}; start a run with a larger --accumulate, --amp bfloat16 or "
            "--scalekd.checkpoint-later-blocks"
        ) from error
    except RuntimeError as error:
        if "gloo/transport" not in str(error):  # a connection that was closed, reset or broken
            raise
        stop.check()  # the others got the signal too
        raise ResourceError("another process of the run ended; its own message says why") from error


def _log(config: TrainConfig, folder: RunFolder, trainer: "Trainer") -> TrackedLog:
    if trainer.group.is_main:
        return open_log(config, folder.metrics, trainer.progress.step)
    return TrackedLog(MetricsLog(Path(os.devnull)), ())


class Trainer:
    """A run in memory: parts, updates, and how far it is."""

    def __init__(self, config: TrainConfig, parts: Parts, stop: Stop | None = None) -> None:
        self.config, self.parts, self.progress, self.pace = config, parts, Progress(), Pace()
        self._stop, self._told_to_stop = stop or Stop(), False
        self.student, self.loss, self.group = parts.trainee.student, parts.trainee.loss, parts.group
        self.updates = Updates(config, parts.trainee, parts.batches.per_epoch, parts.device)
        self.optimizer = self.updates.optimizer
        self._forward: nn.Module = ForwardPass(parts.trainee)
        if config.compile:
            self._forward.compile()
        if not parts.group.is_main:  # own random numbers for drop path and dropout
            torch.manual_seed((config.seed + parts.group.rank) % 2**64)
        self._normalise = parts.preprocessing.normaliser(parts.device)
        workers = {"workers": config.workers, "start_method": config.start_method}
        self._loader = BatchLoader(parts.dataset, parts.batches, pin=parts.device.type == "cuda", **workers)
        self._evaluate = (
            Evaluator(parts.val_tars, parts.preprocessing, self.student.num_classes,
                      batch_size=parts.batches.rows_per_pass, device=parts.device, **workers)
            if parts.val_tars and parts.group.is_main else None
        )  # fmt: skip

    def run(self, folder: RunFolder, log: TrackedLog) -> None:
        """All epochs that are left.

        Raises:
            Stopped: A signal came; the run was saved after its last whole step.
        """
        config, batches = self.config, self.parts.batches
        self._forward = data_parallel(self._forward, self.group)
        if self.progress.epoch < config.epochs:
            self.group.from_main(lambda: folder.require_room(self._checkpoint_bytes()))
        log.write("start", self.progress.step, **self.parts.summary())
        total = config.epochs * batches.per_epoch
        self._stop.raises = self.group.size == 1
        with RunProgress(enabled=config.progress and self.group.is_main, total=total, done=self.progress.step) as bar:
            for line in (f"{config.run}: {self.parts.sentence()}", *self.parts.notes()):
                bar.note(line)
            try:
                while self.progress.epoch < config.epochs:
                    means = self._epoch(folder, log, bar)
                    self._end_epoch(means, folder, log, bar)
            except Stopped as stopped:
                self._write(folder.last)
                at = f"epoch {min(self.progress.epoch + 1, config.epochs)} step {self.progress.step}"
                raise Stopped(stopped.signal, f"stopped at {at}, saved; continue with --resume") from None

    def close(self) -> None:
        """End the processes that make batches."""
        self._loader.close()
        if self._evaluate is not None:
            self._evaluate.close()

    def _epoch(self, folder: RunFolder, log: TrackedLog, bar: RunProgress) -> Means:
        """What is left of the epoch in progress."""
        means = Means(self.progress.means)
        self.parts.batches.start(self.progress.epoch, self.progress.batch)
        self.parts.trainee.train()
        for pieces, waited in _timed(_in_groups(self._loader, self.config.accumulate)):
            with self._stop.held():
                begun, lr = time.perf_counter(), self.updates.lr
                terms = self.step(*pieces)
                means.add(terms)
                self._advance(means)
                images = self.group.size * sum(len(batch.labels) for batch in pieces)
                self.pace.add(images, waited, time.perf_counter() - begun)
                self._report(pieces, terms, lr, log, bar)
                if self._saves_now():
                    self._write(folder.last)
            if self._told_to_stop:
                raise self._stop.now()
        return means

    def _save(self, *paths: Path) -> None:
        """Write the run as it is now; a signal waits until that is done."""
        with self._stop.held():
            self._write(*paths)

    def _write(self, *paths: Path) -> None:
        """Write the run; of several processes, the main one does."""
        self._require_finite_weights()
        for path in paths:
            checkpoint = self.checkpoint()
            if self.group.is_main:
                save_checkpoint(path, checkpoint)

    def _require_finite_weights(self) -> None:
        """Keep the checkpoint there is from being replaced by weights that nothing can be learned with any more."""
        if all(weights.isfinite().all() for weights in self.parts.trainee.parameters()):
            return
        if not self.group.is_main:  # whose weights are the same
            raise SystemExit(UserError.exit_code)
        raise UserError(
            f"weights are not finite after step {self.progress.step}: not saved, the checkpoint before this one stays; "
            "lower --optim.lr, set --optim.clip-grad, or use --amp off, in a new run"
        )

    def _checkpoint_bytes(self) -> int:
        return sum(weights.nbytes for weights in self.parts.trainee.parameters()) + self.updates.state_bytes()

    def _report(
        self, pieces: Sequence[Batch], terms: dict[str, float], lr: float, log: TrackedLog, bar: RunProgress
    ) -> None:
        epoch, step = self.progress.epoch, self.progress.step
        bar.step(epoch, self.config.epochs, terms["total"])
        if unreadable := self._unreadable(pieces):
            log.write("unreadable", step, epoch=epoch, samples=unreadable)
            bar.note(f"left out, unreadable: {'; '.join(unreadable)}")
        if step % self.config.log_every == 0:
            memory = peak_memory(self.parts.device)
            log.write("step", step, epoch=epoch, lr=lr, **terms, **self.pace.since_last(), memory=memory)

    def _saves_now(self) -> bool:
        """Whether a checkpoint is due inside the epoch; its end has its own."""
        every = self.config.checkpoint_every
        return every > 0 and self.progress.step % every == 0 and self.progress.batch < self.parts.batches.per_epoch

    def _unreadable(self, pieces: Sequence[Batch]) -> list[str]:
        own = [line for batch in pieces for line in batch.unreadable]
        if not self.parts.dataset.views.skips_unreadable:
            return own  # none: replayed samples must be readable, so there is nothing to ask the others
        return [line for lines in self.group.gather(own) for line in lines]

    def step(self, *pieces: Batch) -> dict[str, float]:
        """One optimizer step: forward, loss and backward of every piece of this process's batch, then the update.

        Returns:
            Every loss term, its mean over pieces and processes.

        Raises:
            InputError: None of a piece's images can be read.
            UserError: The loss is not finite; nothing was updated.
        """
        values: list[dict[str, float]] = []
        for batch in pieces:
            if not len(batch.labels):
                raise InputError(f"no image of a batch can be read: {'; '.join(batch.unreadable[:3])}; fix the tars")
            with gradients_shared(self._forward, now=batch is pieces[-1]):
                terms = self.losses(batch)
                values.append(self._values(terms, batch))
                self.updates.backward(terms["total"] / len(pieces))
        self.updates.apply(self.progress.step + 1)
        return {name: sum(piece[name] for piece in values) / len(pieces) for name in values[0]}

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Every term of the method's loss for a batch, ``total`` being their sum."""
        device = self.parts.device
        taps, teacher_logits = self._teacher_features(batch)
        images, labels = self._normalise(batch.pixels), batch.labels.to(device, non_blocking=True)
        with torch.autocast(device.type, AMP_DTYPES.get(self.config.amp), enabled=self.config.amp in AMP_DTYPES):
            return self._forward(images, labels, taps, teacher_logits)

    def _values(self, terms: dict[str, Tensor], batch: Batch) -> dict[str, float]:
        """The terms as numbers, their mean over processes."""
        own = torch.stack([term.detach().float() for term in terms.values()])
        told = own.new_tensor([float(self._stop.signal is not None)])  # with them, so that all stop after one step
        *means, told = self.group.mean(torch.cat([own, told])).tolist()
        self._told_to_stop = told > 0
        values = dict(zip(terms, means, strict=True))
        if not all(map(math.isfinite, values.values())):
            self._stop_at(dict(zip(terms, own.tolist(), strict=True)), batch)
        return values

    def _teacher_features(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor | None]:
        """Taps and logits on the device in float32: from the batch, or from the live teacher."""
        device, live, logits = self.parts.device, self.parts.live, batch.logits
        if live is None:
            taps = {name: self._decoded(name, parts) for name, parts in batch.taps.items()}
        else:
            features = live.read(batch.row_ids(), self.parts.taps, pixels=batch.pixels.numpy())
            taps = {name: torch.from_numpy(tap).to(device).float() for name, tap in features.taps.items()}
            logits = None if features.logits is None else torch.from_numpy(features.logits)
        return taps, None if logits is None else logits.to(device, non_blocking=True).float()

    def _decoded(self, tap: str, parts: dict[str, Tensor]) -> Tensor:
        decoder = self.parts.decoders.get(tap)
        if decoder is None:
            return parts[""].to(self.parts.device, non_blocking=True).float()
        return decoder(parts, self.parts.device)

    def _stop_at(self, values: dict[str, float], batch: Batch) -> NoReturn:
        """End the run, naming the rows of the first process whose loss is not finite."""
        everyone = self.group.gather((values, batch.row_ids()[:4]))
        values, first_rows = next(((v, r) for v, r in everyone if not all(map(math.isfinite, v.values()))), everyone[0])
        terms = ", ".join(f"{name} {value:g}" for name, value in values.items())
        rows = ", ".join(f"unit {row.unit} position {row.position} view {row.view}" for row in first_rows)
        if not self.group.is_main:
            raise SystemExit(UserError.exit_code)
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

    def _end_epoch(self, means: Means, folder: RunFolder, log: TrackedLog, bar: RunProgress) -> None:
        """Validate, log, and save: best first, so that a crash between the two repeats the epoch's end."""
        epoch, values = self.progress.epoch, dict[str, Any](means.means())
        best, improved = self.progress.best_top1, False
        if self._validates(epoch):
            self._save(folder.last)  # validation can fail, or be stopped, and the epoch's work must not be lost
            accuracy = self.group.from_main(self._accuracy)
            if accuracy is None:
                raise self._stop.now()
            values |= {"top1": accuracy.top1, "top5": accuracy.top5, "val_samples": accuracy.samples}
            values |= {"val_unreadable": list(accuracy.unreadable)}
            improved = best is None or accuracy.top1 > best
            best = accuracy.top1 if improved else best
        log.write("epoch", self.progress.step, epoch=epoch, **values, teacher_seconds=self.progress.teacher_seconds,
                  seconds_per_step=self.pace.median())  # fmt: skip
        bar.note(_epoch_line(epoch, self.config.epochs, values))
        self.progress = replace(self.progress, epoch=epoch + 1, batch=0, means=None, best_top1=best)
        self._save(*([folder.best] if improved else []), folder.last)

    def _validates(self, epoch: int) -> bool:
        due = (epoch + 1) % self.config.val_every == 0 or epoch + 1 == self.config.epochs
        return due and bool(self.config.val_tars)

    def _accuracy(self) -> Accuracy | None:
        """None if a signal came meanwhile."""
        assert self._evaluate is not None  # the main process has one if there are validation tars
        try:
            with self._stop.at_once():
                return self._evaluate(self.updates.validated)
        except Stopped:
            return None

    def checkpoint(self) -> Checkpoint:
        """The run as it is now."""
        return Checkpoint(
            student=describe_student(self.student, self.parts.preprocessing),
            weights=self.student.model.state_dict(),
            loss=self.loss.state_dict(),
            progress=self.progress,
            rng=self.group.gather(rng_state()),
            ema_eval=self.config.ema_eval,
            **self.updates.state_dict(),
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to a checkpoint of the same config.

        Raises:
            InputError: Its tensors do not fit, after a change of timm or of this package.
        """
        try:
            self.student.model.load_state_dict(checkpoint.weights)
            self.loss.load_state_dict(checkpoint.loss)
            self.updates.load_state_dict(
                {"optimizer": checkpoint.optimizer, "scaler": checkpoint.scaler, "ema": checkpoint.ema}
            )
        except (RuntimeError, ValueError) as error:
            raise InputError(
                f"the checkpoint does not fit the run: {one_line(error)}; resume with the versions in its config.json"
            ) from error
        self.progress = checkpoint.progress
        if self.parts.live is not None:
            self.parts.live.seconds = checkpoint.progress.teacher_seconds
        set_rng_state(checkpoint.rng[self.group.rank])

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


def _in_groups(items: Iterable[T], size: int) -> Iterator[tuple[T, ...]]:
    """So many items at a time."""
    return zip(*[iter(items)] * size, strict=True)


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
