"""What a user can ask of ``plan`` and ``cache``: frozen configurations, read by tyro and by Python callers."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from feature_store.format.codecs.registry import DEFAULT_LOGITS_CODEC, DEFAULT_TAP_CODEC, get_codec
from feature_store.inputs.options import TarOptions
from feature_store.tools.options import JsonObject, require
from feature_store.views import PolicyName


@dataclass(frozen=True, kw_only=True)
class TeacherSpec:
    """Which teacher, cut where, in which precision."""

    name: str
    model_kwargs: JsonObject = field(default_factory=dict)
    depth: int | None = None
    drop_prefix: bool = False
    compute_dtype: str = "float32"


@dataclass(frozen=True, kw_only=True)
class PlanConfig(TarOptions):
    """What is to be cached: enough to say how big it gets.

    Attributes:
        tars: Image tars: paths, brace patterns, URLs; one unit each, in this order.
        teacher: timm model name.
        store: Where the store is or would be written: a directory or a bucket's URL (s3://, gs://).
        model_kwargs: Extra arguments of timm.create_model, as JSON.
        depth: Number of later blocks of a plain ViT; default its last quarter.
        drop_prefix: Let students run a plain ViT's later blocks on grid tokens alone, as the released EVA configs do.
            Off: with the teacher's own class and register tokens, which are stored.
        views: Augmented views per sample.
        policy: What views are drawn from (rrc_flip: schedules T1 and T2; a1, a2 and a3: A1, A2 and A3).
        policy_options: Fields of the view policy to set differently, as JSON, e.g. '{"flip": 0}'.
        seed: Seed of the views.
        views_out: Folder or URL (s3://, gs://) to write each view to as a JPEG in webdataset tars, v<view>/u<unit>.tar;
            the teacher then sees those JPEGs, and students can train from them without the source tars.
        taps: What to store of the teacher; stage4 is the final feature map, always needed.
        tap_codec: How features are stored: f32, f16, bf16, int8, int8-channel, int6, int4; add +zstd to compress.
        logits_codec: How logits are stored: as taps, or top<k> for the k largest with the rest spread evenly.
        capacity: Rows kept for each tar; default the largest tar's samples. More leaves room for larger tars later.
        key_width: Bytes kept for each sample key; default the longest key's. More leaves room for longer ones later.
        licence_note: Terms of use of the images and the teacher, kept in the store.
        json: Print one JSON object on stdout.
    """

    tars: Positional[tuple[str, ...]]
    teacher: str
    store: str | Path = Path("store")
    model_kwargs: JsonObject = field(default_factory=dict)
    depth: int | None = None
    drop_prefix: bool = False
    views: int = 1
    policy: PolicyName = "rrc_flip"
    policy_options: JsonObject = field(default_factory=dict)
    seed: int = 0
    views_out: str | None = None
    taps: tuple[Literal["stage4", "stage3"], ...] = ("stage4",)
    tap_codec: str = DEFAULT_TAP_CODEC
    logits_codec: str = DEFAULT_LOGITS_CODEC
    capacity: int | None = None
    key_width: int | None = None
    licence_note: str = ""
    json: bool = False

    def __post_init__(self) -> None:
        """Refuse values no run could use.

        Raises:
            InputError: Names the option, the value and what is accepted.
        """
        require(self.views >= 1, "--views", self.views, "at least 1")
        require(0 <= self.seed < 2**64, "--seed", self.seed, "an unsigned 64-bit integer")
        own = self.policy_options.keys() & {"name", "size"}
        require(not own, "--policy-options", self.policy_options, "other fields: the teacher gives the size")
        for name, value in {"--capacity": self.capacity, "--key-width": self.key_width}.items():
            require(value is None or value >= 1, name, value, "at least 1")
        for codec in (self.tap_codec, self.logits_codec):
            get_codec(codec)  # refuses an unknown name
        require("stage4" in self.taps, "--taps", " ".join(self.taps), "stage4 among them: every loss needs it")


@dataclass(frozen=True, kw_only=True)
class TimedPlanConfig(PlanConfig):
    """What is to be cached, and how it is computed: enough to say how long it takes.

    Workers and device decide only how fast. A batch size can change the last bits of a feature, so an
    interrupted job resumed with the same one ends with the same bytes.

    Attributes:
        batch_size: View images per forward pass; halved for good when memory runs out.
        workers: Processes that decode and cut views; 0 does it in this process.
        device: Where the teacher runs, e.g. cuda:1; auto takes a GPU if there is one.
        compute_dtype: dtype of the teacher's forward pass (autocast below float32).
        compile: Run the teacher through torch.compile: minutes at the start, faster on a GPU from then on.
        time_samples: Samples to put through the whole pipeline first, to predict how long the job takes and when it
            pays; thousands on a GPU, so that every decode worker gets some batches. 0 measures nothing.
    """

    batch_size: int = 256
    workers: int = 4
    device: str = "auto"
    compute_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    compile: bool = False
    time_samples: int = 0

    @property
    def teacher_spec(self) -> TeacherSpec:
        """The teacher."""
        return TeacherSpec(
            name=self.teacher,
            model_kwargs=self.model_kwargs,
            depth=self.depth,
            drop_prefix=self.drop_prefix,
            compute_dtype=self.compute_dtype,
        )

    def __post_init__(self) -> None:
        """Refuse values no run could use."""
        super().__post_init__()
        require(self.batch_size >= 1, "--batch-size", self.batch_size, "at least 1")
        require(self.workers >= 0, "--workers", self.workers, "0 or more")
        require(
            self.time_samples >= 0 and self.time_samples != 1, "--time-samples", self.time_samples, "0, or 2 or more"
        )


@dataclass(frozen=True, kw_only=True)
class SharedPlanConfig(TimedPlanConfig):
    """What is to be cached, how it is computed, and by how many.

    Attributes:
        processes: Processes that will share the job, as torchrun or Ray start them, each with a device and --workers of
            its own: what --time-samples predicts of one is divided among them, by whole tars.
    """

    processes: int = 1

    def __post_init__(self) -> None:
        """Refuse values no run could use."""
        super().__post_init__()
        require(self.processes >= 1, "--processes", self.processes, "at least 1")


@dataclass(frozen=True, kw_only=True)
class CacheConfig(TimedPlanConfig):
    """What is to be cached, how, and where to.

    Attributes:
        store: The store: a directory or a bucket's URL (s3://, gs://); created, or continued if it was begun with
            the same settings.
        checkpoint: The teacher's weights (safetensors or torch file); default timm's pretrained ones, fetched.
        log_jsonl: File to append a JSON line to for the job's start, each committed unit and the end.
        metrics_port: Port of a Prometheus endpoint, /metrics; default none.
        metrics_host: Address it listens on; anyone who reaches it can read it.
        strict: Stop at the first unreadable sample instead of quarantining it.
        retry_quarantined: First try quarantined samples again; units with one that can be used now are written anew,
            whole. Not while students train from the store.
        engine: local computes in this process, beside any others that run the same command (torchrun ranks, Slurm
            array tasks, Kubernetes pods); ray computes in actors of a Ray cluster.
        lease_seconds: Seconds without a heartbeat after which another process takes over a unit; for stores in buckets.
            In local stores the kernel releases a dead process's units at once.
        ray_address: The Ray cluster, e.g. auto or ray://head:10001; default the environment's, or one on this machine.
        num_actors: Ray actors; default as many as the cluster has room for when the job starts.
        gpus_per_actor: GPUs of each Ray actor, fractions allowed; default 1 if the cluster has any.
    """

    store: str | Path = field()  # required here: a run should not choose where to write
    checkpoint: Path | None = None
    log_jsonl: Path | None = None
    metrics_port: int | None = None
    metrics_host: str = "127.0.0.1"
    strict: bool = False
    retry_quarantined: bool = False
    engine: Literal["local", "ray"] = "local"
    lease_seconds: float = 120.0
    ray_address: str | None = None
    num_actors: int | None = None
    gpus_per_actor: float | None = None

    def __post_init__(self) -> None:
        """Refuse values no run could use."""
        super().__post_init__()
        port = self.metrics_port
        require(port is None or 0 <= port < 65536, "--metrics-port", port, "0 (any that is free) to 65535")
        require(0 < self.lease_seconds < math.inf, "--lease-seconds", self.lease_seconds, "a number above 0")
        for name, value in {"--ray-address": self.ray_address, "--num-actors": self.num_actors,
                            "--gpus-per-actor": self.gpus_per_actor}.items():  # fmt: skip
            require(value is None or self.engine == "ray", name, value, "--engine ray with it")
        require(self.num_actors is None or self.num_actors >= 1, "--num-actors", self.num_actors, "at least 1")
        require((self.gpus_per_actor or 0) >= 0, "--gpus-per-actor", self.gpus_per_actor, "0 or more")
