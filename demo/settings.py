"""Every number the demo was set up with, in one place: the full run and its quick rehearsal.

The teacher was chosen among Swin and ViT shapes by accuracy per second; ViTs and finer final grids were far behind.
The student is narrow enough to stay below the teacher with all labels; at channels 8, 16, 24, 32 it came within a
point. The steps were chosen so that everything fits in a few minutes on two cores. The loss weights are the
released ones: scaled by 49 / 4, for this teacher's 4 tokens instead of 49, they helped FD with few labels, hurt it with
all, and hurt ScaleKD with both. Learning rate and batch size were set once for the plain student. The seeds are 0, 1, 2
and were not chosen.
"""

from dataclasses import dataclass, field
from typing import Any

from student_trainer.config import OptimConfig
from student_trainer.methods.scalekd import ScaleKDConfig

CLASSES = 10
VIEW_POLICY = "rrc_flip"  # of the teacher's training, the store and thereby the students
SIDE = 64  # px of images and views; one of the teacher's 8 px patches covers one pixel of the original scan


@dataclass(frozen=True)
class TeacherSettings:
    """The teacher and its training.

    Attributes:
        name: timm model name.
        model_kwargs: Extra arguments of ``timm.create_model``.
        epochs: Passes over all labelled training images, each with new views.
        batch_size: Images per step.
        lr: Peak learning rate of AdamW (one cycle with a cosine end).
        label_smoothing: Label smoothing of its cross entropy.
    """

    # A Swin of three stages: token grids 8 x 8, 4 x 4 (stage-3 output, the split) and 2 x 2 (final map).
    name: str = "swin_tiny_patch4_window7_224"
    model_kwargs: dict[str, Any] = field(
        default_factory=lambda: {
            "img_size": SIDE,
            "patch_size": 8,
            "window_size": 4,
            "embed_dim": 48,
            "depths": [1, 2, 1],
            "num_heads": [3, 6, 12],
            "num_classes": CLASSES,
            "drop_path_rate": 0.0,
        }
    )
    epochs: int = 60
    batch_size: int = 64
    lr: float = 1.5e-3
    label_smoothing: float = 0.1


@dataclass(frozen=True)
class StudentSettings:
    """The student and how it is trained, the same for every method.

    Attributes:
        name: timm model name.
        model_kwargs: Extra arguments of ``timm.create_model``.
        steps: Optimizer steps, for any number of labels.
        batch_size: Images per step.
        optim: Optimizer and schedule.
        scalekd: Weights of the distillation losses, of all methods.
        few_seeds: Seeds with few labels.
        all_seeds: Seeds with all labels.
    """

    # A thin ResNet-10: 20 thousand parameters; maps at reductions 16 and 32 are 4 x 4 and 2 x 2, as the teacher's.
    name: str = "resnet10t"
    model_kwargs: dict[str, Any] = field(default_factory=lambda: {"channels": [8, 12, 16, 24], "stem_width": 8})
    steps: int = 200
    batch_size: int = 50
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=3e-3))
    scalekd: ScaleKDConfig = field(default_factory=ScaleKDConfig)  # the released weights
    few_seeds: tuple[int, ...] = (0, 1, 2)
    all_seeds: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Settings:
    """One run of the demo.

    Attributes:
        train_per_class: Labelled training images per class; None for all that are not test images.
        test_images: Images kept for testing.
        few_per_class: Labels per class in the few-labels setting.
        tar_samples: Samples per tar.
        views: Cached views per image.
        view_options: Changes to VIEW_POLICY: digits must not be mirrored, and half the area stays in view.
        seed: Seed of the split, the views and the teacher.
        teacher: The teacher.
        student: The student.
    """

    train_per_class: int | None = None
    test_images: int = 500
    few_per_class: int = 10
    tar_samples: int = 180
    views: int = 8
    view_options: dict[str, Any] = field(default_factory=lambda: {"flip": 0.0, "scale": (0.5, 1.0)})
    seed: int = 0
    teacher: TeacherSettings = TeacherSettings()
    student: StudentSettings = StudentSettings()


FULL = Settings()

# The same path in well under a minute; its accuracies mean nothing.
QUICK = Settings(
    train_per_class=8,
    test_images=60,
    few_per_class=4,
    tar_samples=40,
    views=2,
    teacher=TeacherSettings(epochs=2, batch_size=20),
    student=StudentSettings(steps=4, batch_size=20, few_seeds=(0,)),
)

# For the notebooks of docs/: one teacher and one store in about ten seconds, good enough to look at.
SMALL = Settings(
    train_per_class=60,
    test_images=300,
    tar_samples=200,
    views=4,
    teacher=TeacherSettings(epochs=12),
    student=StudentSettings(steps=60),
)
