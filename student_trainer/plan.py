"""From a config to everything that a run is made of."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from timm.data.config import resolve_model_data_config

from feature_store.errors import InputError, MismatchError, ResourceError
from feature_store.inputs.base import source_notes
from feature_store.store import Store
from feature_store.tools.label_check import teacher_accuracy
from student_trainer.config import TrainConfig
from student_trainer.data.batch import ViewDataset
from student_trainer.data.materialised import MaterialisedViews, StoredUnit
from student_trainer.data.replayed import DrawnViews, StoredViews, ViewSupplier
from student_trainer.data.sampler import EpochSampler
from student_trainer.distilled import DistilledStudent
from student_trainer.engine.distributed import ALONE, Group, synchronise_batchnorm
from student_trainer.inputs import Inputs, open_inputs, require_all_classes
from student_trainer.methods.base import Method, StudentShape, TaskLoss, TeacherShape
from student_trainer.methods.criterion import TASK_LOSSES
from student_trainer.methods.registry import METHODS, find_method
from student_trainer.methods.several import SeveralTeachers
from student_trainer.students.preprocessing import Preprocessing
from student_trainer.students.student import Student
from student_trainer.teachers.base import TeacherSide
from student_trainer.teachers.expectations import require_expected
from student_trainer.teachers.open import open_teacher
from student_trainer.teachers.store import StoreSide

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class RunPlan:
    """Everything a run is made of; made once from its config.

    Attributes:
        config: The run's configuration.
        group: The run's processes.
        device: Where student, method and a live teacher are.
        teacher: Where teacher features come from.
        distilled: Student and method, with their first weights.
        dataset: Batches of rows, with the features that the method needs.
        sampler: Which rows, epoch by epoch.
        preprocessing: Preprocessing of the student's images: normalised as for the teacher, so that both see the same.
        inputs: The images.
        identity: Names and hashes of everything that is read, for config.json and resuming.
    """

    config: TrainConfig
    group: Group
    device: torch.device
    teacher: TeacherSide
    distilled: DistilledStudent
    dataset: ViewDataset
    sampler: EpochSampler
    preprocessing: Preprocessing
    inputs: Inputs
    identity: dict[str, Any]

    @property
    def student(self) -> Student:
        """The student."""
        return self.distilled.student

    @property
    def method(self) -> Method:
        """The distillation method."""
        return self.distilled.method

    def describe(self) -> dict[str, Any]:
        """The plan as plain values, as it is saved in the run's folder."""
        config, store = self.config, self.teacher.store
        optim = config.optim.at(config.batch_size)
        return {
            "preset": config.preset,
            "method": {"name": config.method, **asdict(config.method_config())},
            "needs": self.method.needs._asdict(),
            "notes": list(self.method.notes),
            "teacher": None if self.teacher.info is None else self.teacher.info.name,
            "weights": list(self.teacher.weights),
            "store_fingerprint": None if store is None else store.manifest.fingerprint(),
            "device": str(self.device),
            "processes": self.group.size,
            "num_classes": self.student.num_classes,
            "student_dims": self.student.dims,
            "student_grids": self.student.grids,
            "student_parameters": _parameters(self.student),
            "method_parameters": _parameters(self.method),
            "preprocessing": asdict(self.preprocessing),
            "lr": optim.lr,
            **self.summary(),
        }

    def summary(self) -> dict[str, Any]:
        """Sizes of the training data."""
        return {
            "samples": self.sampler.rows,
            "labelled": self.inputs.labelled,
            "units": len(self.inputs.tars),
            "quarantined": self.inputs.quarantined,
            "views": self.sampler.num_views,
            "steps_per_epoch": self.sampler.per_epoch,
        }

    def sentence(self) -> str:
        """Description of the training data."""
        left_out = f", {self.inputs.quarantined} quarantined ones left out" if self.inputs.quarantined else ""
        views = f"{self.sampler.num_views} views" if self.sampler.num_views else "a new view every epoch"
        labelled = "all" if self.inputs.labelled == self.sampler.rows else self.inputs.labelled
        samples = f"{self.sampler.rows} samples ({labelled} labelled) from {len(self.inputs.tars)} units{left_out}"
        return "; ".join([f"{samples}, {views}, on {self.device}", *self.method.notes])

    def notes(self) -> list[str]:
        """Notes for the user: about teacher and images, and options of methods that are not used."""
        images = [tar for tar in (*self.inputs.tars, *self.inputs.validation) if not isinstance(tar, StoredUnit)]
        compares = any(needs.logits for needs in self.method.needs_of_teachers[:1])
        store = self.teacher.store if compares and isinstance(self.teacher, StoreSide) else None
        accuracy = None if store is None else teacher_accuracy(store)
        top1 = [] if accuracy is None else [f"top-1 of the teacher's stored logits: {accuracy}"]
        return top1 + option_notes(self.config) + source_notes(images)


