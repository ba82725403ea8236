"""The training loop: batch, forward, method, backward, step."""

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from feature_store.errors import InputError
from feature_store.inputs.base import NO_LABEL
from feature_store.tools.terminal import say
from student_trainer.config import TrainConfig
from student_trainer.data.batch import Batch
from student_trainer.data.labels import require_labels
from student_trainer.data.loader import BatchLoader
from student_trainer.data.materialised import StoredUnit
from student_trainer.engine.callbacks import Callback
from student_trainer.engine.checkpoint import Checkpoint, Progress, rng_state, set_rng_state
from student_trainer.engine.distributed import Group, data_parallel, gradients_shared, is_main_process, joined
from student_trainer.engine.failures import machine_failures_told, not_finite_loss, require_finite_weights
from student_trainer.engine.loggers import Logger, RunLog, make_loggers, require_loggers
from student_trainer.engine.metrics import MetricsLog, Throughput, peak_memory, read_metrics
from student_trainer.engine.numerics import numerics
from student_trainer.engine.optimizer import make_optimizer, make_scheduler, state_bytes
from student_trainer.engine.progress import RunProgress
from student_trainer.engine.run_folder import RunFolder, reserved
from student_trainer.engine.stopping import Stop, Stopped, stop_on_signals
from student_trainer.engine.terms import TermMeans
from student_trainer.evaluate import Accuracy, Evaluator
from student_trainer.methods.base import DistillBatch, TeacherOutput, Terms
from student_trainer.plan import RunPlan, resolve
from student_trainer.reports.run import write_run_report
from student_trainer.students.load import describe_student, save_student

