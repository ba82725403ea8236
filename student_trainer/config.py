"""What a user can ask of ``train``: frozen configurations, read by tyro and by Python callers."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from feature_store.errors import InputError
from feature_store.inputs.options import TarOptions
from feature_store.tools.options import JsonObject, require
from feature_store.views import PolicyName
from student_trainer.methods.scalekd import ScaleKDConfig

# Set by the command's own --preset, not an option of its own.
_Recorded = Annotated[str | None, tyro.conf.Fixed, tyro.conf.Suppress, tyro.conf.arg(name="recorded-preset")]


@dataclass(frozen=True)
class TeacherConfig:
    """The live teacher; only for ``--source live``.

    Attributes:
        name: timm model name; default the store's teacher.
        checkpoint: Its weights (safetensors or torch file); default timm's pretrained weights.
        pretrained: Without a checkpoint: fetch timm's weights for this name. Off: random weights, for tests.
        model_kwargs: Extra arguments of timm.create_model, as JSON; default the store's.
        depth: Number of later blocks of a plain ViT; default the store's, or the last quarter.
        drop_prefix: Run them on grid tokens alone for the student; default as the store says, or off.
        compute_dtype: dtype of its forward pass (autocast below float32); default the store's, or float32.
    """

    name: str | None = None
    checkpoint: Path | None = None
    pretrained: bool = True
    model_kwargs: JsonObject = field(default_factory=dict)
    depth: int | None = None
    drop_prefix: bool | None = None
    compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None


@dataclass(frozen=True)
class ViewsConfig:
    """Views of a run without a store; with one, its own are replayed.

    Attributes:
        policy: What views are drawn from (rrc_flip: schedules T1 and T2; a1, a2 and a3: A1, A2 and A3).
        size: Height and width of a view, in pixels.
        seed: Seed of the views.
        count: Views per sample, used in turn; default a new one every epoch.
    """

    policy: PolicyName = "rrc_flip"
    size: int = 224
    seed: int = 0
    count: int | None = None

    def __post_init__(self) -> None:
        """Refuse values no run could use."""
        require(self.size >= 1, "--views.size", self.size, "at least 1")
        require(0 <= self.seed < 2**64, "--views.seed", self.seed, "an unsigned 64-bit integer")
        require(self.count is None or self.count >= 1, "--views.count", self.count, "at least 1")


@dataclass(frozen=True)
class ExpectConfig:
    """What the teacher features must be; presets say so, and None accepts anything.

    Attributes:
        teacher: timm architecture of the teacher; its pretrained tag does not count.
        model_kwargs: Extra arguments of timm.create_model it was built with, as JSON.
        input_size: Height and width of its views, in pixels.
        depth: Number of its later blocks.
        prefix: What students run the later blocks with, beside grid tokens.
        policy: View policy its views were drawn from; every field is compared but the label.
    """

    teacher: str | None = None
    model_kwargs: JsonObject | None = None
    input_size: tuple[int, int] | None = None
    depth: int | None = None
    prefix: Literal["none", "cached", "dropped"] | None = None
    policy: PolicyName | None = None


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning-rate schedule.

    Attributes:
        opt: timm optimizer name, e.g. adamw, lamb, momentum (plain SGD, as in T1 and T2) or sgd (Nesterov).
        lr: Peak learning rate.
        lr_batch: Batch size that lr, min_lr and warmup_lr are meant for; at another batch size they are scaled.
            Default: used as they are.
        lr_scale: How they grow with batch_size / lr_batch: in proportion, or with its square root.
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
class TrainConfig(TarOptions):
    """One training run.

    Attributes:
        run: Folder of the run: config.json, metrics.jsonl, last.pt, best.pt.
        student: timm model name.
        preset: Name of the preset that these settings were begun from, for the record; see preset_config.
        tars: Training tars: paths, brace patterns, URLs; with a store, those it was written from.
        views_from: In place of tars: folder or URL of the store's materialised views (what --views-out was).
        store: Store of the teacher's features: a directory, or a URL (s3://, gs://, http(s)://).
        val_tars: Validation tars; without them nothing is validated and there is no best.pt.
        method: scalekd, or a baseline: fd (features), kd (logits), none (no distillation).
        source: Where teacher features come from: store; live, a teacher in this process; http://host:port, a service's
            cached rows; or live+http://host:port, its live teacher. A service brings its own store.
        token_file: File with the service's bearer token; default the environment variable FEATURE_STORE_TOKEN.
        student_kwargs: Extra arguments of timm.create_model for the student, as JSON.
        student_stages: Indices of the student's stages 3 and 4 in timm's feature_info; default those at reductions 16
            and 32, or by depth in networks of one resolution.
        num_classes: Classes of the student; default the teacher's, or the largest label in the store + 1.
        keys_file: Train on the samples listed here only, one key per line.
        num_views: Use the store's first views only; default all. Epoch e uses view e mod this.
        teacher: The live teacher.
        expect: What the teacher features must be.
        views: Views of a run without a store.
        scalekd: The ScaleKD loss; its weights also serve the baselines.
        task: ce (cross entropy), or bce (sigmoid cross entropy summed over classes).
        label_smoothing: Label smoothing of the task loss.
        epochs: Passes over the samples.
        batch_size: Samples per step, over all processes; the last incomplete batch of an epoch is dropped.
        accumulate: Passes that a step's samples are split into, to fit a batch into memory; BatchNorm sees one
            pass at a time.
        shuffle_units: Units (tars) mixed together when an epoch is shuffled.
        optim: Optimizer and schedule.
        amp: Autocast of student and loss; float16 scales the loss to keep small gradients.
        compile: torch.compile student and loss.
        ema_decay: Also keep a moving average of the student's weights with this decay.
        ema_eval: Validate, choose as best and export the averaged weights. Off: the raw ones; checkpoints keep both.
        sync_bn: The student's BatchNorm statistics over all processes rather than each one's own samples; needs GPUs.
        deterministic: Only algorithms that repeat to the bit, also on GPUs; slower there.
        device: Where the student runs, e.g. cuda:1; auto takes a GPU if there is one. Under torchrun: cuda or cpu.
        workers: Processes that make batches; 0 makes them in this process.
        start_method: How those processes start.
        seed: Seed of weights, order and dropout.
        crop_pct: Part of the shorter side validation keeps (256 -> 224 is 0.875).
        val_every: Validate every this many epochs, and after the last.
        log_every: Write a metrics line every this many steps.
        tensorboard: Also log to TensorBoard, into the run's folder.
        wandb: Also log to this project of Weights & Biases.
        report: Write report.html when the run ends. Off: leave it out.
        checkpoint_every: Also write last.pt every this many steps; 0: after each epoch only.
        check_all_pixels: Check the CRC of every view of a store. Off: of each unit's first 8 only, which saves 1 to 2 %
            of the time that workers take to make views.
        resume: Continue the run in its folder.
        progress: Show progress on stderr. Off: none.
    """

    run: Path
    student: str
    preset: _Recorded = None
    tars: tuple[str, ...] = ()
    views_from: str | None = None
    store: str | Path | None = None
    val_tars: tuple[str, ...] = ()
    method: Literal["scalekd", "fd", "kd", "none"] = "scalekd"
    source: str = "store"
    token_file: Path | None = None
    student_kwargs: JsonObject = field(default_factory=dict)
    student_stages: tuple[int, int] | None = None
    num_classes: int | None = None
    keys_file: Path | None = None
    num_views: int | None = None
    teacher: TeacherConfig = TeacherConfig()
    expect: ExpectConfig = ExpectConfig()
    views: ViewsConfig = ViewsConfig()
    scalekd: ScaleKDConfig = field(default_factory=ScaleKDConfig)
    task: Literal["ce", "bce"] = "ce"
    label_smoothing: float = 0.0
    epochs: int = 100
    batch_size: int = 256
    accumulate: int = 1
    shuffle_units: int = 8
    optim: OptimConfig = OptimConfig()
    amp: Literal["off", "bfloat16", "float16"] = "off"
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
    report: bool = True
    checkpoint_every: int = 0
    check_all_pixels: bool = True
    resume: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        """Refuse values no run could use, and options that would do nothing.

        Raises:
            InputError: Names the option, the value and what is accepted.
        """
        if self.run is tyro.MISSING:  # a preset's defaults for the command line, not a run yet
            return
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
        self._require_source()

    @property
    def service_url(self) -> str | None:
        """URL of the service that features come from; None if they come from elsewhere."""
        url = self.source.removeprefix(_LIVE)
        return url if url.startswith(_SCHEMES) else None

    @property
    def has_store(self) -> bool:
        """Whether there is a store whose views are replayed: one's own, or a service's."""
        return self.store is not None or self.service_url is not None

    @property
    def is_live(self) -> bool:
        """Whether features are computed while training, here or by a service."""
        return self.source == "live" or self.source.startswith(_LIVE)

    def _require_source(self) -> None:
        url = self.service_url
        if self.source not in ("store", "live") and url is None:
            raise InputError(
                f"--source is {self.source!r}, expected store, live, http(s)://host:port or live+http(s)://host:port"
            )
        if bool(self.tars) == (self.views_from is not None):
            raise InputError(
                "give either --tars or --views-from: source tars whose views are made anew, or materialised views"
            )
        if self.views_from is not None and not self.has_store:
            raise InputError(
                "--views-from reads views that belong to a store; give that --store or --source http://..."
            )
        if url is not None and self.store is not None:
            raise InputError(f"--source {self.source} brings its own store; leave out --store")
        if url is None and self.token_file is not None:
            raise InputError("--token-file is for --source http://...; leave it out")
        if not self.has_store and self.source == "store" and self.method != "none":
            raise InputError(
                f"--method {self.method} needs teacher features; give --store, --source http://host:port, or --source "
                "live with --teacher.name"
            )
        if not self.has_store and self.is_live and self.teacher.name is None:
            raise InputError("--source live without --store needs --teacher.name")
        if self.is_live and self.method == "none":
            raise InputError(f"--method none uses no teacher; leave out --source {self.source}")
        if self.source != "live" and self.teacher != TeacherConfig():
            raise InputError("--teacher options are for --source live; leave them out or add --source live")
        if self.has_store and self.views != ViewsConfig():
            raise InputError("--views options are for runs without --store, whose own views are replayed")
        if not self.has_store and self.num_views is not None:
            raise InputError("--num-views limits a store's views; without --store use --views.count")
        if not self.has_store and not self.check_all_pixels:
            raise InputError(
                "--no-check-all-pixels is for replayed views; without --store none are checked, leave it out"
            )


_SCHEMES = ("http://", "https://")
_LIVE = "live+"
_AT_LEAST = {
    "num_classes": 1, "num_views": 1, "epochs": 1, "batch_size": 1, "accumulate": 1, "shuffle_units": 1,
    "workers": 0, "seed": 0, "val_every": 1, "log_every": 1, "checkpoint_every": 0,
}  # fmt: skip


def config_to_dict(config: TrainConfig) -> dict[str, Any]:
    """JSON form of a config."""
    return json.loads(json.dumps(asdict(config), default=str))


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
