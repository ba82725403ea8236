"""What a run is made of: data, teacher features, student and loss, built from its config and checked together."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from timm.data.config import resolve_model_data_config

from feature_store.client.connection import Client
from feature_store.errors import InputError, MismatchError, ResourceError
from feature_store.inputs.tar import Tar, tar_notes
from feature_store.source import FeatureSource
from feature_store.store import Store
from feature_store.teacher import LaterBlocks
from feature_store.teacher.model import Teacher, load_teacher
from feature_store.teacher.torch_codecs import TorchDecoder
from feature_store.views import ViewPolicy, view_policy
from student_trainer.config import TrainConfig
from student_trainer.data.batch import ViewDataset
from student_trainer.data.inputs import open_inputs
from student_trainer.data.materialised import MaterialisedViews
from student_trainer.data.replayed import DrawnViews, StoredViews, ViewSupplier
from student_trainer.data.sampler import EpochBatches
from student_trainer.engine.distributed import Group, synchronise_batchnorm
from student_trainer.methods import FDConfig, KDConfig, Method, StudentShape, TeacherShape, find_method
from student_trainer.methods.base import NoOptions
from student_trainer.methods.criterion import TASK_LOSSES
from student_trainer.students.load import Preprocessing
from student_trainer.students.student import Student
from student_trainer.teachers.expectations import require_expected
from student_trainer.teachers.live import LiveSource, require_same_teacher
from student_trainer.trainee import Trainee

ALONE = Group()
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Parts:
    """A run's parts.

    Attributes:
        device: Where student, loss and a live teacher live.
        trainee: Student and loss.
        dataset: Batches of rows, with features in them unless a live teacher in this process gives them.
        batches: Which rows, epoch by epoch.
        live: The live source; None if features are cached or not needed.
        decoders: Makes values of cached taps on the device, by tap name; none for a service's live teacher.
        taps: Taps the loss needs.
        preprocessing: How images reach the student: normalised as for the teacher, so that both see the same.
        val_tars: Validation tars.
        quarantined: Samples left out because the teacher's pass could not read them.
        inputs: Names and hashes of everything that is read, for config.json and resuming.
        group: The run's processes.
        kd_off: KD was asked for, but the teacher has no logits.
        store_fingerprint: The store's manifest, as it is now.
    """

    device: torch.device
    trainee: Trainee
    dataset: ViewDataset
    batches: EpochBatches
    live: LiveSource | None
    decoders: Mapping[str, TorchDecoder]
    taps: tuple[str, ...]
    preprocessing: Preprocessing
    val_tars: tuple[Tar, ...]
    quarantined: int
    inputs: dict[str, Any]
    group: Group = ALONE
    kd_off: bool = False
    store_fingerprint: str | None = None

    def summary(self) -> dict[str, Any]:
        """What is trained on, in numbers."""
        return {
            "samples": self.batches.rows,
            "units": len(self.dataset.tars),
            "quarantined": self.quarantined,
            "views": self.batches.num_views,
            "steps_per_epoch": self.batches.per_epoch,
        }

    def sentence(self) -> str:
        """What is trained on, in words."""
        left_out = f", {self.quarantined} quarantined ones left out" if self.quarantined else ""
        views = f"{self.batches.num_views} views" if self.batches.num_views else "a new view every epoch"
        samples = f"{self.batches.rows} samples from {len(self.dataset.tars)} tars{left_out}, {views}, on {self.device}"
        return f"{samples}; KD is off: the teacher has no classifier" if self.kd_off else samples

    def notes(self) -> list[str]:
        """What the user should know of the tars."""
        return tar_notes([tar for tar in (*self.dataset.tars, *self.val_tars) if isinstance(tar, Tar)])

    def resolved(self) -> dict[str, Any]:
        """What the config left open."""
        student = self.trainee.student
        return {
            "device": str(self.device),
            "num_classes": student.num_classes,
            "student_dims": student.dims,
            "student_grids": student.grids,
            "preprocessing": asdict(self.preprocessing),
            "kd_off": self.kd_off,
            "store_fingerprint": self.store_fingerprint,
            **self.summary(),
        }


def assemble(config: TrainConfig, val_tars: Sequence[Tar] = (), group: Group = ALONE) -> Parts:
    """Build a run's parts; the same config gives the same initial weights whatever the source of features.

    Args:
        config: The run.
        val_tars: Validation tars, opened.
        group: The run's processes; each gets its own part of every batch.

    Raises:
        UserError: Whatever does not fit together, see the functions below.
    """
    device = find_device(config.device, group.local_rank)
    inputs = open_inputs(config)
    store = inputs.store
    teacher = live_teacher(config, store, device) if config.source == "live" else None
    manifest = None if store is None else store.manifest
    info, split = (
        (teacher.info, teacher.split) if teacher else (manifest and manifest.teacher, manifest and manifest.split)
    )
    require_expected(config, _policy(config, store), info, split)
    kd_off = _lacks_logits(config, store, teacher)
    if kd_off:
        config = replace(config, scalekd=replace(config.scalekd, kd_alpha=None))
    taps = _needed_taps(config, store, teacher)
    num_classes = _num_classes(config, store, teacher)
    views = _views(config, store, teacher)
    source = _source(config, store, inputs.service, taps)
    dataset = ViewDataset(inputs.tars, views, num_classes=num_classes, source=source, taps=taps)
    later_blocks = _later_blocks(config, store, teacher, device)
    torch.manual_seed(config.seed)  # from here on, so that building a live teacher does not shift the weights
    trainee = build_trainee(config, num_classes, views.size, later_blocks, group, device)
    return Parts(
        device=device,
        trainee=trainee.to(device),
        dataset=dataset,
        batches=EpochBatches(
            inputs.units,
            batch_size=config.batch_size,
            seed=config.seed,
            shuffle_units=config.shuffle_units,
            num_views=inputs.num_views,
            accumulate=config.accumulate,
            rank=group.rank,
            processes=group.size,
        ),
        live=None if teacher is None else LiveSource(teacher, dataset, inputs.units),
        decoders=_decoders(config, store, taps),
        taps=taps,
        preprocessing=_preprocessing(config, store, teacher, trainee.student),
        val_tars=tuple(val_tars),
        quarantined=sum(len(store.quarantined(unit)) for unit in range(len(inputs.tars))) if store else 0,
        inputs=inputs.identity(config, val_tars, teacher and teacher.info.weights_sha256, group.size),
        group=group,
        kd_off=kd_off,
        store_fingerprint=None if store is None else store.manifest.fingerprint(),
    )


def build_trainee(
    config: TrainConfig,
    num_classes: int,
    view_size: tuple[int, int],
    later_blocks: LaterBlocks | None,
    group: Group = ALONE,
    device: torch.device = _CPU,
) -> Trainee:
    """Student and loss with fresh weights; dims, grids and heads follow from the student and the later blocks.

    The released code synchronises the student's BatchNorm only, and not that of the projectors.

    Raises:
        InputError: A student that cannot be used, or synchronised BatchNorm where torch has none.
    """
    student = Student(config.student, num_classes, view_size, config.student_kwargs, config.student_stages)
    loss = _loss(config, student, later_blocks)
    if config.sync_bn:
        synchronise_batchnorm(student, group, device)
    return Trainee(student, loss)


def find_device(name: str, local_rank: int | None = None) -> torch.device:
    """A torch device by name; ``auto`` takes a GPU if there is one.

    Args:
        name: auto, cpu, cuda or cuda:N.
        local_rank: Number of this process on its machine, and of the GPU it uses.

    Raises:
        InputError: No such kind of device.
        ResourceError: This machine has none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and local_rank is not None:
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device is {name!r}, expected auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ResourceError(
            f"--device is {name}, but torch sees {torch.cuda.device_count()} GPUs here; use --device cpu"
        )
    return device


