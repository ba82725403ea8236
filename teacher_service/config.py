"""Configurations of ``plan``, ``cache``."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from tyro.conf import OmitArgPrefixes, Positional, arg

from feature_store.format.codecs.registry import DEFAULT_LOGITS_CODEC, DEFAULT_TAP_CODEC, get_codec
from feature_store.inputs.options import SourceOptions, TarOptions
from feature_store.processes import usable_cpus
from feature_store.tools.options import JsonObject, check_fields, require
from feature_store.views import PolicyName
from teacher_service.share.leases import LEASE_SECONDS

_TAP = re.compile("stage[34]|block(0|[1-9][0-9]*)")

ComputeDtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class Inputs(SourceOptions):
    """Images and labels.

    Attributes:
        tars: Image tars: paths, brace patterns, URLs; one unit each, in this order. Or a class-per-folder tree, or
            parquet files, or a Hugging Face dataset folder.
    """

    tars: Positional[tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class StoredInputs(TarOptions):
    """The images that a store was written from; how they were divided and labelled, the store says itself.

    Attributes:
        tars: The store's tars, folder or parquet files.
    """

    tars: Positional[tuple[str, ...]]

    def __post_init__(self) -> None:
        """Refuse values of another type."""
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class TeacherSpec:
    """The teacher and where it is cut.

    Attributes:
        name: timm model name, or package.module:build, your own function that returns the teacher.
        model_kwargs: Extra arguments of timm.create_model, or of that function, as JSON.
        depth: Number of later blocks of a plain ViT; default its last quarter.
        drop_prefix: Let students run a plain ViT's later blocks on grid tokens alone, as the released EVA configs do.
            Off: with the teacher's own class and register tokens, which are stored.
        compute_dtype: dtype of the teacher's forward pass (autocast below float32).
    """

    name: Annotated[str, arg(name="teacher")]
    model_kwargs: JsonObject = field(default_factory=dict)
    depth: int | None = None
    drop_prefix: bool = False
    compute_dtype: ComputeDtype = "float32"

    def __post_init__(self) -> None:
        """Refuse values of another type."""
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class ViewSpec:
    """The augmented views.

    Attributes:
        count: Augmented views per sample.
        policy: View policy (rrc_flip: schedules T1 and T2; a1, a2 and a3: A1, A2 and A3).
        policy_options: Fields of the view policy to set differently, as JSON, e.g. '{"flip": 0}'.
        seed: Seed of the views.
        out: Folder or URL (s3://, gs://) to write each view to as a JPEG in webdataset tars, v<view>/u<unit>.tar;
            the teacher then sees those JPEGs, and students can train from them without the source tars.
    """

    count: Annotated[int, arg(name="views")] = 1
    policy: PolicyName = "rrc_flip"
    policy_options: JsonObject = field(default_factory=dict)
    seed: int = 0
    out: Annotated[str | None, arg(name="views-out")] = None

    def __post_init__(self) -> None:
        """Refuse values no run could use.

        Raises:
            InputError: Names the option, the value and what is accepted.
        """
        check_fields(self)
        require(self.count >= 1, "--views", self.count, "at least 1")
        require(0 <= self.seed < 2**64, "--seed", self.seed, "an unsigned 64-bit integer")
        own = self.policy_options.keys() & {"name", "size"}
        require(not own, "--policy-options", self.policy_options, "other fields: the teacher gives the size")


@dataclass(frozen=True, kw_only=True)
class StorageSpec:
    """Taps, logits and codecs of the store.

    Attributes:
        taps: Taps of the teacher to store: stage4, the final feature map, always needed; stage3, the input of the later
            blocks; block0, block1 and so on, the output of a block, or of a stage where resolution falls, as timm's
            feature_info counts them.
        tap_codec: Codec of features: f32, f16, bf16, int8, int8-channel, int6, int4; add +zstd to compress.
        logits_codec: Codec of logits: as for taps, or top<k> for the k largest with the rest spread evenly.
        capacity: Rows kept for each tar; default the largest tar's samples. More leaves room for larger tars later.
        key_width: Bytes kept for each sample key; default the longest key's. More leaves room for longer ones later.
        licence_note: Terms of use of the images and the teacher, kept in the store.
    """

    taps: tuple[str, ...] = ("stage4",)
    tap_codec: str = DEFAULT_TAP_CODEC
    logits_codec: str = DEFAULT_LOGITS_CODEC
    capacity: int | None = None
    key_width: int | None = None
    licence_note: str = ""

    def __post_init__(self) -> None:
        """Refuse values no run could use."""
        check_fields(self)
        for name, value in {"--capacity": self.capacity, "--key-width": self.key_width}.items():
            require(value is None or value >= 1, name, value, "at least 1")
        for codec in (self.tap_codec, self.logits_codec):
            get_codec(codec)  # refuses an unknown name
        for tap in self.taps:
            require(_TAP.fullmatch(tap) is not None, "--taps", tap, "stage4, stage3 or a block such as block5")
        require("stage4" in self.taps, "--taps", " ".join(self.taps), "stage4 among them: every loss needs it")


@dataclass(frozen=True, kw_only=True)
class ComputeSpec:
    """Options of the computation.

    Workers and device decide only how fast. A batch size can change the last bits of a feature, so an
    interrupted job resumed with the same one ends with the same bytes.

    Attributes:
        batch_size: View images per forward pass; halved for the rest of the run when memory runs out.
        workers: Processes that decode and cut views; 0 does it in this process.
        device: Where the teacher runs, e.g. cuda:1; auto takes a GPU if there is one.
        compile: Run the teacher through torch.compile: minutes at the start, faster on a GPU from then on.
        time_samples: Samples to put through the whole pipeline first, to predict how long the job takes and when it
            pays; thousands on a GPU, so that every decode worker gets some batches. 0 measures nothing.
        write_seconds: With --time-samples: also write files to the store's disk for so long, and predict with the rate
            at the end. Disks and their caches are fast for some tens of gigabytes only; give minutes. 0 does not.
    """

    batch_size: int = 256
    workers: Annotated[int, arg(help_behavior_hint="(default: 4, or the usable CPUs if fewer)")] = min(4, usable_cpus())
    device: str = "auto"
    compile: bool = False
    time_samples: int = 0
    write_seconds: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values no run could use."""
        check_fields(self)
        require(self.batch_size >= 1, "--batch-size", self.batch_size, "at least 1")
        require(self.workers >= 0, "--workers", self.workers, "0 or more")
        samples = self.time_samples
        require(samples >= 0 and samples != 1, "--time-samples", samples, "0, or 2 or more")
        require(0 <= self.write_seconds < math.inf, "--write-seconds", self.write_seconds, "0 or more")
        require(not self.write_seconds or samples > 0, "--write-seconds", self.write_seconds, "--time-samples with it")


@dataclass(frozen=True, kw_only=True)
class RayOptions:
    """Options of the Ray engine.

    Attributes:
        address: The Ray cluster, e.g. auto or ray://head:10001; default the environment's, or one on this machine.
        num_actors: Ray actors; default as many as the cluster has room for when the job starts.
        gpus_per_actor: GPUs of each Ray actor, fractions allowed; default 1 if the cluster has any.
    """

    address: Annotated[str | None, arg(name="ray-address")] = None
    num_actors: int | None = None
    gpus_per_actor: float | None = None

    def __post_init__(self) -> None:
        """Refuse values no run could use."""
        check_fields(self)
        require(self.num_actors is None or self.num_actors >= 1, "--num-actors", self.num_actors, "at least 1")
        require((self.gpus_per_actor or 0) >= 0, "--gpus-per-actor", self.gpus_per_actor, "0 or more")


@dataclass(frozen=True, kw_only=True)
class SharingSpec:
    """Which processes share the job.

    Attributes:
        engine: local computes in this process, beside any others that run the same command (torchrun ranks, Slurm
            array tasks, Kubernetes pods); ray computes in actors of a Ray cluster.
        lease_seconds: Seconds without a heartbeat after which another process takes over a unit; for stores in buckets.
            In local stores the kernel releases a dead process's units at once.
        ray: Options of the Ray engine.
    """

    engine: Literal["local", "ray"] = "local"
    lease_seconds: float = LEASE_SECONDS
    ray: OmitArgPrefixes[RayOptions] = field(default_factory=RayOptions)

    def __post_init__(self) -> None:
        """Refuse values no run could use, or options of an engine that is not used."""
        check_fields(self)
        require(0 < self.lease_seconds < math.inf, "--lease-seconds", self.lease_seconds, "a number above 0")
        options = {"--ray-address": self.ray.address, "--num-actors": self.ray.num_actors,
                   "--gpus-per-actor": self.ray.gpus_per_actor}  # fmt: skip
        for name, value in options.items():
            require(value is None or self.engine == "ray", name, value, "--engine ray with it")


@dataclass(frozen=True, kw_only=True)
class Reporting:
    """Where progress is reported, beside the terminal.

    Attributes:
        log_jsonl: File to append a JSON line to for the job's start, each committed unit and the end.
        metrics_port: Port of a Prometheus endpoint, /metrics; default none.
        metrics_host: Address it listens on; anyone who reaches it can read it.
    """

    log_jsonl: Path | None = None
    metrics_port: int | None = None
    metrics_host: str = "127.0.0.1"

    def __post_init__(self) -> None:
        """Refuse values no run could use."""
        check_fields(self)
        port = self.metrics_port
        require(port is None or 0 <= port < 65536, "--metrics-port", port, "0 (any that is free) to 65535")


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """A cache job to predict: inputs, teacher, views, storage, computation, processes.

    Attributes:
        inputs: Input tars.
        teacher: The teacher.
        views: The views.
        storage: The store's contents.
        compute: Options of the computation.
        store: Where the store is or would be written: a directory or a bucket's URL (s3://, gs://).
        processes: Processes that will share the job, as torchrun or Ray start them, each with a device and --workers of
            its own: what --time-samples predicts of one is divided among them, by whole tars.
        json: Print one JSON object on stdout.
    """

    inputs: Inputs
    teacher: TeacherSpec
    views: ViewSpec = field(default_factory=ViewSpec)
    storage: StorageSpec = field(default_factory=StorageSpec)
    compute: ComputeSpec = field(default_factory=ComputeSpec)
    store: str | Path = Path("store")
    processes: int = 1
    json: bool = False

    def __post_init__(self) -> None:
        """Refuse values no run could use."""
        check_fields(self)
        require(self.processes >= 1, "--processes", self.processes, "at least 1")


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """A cache job: inputs, teacher, views, storage, computation and destination.

    Attributes:
        inputs: Input tars.
        teacher: The teacher.
        views: The views.
        storage: The store's contents.
        compute: Options of the computation.
        sharing: Which processes share the job.
        reporting: Where progress is reported.
        store: The store: a directory or a bucket's URL (s3://, gs://); created, or continued if it was created with
            the same settings.
        checkpoint: The teacher's weights (safetensors or torch file); default timm's pretrained ones, fetched.
        strict: Stop at the first unreadable sample instead of quarantining it.
        retry_quarantined: First try quarantined samples again; units with one that can be used now are written again,
            whole. Not while students train from the store.
        json: Print one JSON object on stdout.
    """

    inputs: Inputs
    teacher: TeacherSpec
    views: ViewSpec = field(default_factory=ViewSpec)
    storage: StorageSpec = field(default_factory=StorageSpec)
    compute: ComputeSpec = field(default_factory=ComputeSpec)
    sharing: SharingSpec = field(default_factory=SharingSpec)
    reporting: Reporting = field(default_factory=Reporting)
    store: str | Path
    checkpoint: Path | None = None
    strict: bool = False
    retry_quarantined: bool = False
    json: bool = False

    def __post_init__(self) -> None:
        """Refuse values of another type."""
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class TeacherListConfig:
    """Which teachers to list.

    Attributes:
        pattern: A timm model name, a pattern such as '*swin*' (in quotes), a part of names, or package.module:build.
        model_kwargs: Extra arguments of timm.create_model, or of that function, as JSON.
        json: Print one JSON object on stdout.
    """

    pattern: Positional[str] = "*"
    model_kwargs: JsonObject = field(default_factory=dict)
    json: bool = False

    def __post_init__(self) -> None:
        """Refuse values of another type."""
        check_fields(self)


JobConfig: TypeAlias = PlanConfig | CacheConfig
"""Either configuration; both have inputs, teacher, views, storage, compute and store."""