T = TypeVar("T")
AMP_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class TrainResult:
    """Result of a run.

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


def train(config: TrainConfig, *, loggers: Sequence[Logger] = (), callbacks: Sequence[Callback] = ()) -> TrainResult:
    """Train a student, or continue a run that stopped.

    Under torchrun every process calls this with the same config. The main one writes, all of them validate; the run's
    folder must be one that all of them see.

    Args:
        config: The run.
        loggers: Custom loggers, beside those of the config; used by the main process.
        callbacks: Called on every process.

    Raises:
        UserError: Things that do not fit together, data other than the store was made from, a loss that is not
            finite; the message names the next step.
        OtherProcessError: On processes other than the main one, which raises the error itself.
    """
    with stop_on_signals() as stop, ExitStack() as held:
        try:
            group = held.enter_context(joined(config.device))
            held.enter_context(numerics(deterministic=config.deterministic, tf32=config.tf32))
            with machine_failures_told(stop):
                return _train(config, group, stop, held, loggers, callbacks)
        except Stopped as stopped:
            if is_main_process():
                say(f"student-trainer: {stopped}", error=True)
            raise


def _train(
    config: TrainConfig,
    group: Group,
    stop: Stop,
    held: ExitStack,
    loggers: Sequence[Logger],
    callbacks: Sequence[Callback],
) -> TrainResult:
    group.broadcast_from_main(lambda: held.enter_context(reserved(config.run)))
    run = group.all_or_raise(lambda: Run(_resolve(config, group), stop, callbacks))
    folder, notes = group.broadcast_from_main(lambda: RunFolder.open(config, run.plan.identity, run.plan.describe()))
    checkpoint = group.all_or_raise(folder.saved)
    group.broadcast_from_main(lambda: folder.rewind(checkpoint))
    if checkpoint is not None:
        group.all_or_raise(lambda: run.restore(checkpoint))
    own = [*make_loggers(config, run.progress.step), *loggers] if group.is_main else []
    with closing(run), RunLog(MetricsLog(folder.metrics if group.is_main else Path(os.devnull)), own) as log:
        run.fit(folder, log, notes)
    group.broadcast_from_main(lambda: folder.finish(run.progress))
    stop.note = "stopped after the last step; --resume writes the report"
    if config.report:
        group.broadcast_from_main(lambda: write_run_report(folder.path))
    return group.broadcast_from_main(lambda: run.result(folder))


def _resolve(config: TrainConfig, group: Group) -> RunPlan:
    require_loggers(config)
    plan = resolve(config, group)
    if group.is_main:
        require_labels(plan.inputs.validation, plan.student.num_classes, "--val-tars")
        if not plan.inputs.checked:
            tars = [tar for tar in plan.inputs.tars if not isinstance(tar, StoredUnit)]
            require_labels(tars, plan.student.num_classes, "--tars", plan.inputs.units, optional=True)
    return plan


class Run:
    """A run in memory.

    Attributes:
        plan: Its parts.
        config: Its configuration.
        group: Its processes.
        module: Student and method; under torchrun, wrapped to average gradients.
        optimizer: Over both, with the learning rates of the run's batch size.
        ema: Moving average of the student's weights, or None.
        progress: Its progress.
        reads_every_step: Whether loss, signals and unreadable samples are looked at after every step. A GPU would wait
            for that, so there it is every ``log_every`` steps and at an epoch's end.
    """

    def __init__(self, plan: RunPlan, stop: Stop | None = None, callbacks: Sequence[Callback] = ()) -> None:
        config = plan.config
        self.plan, self.config, self.group, self.device = plan, config, plan.group, plan.device
        self.student, self.method, self.progress = plan.student, plan.method, Progress()
        self._stop, self._callbacks, self._throughput = stop or Stop(), callbacks, Throughput()
        distilled = plan.distilled
        self._parameters = [parameter for parameter in distilled.parameters() if parameter.requires_grad]
        on_gpu = plan.device.type == "cuda"
        self.reads_every_step = not on_gpu
        if on_gpu:
            distilled.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.optimizer = make_optimizer(config.optim.at(config.batch_size), distilled)
        self.scheduler = make_scheduler(config, self.optimizer, plan.sampler.per_epoch)
        self._scaler = torch.amp.GradScaler(plan.device.type, enabled=config.amp == "float16")
        self.ema = None if config.ema_decay is None else ModelEmaV3(plan.student.model, decay=config.ema_decay)
        self.module: nn.Module = distilled
        if config.compile:
            self.module.compile()
        if not plan.group.is_main:  # own random numbers for drop path and dropout
            torch.manual_seed((config.seed + plan.group.rank) % 2**64)
        self._normalise = plan.preprocessing.normaliser(plan.device)
        workers = {"workers": config.workers, "start_method": config.start_method}
        self._loader = BatchLoader(plan.dataset, plan.sampler, pin=on_gpu, **workers)
        self._means, self._unreadable = TermMeans(), list[str]()
        self._evaluator = (
            Evaluator(plan.inputs.validation, plan.preprocessing, plan.student.num_classes, group=plan.group,
                      batch_size=plan.sampler.rows_per_pass, device=plan.device, **workers)
            if plan.inputs.validation else None
        )  # fmt: skip

    @property
    def eval_model(self) -> nn.Module:
        """The timm model with the weights to use: averaged ones if any are kept and evaluated."""
        return self.ema.module if self.ema is not None and self.config.ema_eval else self.student.model

    def step(self, micro_batches: Sequence[Batch]) -> None:
        """One optimizer step on this process's part of a batch; only the scaler of float16 waits for the device."""
        terms: list[Terms] = []
        for batch, task_factor in zip(micro_batches, self.task_factors(micro_batches), strict=True):
            with gradients_shared(self.module, now=batch is micro_batches[-1]):
                terms.append(self.terms(batch, task_factor))
                self._scaler.scale(terms[-1].total / len(micro_batches)).backward()
        if self.config.optim.clip_grad is not None:
            self._scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self._parameters, self.config.optim.clip_grad)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.batch += 1
        self.progress.step += 1
        self.scheduler.step_update(self.progress.step)
        if self.ema is not None:
            self.ema.update(self.student.model, self.progress.step)
        self._means.add(terms, self.progress.step)

    def task_factors(self, micro_batches: Sequence[Batch]) -> list[Tensor | None]:
        """For each micro-batch, its labelled samples over the mean of all micro-batches of the step, of all processes.

        Gradients are averaged over micro-batches and processes, each as one. With these factors on their task losses,
        which are means over labelled samples, that average is the mean over the labelled samples of the whole batch:
        the gradients of one process and one micro-batch, however labelled samples fall. None where all are labelled.
        """
        if self.plan.inputs.labelled == self.plan.inputs.samples:
            return [None] * len(micro_batches)
        labelled = [(batch.labels != NO_LABEL).sum() for batch in micro_batches]
        own = torch.stack(labelled).float().to(self.device, non_blocking=True)
        return list((own / self.group.mean(own.mean()).clamp_min(1 / self.plan.sampler.rows)).unbind())

    def terms(self, batch: Batch, task_factor: Tensor | None = None) -> Terms:
        """Forward pass of student and method on a micro-batch.

        Args:
            batch: The micro-batch.
            task_factor: Factor on the term ``task``.

        Raises:
            InputError: None of its images can be read.
        """
        if not len(batch.labels):
            raise InputError(f"no image of a batch can be read: {'; '.join(batch.unreadable[:3])}; fix the images")
        pixels = batch.pixels.to(self.device, non_blocking=True)
        images, labels = self._normalise(pixels), batch.labels.to(self.device, non_blocking=True)
        teacher, *others = self.plan.teacher.outputs(batch, pixels, self.method.needs_of_teachers) or (TeacherOutput(),)
        with self._autocast():
            return self.module(DistillBatch(images, labels, teacher, tuple(others)), task_factor)

    def _autocast(self) -> Any:
        enabled = self.config.amp in AMP_DTYPES
        return torch.autocast(self.device.type, AMP_DTYPES[self.config.amp]) if enabled else nullcontext()

    def fit(self, folder: RunFolder, log: RunLog, notes: Sequence[str] = ()) -> None:
        """Train until all epochs are done, or a signal asks to stop.

        Args:
            folder: Where checkpoints go.
            log: Where numbers go.
            notes: Differences from the run before it was resumed.
        """
        plan, config, progress = self.plan, self.config, self.progress
        self.module = data_parallel(self.module, self.group)
        if progress.epoch < config.epochs:
            self.group.broadcast_from_main(lambda: folder.require_room(self._checkpoint_bytes()))
        log.write("start", progress.step, **plan.summary(), notes=list(notes))
        total = config.epochs * plan.sampler.per_epoch
        shown = config.progress and self.group.is_main
        with RunProgress(enabled=shown, total=total, done=progress.step) as bar:
            for line in (f"{config.run}: {plan.sentence()}", *plan.notes(), *notes) if shown else ():
                bar.note(line)
            self._call("on_start")
            try:
                self._stop.raises = self.group.size == 1  # several processes stop together, see _agree
                while progress.epoch < config.epochs:
                    self._train_epoch(folder, log, bar)
                    self._end_epoch(folder, log, bar)
            except Stopped as stopped:
                self._write(folder)
                at = f"epoch {min(progress.epoch + 1, config.epochs)} step {progress.step}"
                raise Stopped(stopped.signal, f"stopped at {at}, saved; continue with --resume") from None
        self._call("on_end")

    def _train_epoch(self, folder: RunFolder, log: RunLog, bar: RunProgress) -> None:
        """Train the rest of the epoch in progress."""
        progress, sampler = self.progress, self.plan.sampler
        sampler.set_epoch(progress.epoch, progress.batch)
        self.module.train()
        for micro_batches, waited in _timed(_in_groups(self._loader, self.config.accumulate)):
            with self._stop.held():
                begun, lr = time.perf_counter(), self.optimizer.param_groups[0]["lr"]
                self.step(micro_batches)
                reads = self.reads_every_step or progress.step % self.config.log_every == 0
                told_to_stop = reads and self._agree()
                images = self.group.size * sum(len(batch.labels) for batch in micro_batches)
                self._throughput.add(images, waited, time.perf_counter() - begun)
                self._report(micro_batches, lr, log, bar, reads=reads)
                self._call("on_step")
                if self._saves_now():
                    self._write(folder)
            if told_to_stop:
                raise self._stop.now()

    def _agree(self) -> bool:
        """Whether processes stop after this step, because any of them got a signal; waits for the device.

        Raises:
            UserError: The loss of any process was not finite since this was last asked.
        """
        own = self._means.first_not_finite()
        is_bad, is_told = self.group.any(own is not None, self._stop.signal is not None, device=self.device)
        if not is_bad:
            return is_told and self.group.size > 1  # alone, the signal raises by itself
        step = min(bad for bad in self.group.gather(own) if bad is not None)
        batch = self.progress.batch - (self.progress.step - step) - 1
        rows = [row for micro in self.plan.sampler.micro_batches(self.progress.epoch, batch) for row in micro]
        terms = self._means.first_not_finite_terms()
        raise not_finite_loss(step - 1, self.progress.epoch, terms, rows, self.group)

    def _report(self, micro_batches: Sequence[Batch], lr: float, log: RunLog, bar: RunProgress, *, reads: bool) -> None:
        epoch, step = self.progress.epoch, self.progress.step
        logged = step % self.config.log_every == 0
        values = self._means.last(self.group) if logged else {}
        bar.step(epoch, self.config.epochs, self._means.last_total if reads else None)
        self._unreadable += [line for batch in micro_batches for line in batch.unreadable]
        if reads:
            self._report_unreadable(log, bar)
        if logged:
            speed = {**self._throughput.since_last(), "memory": peak_memory(self.device)}
            log.write("step", step, epoch=epoch, lr=lr, **values, speed=speed)

    def _report_unreadable(self, log: RunLog, bar: RunProgress) -> None:
        """Log and show the samples that any process left out since the last call; waits for the other processes."""
        if unreadable := self._all_unreadable():
            log.write("unreadable", self.progress.step, epoch=self.progress.epoch, samples=unreadable)
            bar.note(f"left out, unreadable: {'; '.join(unreadable)}")

    def _all_unreadable(self) -> list[str]:
        """Samples that any process left out since this was last asked."""
        own, self._unreadable = self._unreadable, []
        if not self.plan.dataset.views.skips_unreadable:
            return own  # none: replayed samples must be readable, so there is nothing to ask the others
        return [line for lines in self.group.gather(own) for line in lines]

    def _saves_now(self) -> bool:
        """Whether a checkpoint is due inside the epoch; its end has its own."""
        every = self.config.checkpoint_every
        return every > 0 and self.progress.step % every == 0 and self.progress.batch < self.plan.sampler.per_epoch

    def _end_epoch(self, folder: RunFolder, log: RunLog, bar: RunProgress) -> None:
        """Validate, log, and save: best first, so that a crash between the two repeats the epoch's end."""
        progress, config, improved = self.progress, self.config, False
        self._report_unreadable(log, bar)  # of the steps since the last logged one
        told_to_stop = not self.reads_every_step and self._agree()  # of the same steps
        if told_to_stop:
            raise self._stop.now()
        values: dict[str, Any] = {**self._means.means(self.group)}
        if self._validates():
            self._save(folder)  # validation can fail, or be stopped, and the epoch's work must not be lost
            accuracy = self._validate()
            values["val"] = {
                "top1": accuracy.top1, "top5": accuracy.top5, "samples": accuracy.samples,
                "unreadable": list(accuracy.unreadable),
            }  # fmt: skip
            improved = progress.best_top1 is None or accuracy.top1 > progress.best_top1
        progress.teacher_seconds = self.plan.teacher.seconds
        values["speed"] = {
            "seconds_per_step": self._throughput.median(),
            "teacher_seconds": progress.teacher_seconds,
        }
        log.write("epoch", progress.step, epoch=progress.epoch, **values)
        bar.note(_epoch_line(progress.epoch, config.epochs, values))
        self._call("on_epoch", values)
        with self._stop.held():
            if improved:
                progress.best_top1 = values["val"]["top1"]
                if self.group.is_main:
                    save_student(folder.best, self._described(), self.eval_model.state_dict())
            progress.epoch, progress.batch, self._means = progress.epoch + 1, 0, TermMeans()
            self._write(folder)

    def _validates(self) -> bool:
        epoch = self.progress.epoch
        due = (epoch + 1) % self.config.val_every == 0 or epoch + 1 == self.config.epochs
        return due and self._evaluator is not None

    def _validate(self) -> Accuracy:
        """Accuracy of the student that is saved, on the validation tars, of which every process takes its share.

        Raises:
            Stopped: A process received a signal during validation.
        """
        assert self._evaluator is not None  # _validates asked
        self.group.share_buffers(self.eval_model)
        alone = self.group.size == 1
        with self._stop.at_once() if alone else nullcontext():
            accuracy = self._evaluator.unless_stopped(
                self.eval_model, lambda: not alone and self._stop.signal is not None
            )
        if accuracy is None:
            raise self._stop.now()
        return accuracy

    def _call(self, hook: str, *arguments: Any) -> None:
        for callback in self._callbacks:
            getattr(callback, hook)(self, *arguments)

    def _save(self, folder: RunFolder) -> None:
        """Write the run as it is now; a signal waits until that is done."""
        with self._stop.held():
            self._write(folder)

    def _write(self, folder: RunFolder) -> None:
        """Write the run; of several processes, the main one does."""
        require_finite_weights(self.module, self.progress.step, self.group)
        checkpoint = self.checkpoint()
        if self.group.is_main:
            folder.save(checkpoint)

    def _described(self) -> dict[str, Any]:
        return describe_student(self.student, self.plan.preprocessing, self.plan.inputs.classes)

    def _checkpoint_bytes(self) -> int:
        averaged = [] if self.ema is None else list(self.ema.parameters())
        return sum(weights.nbytes for weights in (*self._parameters, *averaged)) + state_bytes(self.optimizer)

    def checkpoint(self) -> Checkpoint:
        """The run as it is now; every process calls this."""
        self.progress.teacher_seconds = self.plan.teacher.seconds
        return Checkpoint(
            student=self._described(),
            weights=self.student.model.state_dict(),
            loss=self.method.state_dict(),
            optimizer=self.optimizer.state_dict(),
            progress=replace(self.progress, means=self._means.state_dict(self.group)),
            rng=self.group.gather(rng_state()),
            ema=None if self.ema is None else self.ema.module.state_dict(),
            scaler=self._scaler.state_dict(),
            ema_eval=self.config.ema_eval,
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to a checkpoint of the same run.

        Raises:
            InputError: Its tensors do not fit, or it is past the epochs asked for.
        """
        checkpoint.load_into(
            self.student.model, self.method, self.optimizer, self._scaler, self.ema and self.ema.module
        )
        self.progress = replace(checkpoint.progress, means=None)
        if self.progress.epoch > self.config.epochs:
            raise InputError(
                f"--epochs is {self.config.epochs}, but the run has done {self.progress.epoch}; give at least as many"
            )
        self._means.load_state_dict(checkpoint.progress.means, self.group)
        self.plan.teacher.seconds = checkpoint.progress.teacher_seconds
        if len(checkpoint.rng) == self.group.size:
            set_rng_state(checkpoint.rng[self.group.rank])
        else:  # another number of processes: new random numbers, which do not repeat those of the run's start
            torch.manual_seed((self.config.seed + self.group.rank + 1000003 * self.progress.step) % 2**64)

    def result(self, folder: RunFolder) -> TrainResult:
        """The run's result so far."""
        history = tuple(line for line in read_metrics(folder.metrics) if line["kind"] == "epoch")
        validated = [line["val"]["top1"] for line in history if "val" in line]
        return TrainResult(
            run=folder.path,
            best_top1=self.progress.best_top1,
            last_top1=validated[-1] if validated else None,
            steps=self.progress.step,
            seconds_per_step=self._throughput.median(),
            teacher_seconds=self.progress.teacher_seconds,
            history=history,
        )

    def close(self) -> None:
        """End the processes that make batches."""
        self._loader.close()
        if self._evaluator is not None:
            self._evaluator.close()


def _in_groups(items: Iterable[T], size: int) -> Iterator[tuple[T, ...]]:
    """Items in groups of a given size."""
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
    val = values.get("val", {})
    accuracy = f", top-1 {val['top1']:.2f} %" if val else ""
    unreadable = f", {len(val['unreadable'])} unreadable" if val.get("unreadable") else ""
    return f"epoch {epoch + 1}/{epochs}: loss {values['loss']['total']:.4f}{accuracy}{unreadable}"