def live_teacher(config: TrainConfig, store: Store | None, device: torch.device) -> Teacher:
    """The live teacher; with a store, the store's own or none."""
    asked, manifest = config.teacher, None if store is None else store.manifest
    name = asked.name or (manifest.teacher.name if manifest else "")
    teacher = load_teacher(
        name,
        checkpoint=asked.checkpoint,
        pretrained=asked.pretrained,
        model_kwargs=asked.model_kwargs or (manifest.teacher.model_kwargs if manifest else {}),
        depth=asked.depth or (manifest.split.depth if manifest else None),
        drop_prefix=(
            asked.drop_prefix if asked.drop_prefix is not None else bool(manifest and manifest.split.drops_prefix)
        ),
        compute_dtype=asked.compute_dtype or (manifest.teacher.compute_dtype if manifest else "float32"),
        device=device,
    )
    if manifest is not None:
        require_same_teacher(manifest, teacher.info, teacher.split)
    return teacher


def _needed_taps(config: TrainConfig, store: Store | None, teacher: Teacher | None) -> tuple[str, ...]:
    if config.method in ("kd", "none"):
        return ()
    split = teacher.split if teacher is not None else store.manifest.split if store is not None else None
    needs_prefix = config.method == "scalekd" and config.scalekd.tpp and split is not None and split.prefix == "cached"
    return ("stage4", "stage3_prefix") if needs_prefix else ("stage4",)


def _source(
    config: TrainConfig, store: Store | None, service: Client | None, taps: tuple[str, ...]
) -> FeatureSource | None:
    """What batches get their features from; None if they need none, or a live teacher in this process gives them."""
    if config.method == "none" or config.source == "live" or store is None:
        return None
    if service is None:
        return store.source(taps)
    if not config.is_live:
        return service.source(taps)
    source = service.live(taps)
    require_same_teacher(store.manifest, source.info, source.split)
    return source


def _decoders(config: TrainConfig, store: Store | None, taps: Sequence[str]) -> dict[str, TorchDecoder]:
    if store is None or config.is_live:
        return {}
    return {tap: TorchDecoder(store.layout.codecs[tap]) for tap in taps}


