"""Configuration of ``train``: frozen dataclasses, checked when made."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from feature_store.errors import InputError
from feature_store.inputs.options import SourceOptions
from feature_store.tools.options import JsonObject, build_config, check_fields, require
from student_trainer.methods.attention_transfer import AttentionTransferConfig
from student_trainer.methods.dist import DISTConfig
from student_trainer.methods.fd import FDConfig
from student_trainer.methods.kd import KDConfig
from student_trainer.methods.nkd import NKDConfig
from student_trainer.methods.registry import METHODS, find_method
from student_trainer.methods.scalekd import ScaleKDConfig
from student_trainer.teachers.config import LiveTeacher, NoTeacher, ServiceTeacher, TeacherConfig, teacher_from_options
from student_trainer.teachers.expectations import ExpectConfig

# Set by the command's own --preset, not an option of its own.
_Recorded = Annotated[str | None, tyro.conf.Fixed, tyro.conf.Suppress, tyro.conf.arg(name="recorded-preset")]


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning-rate schedule.

    Attributes:
        opt: timm optimizer name, e.g. adamw, lamb, momentum (plain SGD, as in T1 and T2) or sgd (Nesterov).
        lr: Peak learning rate.
        lr_batch: Batch size that lr, min_lr and warmup_lr are meant for; at another batch size they are scaled.
            Default: used as they are.
        lr_scale: Their growth with batch_size / lr_batch: in proportion, or with its square root.
        weight_decay: Weight decay.
        decay_all: Apply weight decay to norms, biases and position embeddings too, as schedules T1, T2 and A1 do.
        decay_positions: Apply weight decay to the projectors' position embeddings; default as decay_all says.
        momentum: Momentum of optimizers that have one.
        clip_grad: Largest gradient norm; default no clipping.
        sched: Cosine from the end of warm-up to min_lr, or steps of decay_rate every decay_epochs.
        min_lr: Where cosine ends.
        decay_epochs: Epochs between steps.
        decay_rate: Factor of a step.
        warmup_epochs: Epochs of linear warm-up; 0 for none.
        warmup_lr: Where warm-up starts.
    """

    opt: str = "adamw"
    lr: float = 1e-3
    lr_batch: int | None = None
    lr_scale: Literal["linear", "sqrt"] = "linear"
    weight_decay: float = 0.05
    decay_all: bool = False
    decay_positions: bool | None = None
    momentum: float = 0.9
    clip_grad: float | None = None
    sched: Literal["cosine", "step"] = "cosine"
    min_lr: float = 0.0
    decay_epochs: float = 30
    decay_rate: float = 0.1
    warmup_epochs: float = 0
    warmup_lr: float = 1e-6

    def __post_init__(self) -> None:
        """Refuse values no run could use."""
        check_fields(self, "optim.")
        require(self.lr > 0, "--optim.lr", self.lr, "above 0")
        require(self.lr_batch is None or self.lr_batch >= 1, "--optim.lr-batch", self.lr_batch, "at least 1")
        require(self.weight_decay >= 0, "--optim.weight-decay", self.weight_decay, "at least 0")
        require(self.clip_grad is None or self.clip_grad > 0, "--optim.clip-grad", self.clip_grad, "above 0")
        require(self.min_lr >= 0, "--optim.min-lr", self.min_lr, "at least 0")
        require(self.decay_epochs > 0, "--optim.decay-epochs", self.decay_epochs, "above 0")
        require(self.decay_rate > 0, "--optim.decay-rate", self.decay_rate, "above 0")
        require(self.warmup_epochs >= 0, "--optim.warmup-epochs", self.warmup_epochs, "at least 0")
        require(self.warmup_lr >= 0, "--optim.warmup-lr", self.warmup_lr, "at least 0")

    def at(self, batch_size: int) -> "OptimConfig":
        """The same with the learning rates of this batch size, by the rule lr_scale."""
        ratio = batch_size / (self.lr_batch or batch_size)
        factor = ratio if self.lr_scale == "linear" else ratio**0.5
        return replace(
            self,
            lr=factor * self.lr,
            min_lr=factor * self.min_lr,
            warmup_lr=factor * self.warmup_lr,
            lr_batch=None,
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(SourceOptions):
    """One training run.

    Attributes:
        run: Folder of the run: config.json, metrics.jsonl, last.pt, best.safetensors.
        student: timm model name, or torchvision:NAME, a classifier of torchvision, e.g. torchvision:mobilenet_v3_large.
        preset: Name of the preset that these settings are based on, for the record; see preset_config.
        tars: Training images: tars (paths, brace patterns, URLs), a class-per-folder tree, or parquet files; with a
            store, those it was written from, which are opened as the store says.
        views_from: In place of tars: folder or URL of the store's materialised views (what --views-out was).
        teacher: Source of the teacher's features.
        val_tars: Validation images, as tars; every sample needs a label. Without them nothing is validated and there is
            no best.safetensors.
        method: Distillation method: scalekd, fd (features), kd, dist, nkd (logits), attention_transfer, none (no
            distillation), or package.module:Class, a method of your own.
        method_options: Options of a method of your own, as JSON.
        scalekd: Options of --method scalekd.
        kd: Options of --method kd.
        fd: Options of --method fd.
        dist: Options of --method dist.
        nkd: Options of --method nkd.
        attention_transfer: Options of --method attention_transfer.
        student_kwargs: Extra arguments of timm.create_model for the student, as JSON.
        student_stages: Indices of the student's stages 3 and 4 in timm's feature_info; default those at reductions 16
            and 32, or by depth in networks of one resolution.
        num_classes: Classes of the student; default as many as have names, else the teacher's, else the largest
            label in the store + 1.
        keys_file: Train on the samples listed here only, one key per line.
        expect: Required properties of the teacher's features.
        task: ce (cross entropy), or bce (sigmoid cross entropy summed over classes).
        label_smoothing: Label smoothing of the task loss.
        epochs: Passes over the samples.
        batch_size: Samples per step, over all processes; the last incomplete batch of an epoch is dropped.
        accumulate: Micro-batches that a step's samples are split into, to fit into memory; BatchNorm sees one at a
            time.
        shuffle_units: Units (tars) mixed together when an epoch is shuffled.
        optim: Optimizer and schedule.
        amp: Autocast of student and loss; float16 scales the loss to keep small gradients.
        tf32: On GPUs, TF32 products of float32 matrices: faster, with 10 bits of mantissa.
        compile: torch.compile student and loss.
        ema_decay: Also keep a moving average of the student's weights with this decay.
        ema_eval: Validate, choose as best and export the averaged weights; --no-ema-eval: the raw ones.
            last.pt has both.
        sync_bn: The student's BatchNorm statistics over all processes instead of each process's samples; needs GPUs.
        deterministic: Only algorithms that repeat to the bit, also on GPUs; slower there.
        device: Where the student runs, e.g. cuda:1; auto takes a GPU if there is one. Under torchrun: cuda or cpu.
        workers: Processes that make batches; 0 makes them in this process.
        start_method: Start method of those processes.
        seed: Seed of weights, order and dropout.
        crop_pct: Part of the shorter side validation keeps (256 -> 224 is 0.875).
        val_every: Validate every this many epochs, and after the last.
        log_every: Write a metrics line every this many steps; on GPUs the loss is only read, and a signal only
            followed, at these steps.
        tensorboard: Also log to TensorBoard, into the run's folder.
        wandb: Also log to this project of Weights & Biases.
        mlflow: Also log to this experiment of MLflow.
        report: Write report.html when the run ends; --no-report leaves it out.
        checkpoint_every: Also write last.pt every this many steps; 0: after each epoch only.
        resume: Continue the run in its folder.
        progress: Show progress on stderr; --no-progress shows none.
    """

    run: Path
    student: str
    preset: _Recorded = None
    tars: tuple[str, ...] = ()
    views_from: str | None = None
    teacher: Annotated[TeacherConfig, tyro.conf.arg(name="", constructor=teacher_from_options)] = NoTeacher()  # noqa: RUF009 - frozen
    val_tars: tuple[str, ...] = ()
    method: str = "scalekd"
    method_options: JsonObject = field(default_factory=dict)
    scalekd: ScaleKDConfig = field(default_factory=ScaleKDConfig)
    kd: KDConfig = field(default_factory=KDConfig)
    fd: FDConfig = field(default_factory=FDConfig)
    dist: DISTConfig = field(default_factory=DISTConfig)
    nkd: NKDConfig = field(default_factory=NKDConfig)
    attention_transfer: AttentionTransferConfig = field(default_factory=AttentionTransferConfig)
    student_kwargs: JsonObject = field(default_factory=dict)
    student_stages: tuple[int, int] | None = None
    num_classes: int | None = None
    keys_file: Path | None = None
    expect: ExpectConfig = field(default_factory=ExpectConfig)
    task: Literal["ce", "bce"] = "ce"
    label_smoothing: float = 0.0
    epochs: int = 100
    batch_size: int = 256
    accumulate: int = 1
    shuffle_units: int = 8
    optim: OptimConfig = OptimConfig()
    amp: Literal["off", "bfloat16", "float16"] = "off"
    tf32: bool = False
    compile: bool = False
    ema_decay: float | None = None
    ema_eval: bool = True
    sync_bn: bool = False
    deterministic: bool = False
    device: str = "auto"
    workers: int = 4
    start_method: Literal["forkserver", "spawn", "fork"] = "forkserver"
    seed: int = 0
    crop_pct: float = 0.875
    val_every: int = 1
    log_every: int = 50
    tensorboard: bool = False
    wandb: str | None = None
    mlflow: str | None = None
    report: bool = True
    checkpoint_every: int = 0
    resume: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        """Refuse values no run could use, and options that would do nothing.

        Raises:
            InputError: Names the option, the value and what is accepted.
        """
        check_fields(self)
        if self.run is tyro.MISSING:  # a preset's defaults for the command line, not a run yet
            return
        super().__post_init__()
        for name, least in _AT_LEAST.items():
            value = getattr(self, name)
            require(value is None or value >= least, _option(name), value, f"at least {least}")
        require(self.seed < 2**64, "--seed", self.seed, "an unsigned 64-bit integer")
        require(0 <= self.label_smoothing < 1, "--label-smoothing", self.label_smoothing, "0 to below 1")
        require(0 < self.crop_pct <= 1, "--crop-pct", self.crop_pct, "above 0, at most 1")
        require(self.ema_decay is None or 0 < self.ema_decay < 1, "--ema-decay", self.ema_decay, "between 0 and 1")
        if self.ema_decay is None and not self.ema_eval:
            raise InputError(
                "--no-ema-eval is for runs that keep an average; leave it out (presets: --ema-eval) or give --ema-decay"
            )
        require(
            self.batch_size % self.accumulate == 0,
            "--accumulate", self.accumulate, f"a divisor of --batch-size {self.batch_size}",
        )  # fmt: skip
        if bool(self.tars) == (self.views_from is not None):
            raise InputError(
                "give either --tars or --views-from: source tars whose views are replayed, or materialised views"
            )
        own = ":" in self.method
        if self.method_options and not own:
            raise InputError(f"--method-options is for a method of your own, package.module:Class; got {self.method}")
        self.method_config()
        requires_teacher = find_method(self.method).requires_teacher
        if requires_teacher and isinstance(self.teacher, NoTeacher):
            raise InputError(
                f"--method {self.method} needs teacher features; give --store, --source http://host:port, or --source "
                "live with --teacher.name"
            )
        computes = isinstance(self.teacher, LiveTeacher) or (
            isinstance(self.teacher, ServiceTeacher) and self.teacher.live
        )
        if not requires_teacher and computes:
            raise InputError(f"--method {self.method} uses no teacher; leave out --source live")

    def method_config(self) -> Any:
        """The options of the chosen method; those of the others have no effect.

        Raises:
            InputError: There is no such method, or it has other options.
        """
        kind = find_method(self.method).Config
        if ":" in self.method:
            return build_config(kind, self.method_options, "--method-options: ")
        return getattr(self, self.method, None) or kind()


_AT_LEAST = {
    "num_classes": 1, "epochs": 1, "batch_size": 1, "accumulate": 1, "shuffle_units": 1,
    "workers": 0, "seed": 0, "val_every": 1, "log_every": 1, "checkpoint_every": 0,
}  # fmt: skip


def config_to_dict(config: TrainConfig) -> dict[str, Any]:
    """JSON form of a config, without the options of methods that are not chosen."""
    values = json.loads(json.dumps(asdict(config), default=str))
    return {name: value for name, value in values.items() if name == config.method or name not in METHODS}


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