def resolve(config: TrainConfig, group: Group = ALONE) -> RunPlan:
    """Open and build everything a run is made of; equal configs give equal first weights with any teacher side.

    Args:
        config: The run.
        group: The run's processes; each gets its own part of every batch.

    Raises:
        UserError: Something cannot be opened, or does not fit together.
    """
    device = find_device(config.device, group.local_rank)
    teacher = open_teacher(config.teacher, device)
    require_expected(config.expect, config.preset, teacher.policy, teacher.info, teacher.split)
    inputs = open_inputs(config, teacher.store, teacher.num_views)
    num_classes = _num_classes(config, teacher, inputs)
    require_all_classes(inputs.validation_classes, num_classes, "--val-tars")
    torch.manual_seed(config.seed)  # from here on, so that building a live teacher does not shift the weights
    distilled = build_distilled(
        config, num_classes, teacher.policy.size, teacher.shapes(), teacher.weights, group=group, device=device
    )
    student, method = distilled.student, distilled.method
    _require_same_classes(config, num_classes, len(inputs.classes), method, teacher.shapes())
    _require_enough_labels(config, method, inputs)
    dataset = ViewDataset(
        inputs.tars,
        _views(config, teacher),
        num_classes=num_classes,
        sources=teacher.sources(method.needs_of_teachers),
        optional_labels=True,
    )
    return RunPlan(
        config=config,
        group=group,
        device=device,
        teacher=teacher,
        distilled=distilled.to(device),
        dataset=dataset,
        sampler=EpochSampler(
            inputs.units,
            batch_size=config.batch_size,
            seed=config.seed,
            shuffle_units=config.shuffle_units,
            num_views=teacher.num_views,
            accumulate=config.accumulate,
            rank=group.rank,
            processes=group.size,
        ),
        preprocessing=_preprocessing(config, teacher, student),
        inputs=inputs,
        identity=run_identity(config, teacher, inputs),
    )


def option_notes(config: TrainConfig) -> list[str]:
    """A sentence for each built-in method that has options although another one is used, and for an endless warm-up.

    A sweep's base run may set options for its other settings.
    """
    others = (name for name in METHODS if name != config.method and hasattr(config, name))
    given = (name for name in others if getattr(config, name) != METHODS[name].Config())
    notes = [f"options --{name.replace('_', '-')}.* have no effect on --method {config.method}" for name in given]
    if config.optim.warmup_epochs >= config.epochs:
        notes.append(f"the learning rate only warms up: --optim.warmup-epochs is {config.optim.warmup_epochs:g}, the "
                     f"run has {config.epochs} epochs")  # fmt: skip
    return notes


def run_identity(config: TrainConfig, teacher: TeacherSide, inputs: Inputs) -> dict[str, Any]:
    """Names and hashes of everything a run reads, by content."""
    drawn = None if teacher.store is not None else {**teacher.policy.to_dict(), "seed": teacher.views.seed}
    views = {"views": teacher.num_views, "drawn": drawn}
    unread = {} if find_method(config.method).requires_teacher else {"features": "none", "weights": None}
    identity = {**teacher.identity(), **unread, **views, **inputs.identity(config)}
    return json.loads(json.dumps(identity))


def build_distilled(
    config: TrainConfig,
    num_classes: int,
    view_size: tuple[int, int],
    teachers: Sequence[TeacherShape],
    weights: Sequence[float] = (1.0,),
    *,
    group: Group = ALONE,
    device: torch.device = _CPU,
) -> DistilledStudent:
    """Student and method with fresh weights.

    The released code synchronises the student's BatchNorm only, and not that of the projectors.

    Args:
        config: The run.
        num_classes: K.
        view_size: Height and width of the views, in pixels.
        teachers: Sizes of every teacher; empty without one.
        weights: Factor on each teacher's terms.
        group: The run's processes.
        device: Where it will run.

    Raises:
        InputError: A student that cannot be used, options that do not fit student or teacher, or synchronised
            BatchNorm where torch has none.
    """
    student = Student(config.student, num_classes, view_size, config.student_kwargs, config.student_stages)
    method = _build_method(config, student, teachers, weights)
    if config.sync_bn:
        synchronise_batchnorm(student, group, device)
    return DistilledStudent(student, method)