def _num_classes(config: TrainConfig, store: Store | None, teacher: Teacher | None) -> int:
    """The student's classes; checked against the teacher's where logits are compared, and against stored labels."""
    info = teacher.info if teacher is not None else store.manifest.teacher if store is not None else None
    teacher_classes = info.num_classes if info is not None else 0
    largest = _largest_label(store)
    num_classes = config.num_classes or teacher_classes or (largest + 1 if largest is not None else 0)
    if not num_classes:
        raise InputError("the number of classes is unknown without a store or a teacher; give --num-classes")
    if largest is not None and largest >= num_classes:
        raise InputError(
            f"the store has labels up to {largest}, but the student {num_classes} classes; "
            f"give --num-classes {largest + 1} or more, and without a teacher of as many classes switch kd off"
        )
    if _uses_logits(config):
        _require_same_classes(num_classes, teacher_classes)
    return num_classes


def _lacks_logits(config: TrainConfig, store: Store | None, teacher: Teacher | None) -> bool:
    """Whether ScaleKD has to do without its KD term; a method that is nothing but KD is refused later."""
    info = teacher.info if teacher is not None else store.manifest.teacher if store is not None else None
    return config.method == "scalekd" and _uses_logits(config) and info is not None and not info.num_classes


def _uses_logits(config: TrainConfig) -> bool:
    return config.method == "kd" or (config.method == "scalekd" and config.scalekd.kd_alpha is not None)


def _require_same_classes(student_classes: int, teacher_classes: int) -> None:
    remedy = "set --scalekd.kd-alpha None to train without logit distillation"
    if not teacher_classes:
        raise InputError(
            "the kd method needs teacher logits, but the teacher has no classifier; choose --method scalekd or fd"
        )
    if student_classes != teacher_classes:
        raise MismatchError(
            "num_classes",
            where="the teacher",
            expected=teacher_classes,
            got=student_classes,
            remedy=f"leave out --num-classes, or {remedy}",
        )


def _largest_label(store: Store | None) -> int | None:
    if store is None:
        return None
    return max(int(np.max(store.labels(unit), initial=-1)) for unit in range(len(store.manifest.tars)))


def _views(config: TrainConfig, store: Store | None, teacher: Teacher | None) -> ViewSupplier:
    if store is not None:
        units_in_memory = 2 * config.shuffle_units  # a batch may reach into the next group
        replayed = StoredViews(store, check_all=config.check_all_pixels, units_in_memory=units_in_memory)
        if config.views_from is None:
            return replayed
        return MaterialisedViews(replayed, config.views_from, config.scratch, units_in_memory=units_in_memory)
    policy = _policy(config, None)
    if teacher is not None and policy.size != teacher.info.input_size:
        raise InputError(
            f"views are {policy.size[0]} x {policy.size[1]}, but teacher {teacher.info.name} takes "
            f"{teacher.info.input_size[0]} x {teacher.info.input_size[1]}; set --views.size"
        )
    return DrawnViews(policy, config.views.seed)


def _policy(config: TrainConfig, store: Store | None) -> ViewPolicy:
    return view_policy(config.views.policy, config.views.size) if store is None else store.manifest.policy


def _later_blocks(
    config: TrainConfig, store: Store | None, teacher: Teacher | None, device: torch.device
) -> LaterBlocks | None:
    """P: a live teacher's own, or the store's bundle, built without the rest of the teacher."""
    if config.method == "none":
        return None
    if teacher is not None:
        return teacher.later_blocks
    return None if store is None else store.later_blocks(device)


def _loss(config: TrainConfig, student: Student, later_blocks: LaterBlocks | None) -> Method:
    scalekd, shape = config.scalekd, StudentShape(student.dims, student.grids, student.num_classes)
    match config.method:
        case "scalekd":
            options = scalekd
        case "fd":
            options = FDConfig(scalekd.alpha_stage4 * scalekd.beta_stage4)
        case "kd":
            if scalekd.kd_alpha is None:
                raise InputError("kd_alpha is None, but logit distillation is all the kd method does; set it to 0..1")
            options = KDConfig(scalekd.kd_alpha, scalekd.kd_temperature)
        case _:
            options = NoOptions()
    # whether there are logits was decided before
    teacher = (
        None if later_blocks is None else TeacherShape(later_blocks.info, student.num_classes, lambda: later_blocks)
    )
    task = partial(TASK_LOSSES[config.task], label_smoothing=config.label_smoothing)
    return find_method(config.method)(options, shape, teacher, task)


def _preprocessing(
    config: TrainConfig, store: Store | None, teacher: Teacher | None, student: Student
) -> Preprocessing:
    info = teacher.info if teacher is not None else store.manifest.teacher if store is not None else None
    data = resolve_model_data_config(student.model) if info is None else asdict(info)
    return Preprocessing(
        input_size=student.input_size,
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        interpolation=_policy(config, store).interpolation,
        crop_pct=config.crop_pct,
    )
