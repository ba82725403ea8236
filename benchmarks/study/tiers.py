"""Tiers of the study: the same questions at the size of a machine."""

from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.study.teacher import TeacherRecipe

STUDENTS: dict[str, dict[str, Any]] = {
    # output_stride 8 keeps stages 3 and 4 at 4 x 4, the teacher's grid; 32 would leave a single position
    "cnn": {
        "student": "resnet10t",
        "student_kwargs": {"channels": [32, 48, 64, 96], "stem_width": 16, "output_stride": 8},
        "student_stages": [3, 4],
    },
    "mixer": {
        "student": "mixer_b14_224",
        "student_kwargs": {"patch_size": 8, "embed_dim": 128, "num_blocks": 6},
    },
    "vit": {
        "student": "vit_tiny_patch16_224",
        "student_kwargs": {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4},
    },
}
"""Each below 2 million weights; the same in all tiers."""


@dataclass(frozen=True)
class Tier:
    """Sizes of one tier.

    Attributes:
        name: Its name on the command line.
        teachers: Recipes by name: ``strong``, and ``weak`` for the question of two teachers.
        train_tars: The first tars of the training set, whose images the students get; CIFAR-100 has 5,000 in each.
        few_per_class: Labelled images of each class where labels are few.
        epochs: Of every run; it has epochs * images // batch_size steps.
        batch_size: Of every run.
        views: Cached views of each image where the question is not their number.
        view_counts: Numbers of cached views that are compared; ``epochs`` views are a new one in every epoch.
        seeds: Of every setting.
        processes: Runs at a time.
        cache_batch: Images per forward pass of the teacher.
        policy: View policy.
        policy_options: Changes to it; a crop of less than a third of 32 px shows little.
        base: Other fields of every run.
        students: Changes of STUDENTS, for a rehearsal.
    """

    name: str
    teachers: dict[str, TeacherRecipe]
    train_tars: int
    few_per_class: int
    epochs: int
    batch_size: int
    views: int
    view_counts: tuple[int, ...]
    seeds: tuple[int, ...]
    processes: int
    cache_batch: int = 256
    policy: str = "rrc_flip"
    policy_options: dict[str, Any] = field(default_factory=lambda: {"scale": (0.35, 1.0)})
    base: dict[str, Any] = field(default_factory=dict)
    students: dict[str, dict[str, Any]] = field(default_factory=dict)

    def student(self, name: str) -> dict[str, Any]:
        """Fields of a run that name the student."""
        return self.students.get(name, STUDENTS[name])


CPU = Tier(
    name="cpu",
    teachers={
        "strong": TeacherRecipe(epochs=10),
        "weak": TeacherRecipe(images=25_000, epochs=5),
    },
    train_tars=1,
    few_per_class=10,
    epochs=16,
    batch_size=128,
    views=8,
    view_counts=(1, 2, 4, 8, 16),
    seeds=(0, 1, 2),
    processes=2,
    base={"device": "cpu", "workers": 0, "optim": {"lr": 2e-3, "warmup_epochs": 2}},
)

CPU_10K = replace(
    CPU,
    name="cpu-10k",
    train_tars=2,
    few_per_class=20,
    epochs=32,
    view_counts=(1, 2, 4, 8, 16, 32),
)
"""Twice the images, four times the steps; its teachers are those of CPU."""

GPU = Tier(
    name="gpu",
    teachers={
        "strong": TeacherRecipe(epochs=20),
        "weak": TeacherRecipe(images=25_000, epochs=10),
    },
    train_tars=2,
    few_per_class=20,
    epochs=32,
    batch_size=128,
    views=8,
    view_counts=(1, 2, 4, 8, 16, 32),
    seeds=(0, 1, 2),
    processes=8,
    cache_batch=1024,
    base={"device": "cuda", "workers": 1, "amp": "bfloat16", "optim": {"lr": 2e-3, "warmup_epochs": 2}},
)

# The whole path in under a minute; its accuracies mean nothing.
_TINY = {"stem": (8, 8, 16), "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 4}
TINY = Tier(
    name="tiny",
    teachers={
        name: TeacherRecipe(model_kwargs=_TINY, images=images, epochs=1, batch_size=8)
        for name, images in {"strong": None, "weak": 16}.items()
    },
    train_tars=1,
    few_per_class=2,
    epochs=2,
    batch_size=8,
    views=1,
    view_counts=(1, 2),
    seeds=(0, 1),
    processes=1,
    base={"device": "cpu", "workers": 0},
    students={
        "cnn": {
            "student": "resnet10t",
            "student_kwargs": {"channels": [8, 8, 8, 8], "stem_width": 8, "output_stride": 8},
            "student_stages": [3, 4],
        },
        "mixer": {
            "student": "mixer_b14_224",
            "student_kwargs": {"patch_size": 8, "embed_dim": 16, "num_blocks": 3},
        },
        "vit": {
            "student": "vit_tiny_patch16_224",
            "student_kwargs": {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2},
        },
    },
)

TIERS = {tier.name: tier for tier in (CPU, CPU_10K, GPU, TINY)}