def _build_method(
    config: TrainConfig, student: Student, teachers: Sequence[TeacherShape], weights: Sequence[float]
) -> Method:
    """The method of a run; for several teachers, one of its kind for each."""
    kind, options = find_method(config.method), config.method_config()
    task: TaskLoss = partial(TASK_LOSSES[config.task], label_smoothing=config.label_smoothing)
    shape = StudentShape(student.dims, student.grids, student.num_classes)
    if len(teachers) > 1:
        return SeveralTeachers(kind, options, shape, teachers, weights, task)
    return kind(options, shape, teachers[0] if teachers else None, task)


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


def _num_classes(config: TrainConfig, teacher: TeacherSide, inputs: Inputs) -> int:
    """The student's classes; checked against stored labels."""
    largest, named = _largest_label(teacher.store), len(inputs.classes)
    num_classes = config.num_classes or named or teacher.num_classes or (largest + 1 if largest is not None else 0)
    if not num_classes:
        raise InputError(
            "the number of classes is unknown without a teacher that has classes, class names or stored labels; give "
            "--num-classes"
        )
    if largest is not None and largest >= num_classes:
        raise InputError(
            f"the store has labels up to {largest}, but the student {num_classes} classes; "
            f"give --num-classes {largest + 1} or more, and where the teacher has fewer, train without its logits: "
            "--method fd, or --scalekd.kd-alpha None"
        )
    return num_classes


def _require_same_classes(
    config: TrainConfig, student_classes: int, named: int, method: Method, teachers: Sequence[TeacherShape]
) -> None:
    """Refuse a method that compares logits where they are of other classes, or missing.

    Folders of some of the teacher's classes are other classes too: an index is a folder's place among them.
    """
    for needs, shape in zip(method.needs_of_teachers, teachers, strict=False):  # a method without a teacher needs none
        if not needs.logits:
            continue
        if not shape.num_classes:
            raise InputError(
                f"--method {config.method} needs teacher logits, but the teacher has no classifier; choose --method "
                "scalekd or fd"
            )
        without = "--scalekd.kd-alpha None" if config.method == "scalekd" else "--method fd"
        if named not in (0, shape.num_classes):
            raise InputError(
                f"the images have {named} classes, expected the teacher's {shape.num_classes}, whose logits are "
                f"compared; train without logits ({without}), or, if they are some of the teacher's classes, name all "
                "of these in the teacher's order, one a line, with --classes FILE where the images are opened first"
                + ("; cache images without classes with --labels none" if named == 1 else "")
            )
        if student_classes != shape.num_classes:
            raise MismatchError(
                "num_classes",
                where="the teacher",
                expected=shape.num_classes,
                got=student_classes,
                remedy=f"leave out --num-classes, or train without logits ({without})",
            )


def _require_enough_labels(config: TrainConfig, method: Method, inputs: Inputs) -> None:
    """Refuse a method that needs more labels than the samples have.

    Raises:
        InputError: Names the method and how many samples have no label.
    """
    without = inputs.samples - inputs.labelled
    if method.needs.labels and without:
        raise InputError(
            f"--method {config.method} needs the label of every sample, but {without} of {inputs.samples} have none; "
            "choose a method whose own terms need none, such as scalekd or kd, or list labelled samples in --keys-file"
        )
    if method.needs.some_labels and not inputs.labelled:
        raise InputError(
            f"--method {config.method} learns from labels alone, but none of {inputs.samples} samples has one; give "
            "labelled samples, or a teacher and a method that learns from it"
        )


def _largest_label(store: Store | None) -> int | None:
    if store is None:
        return None
    return max(int(np.max(store.labels(unit), initial=-1)) for unit in range(len(store.manifest.tars)))


def _views(config: TrainConfig, teacher: TeacherSide) -> ViewSupplier:
    if teacher.store is None:
        return DrawnViews(teacher.policy, teacher.views.seed)
    units_in_memory = 2 * config.shuffle_units  # a batch may reach into the next group
    replayed = StoredViews(teacher.store, check_all=teacher.replay.check_all_pixels, units_in_memory=units_in_memory)
    if config.views_from is None:
        return replayed
    return MaterialisedViews(replayed, config.views_from, config.scratch, units_in_memory=units_in_memory)


def _preprocessing(config: TrainConfig, teacher: TeacherSide, student: Student) -> Preprocessing:
    data = resolve_model_data_config(student.model) if teacher.info is None else asdict(teacher.info)
    return Preprocessing(
        input_size=student.input_size,
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        interpolation=teacher.policy.interpolation,
        crop_pct=config.crop_pct,
    )


def _parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
